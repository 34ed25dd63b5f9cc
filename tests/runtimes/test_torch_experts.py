"""Quantized experts in a folder that stock transformers opens: the same numbers, or a refusal before work is spent."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gossamer.errors import RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import QuantSpec
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.runtimes import available_runtimes, get_runtime
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

TINY = runpy.run_path(str(Path(__file__).parents[1] / "models" / "tiny_experts.py"))
saved, ids = TINY["saved"], TINY["ids"]
TASK = get_task("causal-lm")
FOUR = QuantSpec(bits=4, group_size=16)
OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, report)
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, folder + "/logits.pt")
assert "gossamer" not in sys.modules
"""


def opened(family: str, folder: Path) -> tuple[Candidate, ModelMap]:
    source = Source.open(saved(TINY[family](), folder))
    module = source.module(TASK)
    return Candidate(source, module), map_model(module, {"input_ids": ids()})


def round_layers(candidate: Candidate, model: ModelMap, spec: QuantSpec, chosen: Any) -> None:
    for layer in model.layers:
        if layer.kind == "linear" and layer.role != "router" and layer.tied_to is None and chosen(layer):
            weight = candidate.values(f"{layer.name}.weight")
            candidate.set_quantized(f"{layer.name}.weight", quantize_weight(weight, spec))


def written(candidate: Candidate, folder: Path) -> Path:
    folder.mkdir()
    request = ExportRequest(TASK, {"input_ids": ids().numpy()}, {}, ("logits",), folder)
    TorchFolder().write(candidate, folder, request)
    return folder


def stock_logits(folders: list[Path], tmp_path: Path) -> list[torch.Tensor]:
    """Return what stock transformers computes in a process that has never heard of gossamer."""
    torch.save(ids(2), tmp_path / "ids.pt")
    command = [sys.executable, "-c", OPEN, str(tmp_path / "ids.pt"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / "logits.pt") for folder in folders]


CASES = {
    "all": lambda layer: True,
    "experts": lambda layer: layer.role.startswith("expert_"),
    "attention": lambda layer: layer.role in ("q", "k", "v", "o"),
    "down": lambda layer: layer.role == "expert_down",
    "second": lambda layer: layer.block == 1,
}


