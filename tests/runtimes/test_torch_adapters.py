"""Adapters in every kind of file: stock transformers with `peft`, graphs, and who has no place for them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.errors import ArtifactError
from gossamer.models.adapters import adapted_map, put_adapter
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.plan.comparison import compare_tensors
from gossamer.runtimes import get_runtime
from gossamer.runtimes.base import ExportRequest
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

IDS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
LAYERS = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.down_proj": 3, "model.layers.1.mlp.up_proj": 4}
SPEC = QuantSpec(bits=4, group_size=16)


def made(folder: Path, activation: ActivationSpec | None = None) -> tuple[Candidate, ExportRequest]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    source, task = Source.open(folder / "source"), get_task("causal-lm")
    candidate = Candidate(source=source, module=source.module(task))
    for name, module in list(candidate.module.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            codes = quantize_weight(module.weight.detach(), SPEC, scale="mse", transposed=False, name=name)
            candidate.set_quantized(f"{name}.weight", codes)
            if activation is not None:
                candidate.activations[name] = activation
    for name, rank in LAYERS.items():
        outputs, inputs = candidate.module.get_submodule(name).weight.shape
        put_adapter(candidate.module, name, torch.randn(outputs, rank) / 4, torch.randn(rank, inputs) / 4)
    axes = {name: {0: "batch", 1: "sequence"} for name in TEXT}
    request = ExportRequest(task=task, example=TEXT, axes=axes, outputs=("logits",), cache=folder / "cache")
    (folder / "out").mkdir()
    return candidate, request


def expected(candidate: Candidate) -> np.ndarray[Any, Any]:
    with candidate.simulated() as module, torch.no_grad():
        found: np.ndarray[Any, Any] = module(**{n: torch.from_numpy(v) for n, v in TEXT.items()}).logits.numpy()
    return found


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino", "torchscript"])
def test_an_opened_file_computes_with_them(runtime: str, tmp_path: Path) -> None:
    if get_runtime(runtime).missing():
        pytest.skip(f"{runtime} is not installed")
    candidate, request = made(tmp_path)
    if runtime == "torchscript":
        candidate.quantized.clear()
    get_runtime(runtime).write(candidate, tmp_path / "out", request)
    session = get_runtime(runtime).open(tmp_path / "out", threads=1, task=request.task)
    plain = expected(dataclasses.replace(candidate, module=Source.open(tmp_path / "source").module(request.task)))
    found, wanted = session.run(TEXT)["logits"], expected(candidate)
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert np.abs(plain - wanted).max() > 0.05


def test_their_tensors_are_read_back_and_counted(tmp_path: Path) -> None:
    candidate, request = made(tmp_path)
    runtime = get_runtime("torch")
    runtime.write(candidate, tmp_path / "out", request)
    source = candidate.source.module(request.task)
    model = map_model(source, {n: torch.from_numpy(v) for n, v in TEXT.items()}, candidate.source.forward)
    after = adapted_map(model, LAYERS)
    stored = {tensor.name: tensor for tensor in runtime.stored_tensors(tmp_path / "out")}
    thin = {f"{layer.name}.weight": layer.shape for layer in after.layers if layer.role == "adapter"}
    assert {name: stored[name].shape for name in thin} == thin
    assert all(stored[name].bits == 16 for name in thin)
    rows = {row.parameter: row for row in compare_tensors(after, [], list(stored.values()))}
    assert all(rows[name].agrees and rows[name].asked == "thin layer" for name in thin)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not any("lora_" in name for name in config["quantization_config"]["ignore"])


def test_stock_transformers_and_peft_open_it(tmp_path: Path) -> None:
    candidate, request = made(tmp_path)
    runtime = get_runtime("torch")
    runtime.write(candidate, tmp_path / "out", request)
    code = runtime.load_snippet(request.task) + runtime.load_more(tmp_path / "out")
    code = code.replace("path/to/folder", str(tmp_path / "out"))
    lines = [line for line in code.splitlines() if not line.startswith("logits")]
    script = "\n".join(
        [
            *lines,
            "import sys, torch, numpy",
            f"ids = torch.tensor({IDS.tolist()})",
            "with torch.no_grad():",
            "    found = model(input_ids=ids).logits.float().numpy()",
            f"numpy.save({str(tmp_path / 'found.npy')!r}, found)",
            "assert 'gossamer' not in sys.modules",
        ]
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected(candidate), atol=2e-3)


def test_the_same_decisions_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        candidate, request = made(tmp_path / name)
        get_runtime("torch").write(candidate, tmp_path / name / "out", request)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a/out").rglob("*") if path.is_file()]
    assert any(path.name == "adapter_config.json" for path in files)
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)


def test_a_folder_with_an_adapter_is_not_served_piece_by_piece(tmp_path: Path) -> None:
    candidate, request = made(tmp_path)
    get_runtime("torch").write(candidate, tmp_path / "out", request)
    with pytest.raises(ArtifactError, match="has an adapter, which is not served piece by piece"):
        get_runtime("torch").open_streamed(tmp_path / "out", threads=1, task=request.task, budget=1 << 20)


def test_a_damaged_adapter_is_told_and_nobody_looks_for_pickles_or_on_the_hub(tmp_path: Path) -> None:
    candidate, request = made(tmp_path)
    runtime, held = get_runtime("torch"), tmp_path / "out/adapter"
    runtime.write(candidate, tmp_path / "out", request)
    whole = (held / "adapter_model.safetensors").read_bytes()
    (held / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="adapter does not open"):
        runtime.open(tmp_path / "out", threads=1, task=request.task)
    (held / "adapter_model.safetensors").rename(held / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"has no adapter_model\.safetensors"):
        runtime.open(tmp_path / "out", threads=1, task=request.task)
