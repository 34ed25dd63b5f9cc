"""Experts in ONNX Runtime: one operator for a block, the same numbers as in memory, codes read back from the file."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import MixtralConfig

from gossamer.models.candidate import Candidate
from gossamer.models.experts import swiglu_of, take_apart
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.onnxruntime import FILE, OnnxRuntime
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

TINY = runpy.run_path(str(Path(__file__).parents[1] / "models" / "tiny_experts.py"))
saved, ids = TINY["saved"], TINY["ids"]
TASK = get_task("causal-lm")
FOUR, EIGHT = QuantSpec(bits=4, group_size=16), QuantSpec(bits=8)
ZEROS = QuantSpec(bits=4, symmetric=False, group_size=16)
OPERATORS = ("QMoE", "MoE", "Experts")


def opened(family: str, folder: Path) -> tuple[Candidate, ModelMap]:
    source = Source.open(saved(TINY[family](), folder))
    module = source.module(TASK)
    return Candidate(source, module), map_model(module, {"input_ids": ids()})


def round_experts(candidate: Candidate, model: ModelMap, up: QuantSpec, down: QuantSpec) -> None:
    for layer in model.layers:
        if layer.role.startswith("expert_"):
            spec = down if layer.role == "expert_down" else up
            weight = candidate.values(f"{layer.name}.weight")
            candidate.set_quantized(f"{layer.name}.weight", quantize_weight(weight, spec))


def check(candidate: Candidate, folder: Path, cache: Path) -> ir.Model:
    """Write a candidate, open it in ONNX Runtime, compare with memory on other lengths, and return the file's graph."""
    inputs = {"input_ids": ids(2, 8).numpy(), "attention_mask": np.ones((2, 8), np.int64)}
    axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    folder.mkdir()
    OnnxRuntime().write(candidate, folder, ExportRequest(TASK, inputs, axes, ("logits",), cache))
    session = OnnxRuntime().open(folder, threads=1)
    for rows, length in ((1, 24), (3, 5), (1, 1)):
        tokens = ids(rows, length)
        found = session.run({"input_ids": tokens.numpy(), "attention_mask": np.ones((rows, length), np.int64)})
        with torch.no_grad():
            wanted = candidate.module(tokens).logits
        np.testing.assert_allclose(found["logits"], wanted, rtol=1e-3, atol=2e-4)
    return ir.load(folder / FILE)


def operators(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph if node.op_type in OPERATORS]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "gpt_oss"))]
)
def test_the_file_computes_what_memory_computes(family: str, tmp_path: Path) -> None:
    candidate, model = opened(family, tmp_path / "model")
    blocks = len(model.experts)
    assert operators(check(candidate, tmp_path / "floats", tmp_path / "cache")) == ["MoE"] * blocks
    for number, (up, down) in enumerate([(ZEROS, FOUR), (QuantSpec(bits=3, group_size=16), FOUR), (EIGHT, EIGHT)]):
        candidate, model = opened(family, tmp_path / f"model{number}")
        round_experts(candidate, model, up, down)
        folder = tmp_path / f"codes{number}"
        assert operators(check(candidate, folder, tmp_path / "cache")) == ["QMoE"] * blocks
        held = {tensor.name: tensor for tensor in OnnxRuntime().stored_tensors(folder)}
        for layer in model.layers:
            if layer.role.startswith("expert_"):
                spec, stored = (down if layer.role == "expert_down" else up), held[f"{layer.name}.weight"]
                assert (stored.bits, stored.group_size, stored.symmetric) == (
                    spec.bits, spec.group_size, spec.symmetric,
                )  # fmt: skip
                assert stored.bytes == OnnxRuntime().stored_bytes(layer.role, layer.shape, spec, 4)
        names = ir.load(folder / FILE).graph.initializers
        sizes = sum(v.const_value.nbytes for n, v in names.items() if ".experts." in n and v.const_value is not None)
        biases = sum(
            v.const_value.nbytes for n, v in names.items() if n.endswith("_bias") and v.const_value is not None
        )
        assert sizes - biases == sum(s.bytes for name, s in held.items() if ".experts." in name and s.bits < 16)


def test_what_lies_between_the_layers_is_found_by_trying() -> None:
    for family, wanted in (("mixtral", (1.0, 0.0, None, False)), ("gpt_oss", (1.702, 1.0, 7.0, True))):
        model = TINY[family]()
        take_apart(model)
        found = swiglu_of(model.model.layers[0].mlp.experts)
        assert found is not None
        assert (found.alpha, found.beta, found.limit, found.interleaved) == wanted
    other = TINY["mixtral"](hidden_act="gelu")
    assert isinstance(other.config, MixtralConfig)
    take_apart(other)
    assert swiglu_of(other.model.layers[0].mlp.experts) is None


def test_what_the_operators_do_not_have_is_refused(tmp_path: Path) -> None:
    runtime = OnnxRuntime()
    _, model = opened("mixtral", tmp_path / "mixtral")
    experts = [layer for layer in model.layers if layer.role.startswith("expert_")]

    def together(grids: dict[str, QuantSpec]) -> str:
        return runtime.refusal_together(model, grids) or ""

    every = {layer.name: ZEROS for layer in experts}
    assert together({}) == together(every) == ""
    assert "all of them are rounded, or none" in together({experts[0].name: FOUR})
    assert "for one" in together(every | {experts[0].name: FOUR})
    downs = {layer.name: QuantSpec(bits=4) for layer in experts if layer.role == "expert_down"}
    assert "one group size" in together(every | downs)
    for spec, why in (
        (QuantSpec(bits=8, group_size=16), "rounds inputs"),
        (QuantSpec(bits=4, group_size=24), "not 24"),
    ):
        assert why in (runtime.refusal("expert_down", (32, 48), spec, None) or "")
    assert runtime.refusal("expert_up", (48, 32), EIGHT, ActivationSpec(kind="dynamic")) is not None
    other: Any = TINY["mixtral"](hidden_act="gelu")
    take_apart(other)
    refused = runtime.refusal_together(map_model(other, {"input_ids": ids()}), {})
    assert refused is not None
    assert "something else than a gated network with SiLU" in refused