@pytest.mark.parametrize("spec", [FOUR, QuantSpec(bits=3, group_size=16), QuantSpec(bits=8)], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"])
def test_the_folder_computes_what_memory_computes(family: str, spec: QuantSpec, tmp_path: Path) -> None:
    candidate, model = opened(family, tmp_path / "model")
    round_layers(candidate, model, spec, CASES["all"])
    folder = written(candidate, tmp_path / "artifact")
    with torch.no_grad():
        wanted = candidate.module(ids(2)).logits
    session = TorchFolder().open(folder, threads=1, task=TASK)
    np.testing.assert_allclose(session.run({"input_ids": ids(2).numpy()})["logits"], wanted, rtol=1e-3, atol=1e-4)
    held = {tensor.name: tensor for tensor in TorchFolder().stored_tensors(folder)}
    for layer in model.layers:
        if layer.role.startswith("expert_"):
            stored = held[f"{layer.name}.weight"]
            assert (stored.bits, stored.group_size, stored.symmetric) == (spec.bits, spec.group_size, True)
            assert stored.bytes == TorchFolder().stored_bytes(layer.role, layer.shape, spec, 4)
    assert held["model.layers.1.mlp.gate.weight"].bits == 32


@pytest.mark.timeout(180)  # a process of its own opens nine folders
def test_stock_transformers_opens_every_mixture_of_codes_and_floats(tmp_path: Path) -> None:
    wanted, folders = [], []
    told = [("mixtral", case) for case in CASES]
    told += [("qwen2_moe", "all"), ("gpt_oss", "attention"), ("gpt_oss", "nothing"), ("mixtral", "nothing")]
    for family, case in told:
        candidate, model = opened(family, tmp_path / f"{family}-{case}")
        if case != "nothing":
            round_layers(candidate, model, FOUR, CASES[case])
        folders.append(written(candidate, tmp_path / f"{family}-{case}-artifact"))
        with torch.no_grad():
            wanted.append(candidate.module(ids(2)).logits)
    for which, found, logits in zip(told, stock_logits(folders, tmp_path), wanted, strict=True):
        torch.testing.assert_close(
            found, logits, rtol=1e-3, atol=1e-4, msg=lambda text, which=which: f"{which}: {text}"
        )


def test_the_config_names_experts_by_a_pattern(tmp_path: Path) -> None:
    candidate, model = opened("mixtral", tmp_path / "model")
    round_layers(candidate, model, FOUR, CASES["experts"])
    folder = written(candidate, tmp_path / "artifact")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert group["targets"] == [rf"re:^model\.layers\.{i}\.mlp\.experts\.\d+\..+$" for i in range(2)]
    held = load_file(folder / "model.safetensors")
    assert held["model.layers.0.mlp.experts.3.w1.weight_packed"].dtype == torch.int32
    assert held["model.layers.0.mlp.experts.3.w1.weight_scale"].dtype == torch.float32
    assert "model.layers.0.mlp.experts.gate_up_proj" not in held


@pytest.mark.parametrize("streamed", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("case", ["all", "attention"])
def test_the_folder_is_served_piece_by_piece(streamed: str, case: str, tmp_path: Path) -> None:
    candidate, model = opened(streamed, tmp_path / "model")
    round_layers(candidate, model, FOUR, CASES[case])
    folder = written(candidate, tmp_path / "artifact")
    inputs = {"input_ids": ids(2).numpy()}
    session = TorchFolder().open_streamed(folder, threads=1, task=TASK, budget=0)
    with torch.no_grad():
        wanted = candidate.module(ids(2)).logits
    np.testing.assert_allclose(session.run(inputs)["logits"], wanted, rtol=1e-3, atol=1e-4)


def chosen(model: ModelMap, spec: QuantSpec, wanted: Any) -> dict[str, QuantSpec]:
    return {layer.name: spec for layer in model.layers if layer.kind == "linear" and wanted(layer)}


def test_what_transformers_could_not_open_is_refused_beforehand(tmp_path: Path) -> None:
    torch_folder = TorchFolder()
    _, mixtral = opened("mixtral", tmp_path / "mixtral")
    _, gpt_oss = opened("gpt_oss", tmp_path / "gpt_oss")
    asymmetric = torch_folder.refusal("expert_up", (48, 32), QuantSpec(bits=4, symmetric=False), None)
    assert asymmetric is not None
    assert "zero points" in asymmetric
    assert torch_folder.refusal("up", (48, 32), QuantSpec(bits=4, symmetric=False), None) is None
    assert torch_folder.refusal_together(mixtral, chosen(mixtral, FOUR, CASES["all"])) is None
    assert torch_folder.refusal_together(mixtral, {}) is None
    assert torch_folder.refusal_together(gpt_oss, chosen(gpt_oss, FOUR, CASES["attention"])) is None
    stacked = torch_folder.refusal_together(gpt_oss, chosen(gpt_oss, FOUR, CASES["all"]))
    assert stacked is not None
    assert "model.layers.0.mlp.experts only as stacked floats" in stacked
    one = torch_folder.refusal_together(
        mixtral, chosen(mixtral, FOUR, lambda layer: layer.name.endswith("experts.1.w1"))
    )
    assert one is not None
    assert "model.layers.0.mlp.experts.0.w1 is one of 8 layers" in one
    mixed = chosen(mixtral, FOUR, CASES["experts"]) | chosen(mixtral, QuantSpec(bits=8), CASES["down"])
    two = torch_folder.refusal_together(mixtral, mixed)
    assert two is not None
    assert "the recipe has 2" in two


def test_a_stack_of_which_some_are_rounded_is_not_written(tmp_path: Path) -> None:
    candidate, model = opened("mixtral", tmp_path / "model")
    round_layers(candidate, model, FOUR, lambda layer: layer.name.endswith("experts.1.w1"))
    with pytest.raises(RuntimeUnavailable, match="holds 8 layers of which 7 are not quantized"):
        written(candidate, tmp_path / "artifact")


def test_runtimes_that_do_not_follow_experts_say_so(tmp_path: Path) -> None:
    _, mixtral = opened("mixtral", tmp_path / "mixtral")
    for name, missing in available_runtimes().items():
        if name not in ("torch", "onnxruntime") and missing is None:
            reason = get_runtime(name).refusal_together(mixtral, {})
            assert reason is not None
            assert "4 experts (model.layers.0.mlp.experts)" in reason
