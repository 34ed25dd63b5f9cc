"""Folders of FP8, MXFP4 and NVFP4 codes: stock transformers computes what was judged, and reads what was decided."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from gossamer.errors import RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.source import Source
from gossamer.plan.comparison import CAST_TOLERANCE, EXACT_TOLERANCE
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.torch_floats import codes_of, pack_pairs, patterns, unpack_pairs
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.runtimes.torch_streamed import FolderWeights
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

FP8, FP8_GROUPS = QuantSpec(bits=8, format="fp8"), QuantSpec(bits=8, format="fp8", group_size=16)
MXFP4, NVFP4 = QuantSpec(bits=4, format="mxfp4", group_size=32), QuantSpec(bits=4, format="nvfp4", group_size=16)
NF4 = QuantSpec(bits=4, format="nf4", group_size=16)
CASES = [
    (FP8, torch.float32),
    (FP8_GROUPS, torch.float32),
    (FP8, torch.bfloat16),
    (MXFP4, torch.bfloat16),
    (NVFP4, torch.bfloat16),
]
IDS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


def llama(tied: bool = False) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
        )
    )  # fmt: skip


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            initializer_range=0.2,
        )
    )  # fmt: skip


def make(model: PreTrainedModel, task: str, folder: Path, dtype: torch.dtype) -> tuple[Candidate, ExportRequest]:
    torch.manual_seed(0)
    model.init_weights()
    model.save_pretrained(folder / "source")
    source, found = Source.open(folder / "source"), get_task(task)
    request = ExportRequest(task=found, example=TEXT, axes={}, outputs=("logits",), cache=folder / "cache")
    candidate = Candidate(source=source, module=source.module(found), dtype=dtype)
    with torch.no_grad():
        for values in candidate.module.parameters():
            values.copy_(values.to(dtype))
    return candidate, request


def quantize(candidate: Candidate, spec: QuantSpec) -> None:
    for name, module in candidate.module.named_modules():
        if isinstance(module, nn.Linear) and name not in ("lm_head", "classifier"):
            codes = quantize_weight(module.weight.detach(), spec, scale="mse")
            candidate.set_quantized(f"{name}.weight", codes)


def written(candidate: Candidate, request: ExportRequest, folder: Path) -> Path:
    folder.mkdir()
    TorchFolder().write(candidate, folder, request)
    return folder


def expected(candidate: Candidate) -> np.ndarray[Any, Any]:
    """Return the logits in memory, computed in the folder's float type."""
    module = candidate.module.to(candidate.dtype)
    with torch.no_grad():
        return module(**{k: torch.from_numpy(v) for k, v in TEXT.items()}).logits.float().numpy()


def check(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    """Assert that outputs agree as far as `proof.py` asks of the runtime: nearly exactly, or to 16-bit arithmetic."""
    error = np.sqrt(np.square(np.asarray(found) - wanted).mean()) / np.std(wanted)
    assert error <= (EXACT_TOLERANCE if dtype == torch.float32 else CAST_TOLERANCE["bf16"])


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_codes_are_served_and_stored_as_decided(
    model: str, spec: QuantSpec, dtype: torch.dtype, tmp_path: Path
) -> None:
    build, task = {"llama": (llama, "causal-lm"), "bert": (bert, "text-classification")}[model]
    candidate, request = make(build(), task, tmp_path, dtype)
    quantize(candidate, spec)
    folder = written(candidate, request, tmp_path / "out")
    logits = TorchFolder().open(folder, threads=1, task=request.task).run(TEXT)["logits"]
    check(logits, expected(candidate), dtype)
    stored = {tensor.name: tensor for tensor in TorchFolder().stored_tensors(folder)}
    assert len(candidate.quantized) >= 7
    for name, codes in candidate.quantized.items():
        held = stored[name]
        assert (held.dtype, held.bits, held.symmetric) == (spec.format, spec.bits, True)
        assert held.group_size == spec.group_size
        assert held.shape == codes.shape
        assert held.bytes == TorchFolder().stored_bytes("q", held.shape, spec, 4)
        assert TorchFolder().refusal("q", held.shape, spec, None) is None
    assert sum(tensor.bytes for tensor in stored.values()) == sum(
        tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()
    )


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_values_come_back_exactly(spec: QuantSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    """Piece by piece they are the decided ones; through compressed-tensors too, but for FP8's scales in bfloat16."""
    candidate, request = make(llama(), "causal-lm", tmp_path, dtype)
    quantize(candidate, spec)
    folder = written(candidate, request, tmp_path / "out")
    weights = FolderWeights(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model(input_ids=torch.from_numpy(IDS))
    for name, codes in candidate.quantized.items():
        assert name in weights.names
        assert torch.equal(weights.read(name), codes.dequantize())
        served = model.get_parameter(name).data
        assert served.dtype == dtype
        rounding = 0.0 if spec.format != "fp8" or dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(served.float(), codes.dequantize(), rtol=rounding, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "dtype"), [CASES[0], *CASES[3:]], ids=str)
def test_a_fresh_process_needs_only_transformers(spec: QuantSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    candidate, request = make(llama(), "causal-lm", tmp_path, dtype)
    quantize(candidate, spec)
    folder = written(candidate, request, tmp_path / "out")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0, -1].tolist(), 'gossamer' in sys.modules)"
    )
    command = [sys.executable, "-I", "-c", program, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found.endswith("False")
    check(json.loads(found.removesuffix(" False")), expected(candidate)[0, -1], dtype)


def test_a_tied_fp8_table_is_stored_once(tmp_path: Path) -> None:
    candidate, request = make(llama(tied=True), "causal-lm", tmp_path, torch.float32)
    table = candidate.module.get_parameter("model.embed_tokens.weight").detach()
    candidate.set_quantized("model.embed_tokens.weight", quantize_weight(table, FP8))
    folder = written(candidate, request, tmp_path / "out")
    logits = TorchFolder().open(folder, threads=1, task=request.task).run(TEXT)["logits"]
    np.testing.assert_allclose(logits, expected(candidate), atol=1e-5)
    held = next(t for t in TorchFolder().stored_tensors(folder) if t.name == "model.embed_tokens.weight")
    assert (held.dtype, held.bits) == ("fp8", 8)
    assert held.bytes == TorchFolder().stored_bytes("embedding", (50, 64), FP8, 4, tied=True) == 50 * 64 + 2 * 50 * 2


def test_four_bit_floats_need_a_bf16_model(tmp_path: Path) -> None:
    candidate, request = make(llama(), "causal-lm", tmp_path, torch.float32)
    quantize(candidate, NVFP4)
    with pytest.raises(RuntimeUnavailable, match=r"cast: \{dtype: bf16\}"):
        written(candidate, request, tmp_path / "out")


def test_refusals_say_why() -> None:
    runtime = TorchFolder()
    assert "no place for nf4" in str(runtime.refusal("q", (32, 32), NF4, None))
    assert "packed embedding" in str(runtime.refusal("embedding", (50, 32), MXFP4, None))
    assert "integers" in str(runtime.refusal("q", (32, 32), FP8, ActivationSpec(kind="dynamic")))
    assert "does not divide" in str(runtime.refusal("q", (32, 48), MXFP4, None))
    assert runtime.refusal("embedding", (50, 32), FP8, None) is None
    assert runtime.refusal_beside(MXFP4, "fp16") is not None
    assert runtime.refusal_beside(MXFP4, "bf16") is None
    assert runtime.refusal_beside(FP8, "float32") is None


def test_patterns_are_torchs_own() -> None:
    every = torch.arange(-126, 127, dtype=torch.int8).reshape(11, 23)
    values: Tensor = patterns(every, 8).view(torch.float8_e4m3fn).float()
    assert torch.equal(values.flatten().sort().values, values.flatten())
    assert torch.equal(codes_of(patterns(every, 8), 8), every)
    nibbles = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    assert torch.equal(unpack_pairs(pack_pairs(nibbles)), nibbles)
