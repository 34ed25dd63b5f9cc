"""OpenVINO IR: the same codes, the same answers, and what the file holds read back from its constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.openvino import MODEL_FILE, OpenVino
from gossamer.tasks import get_task

pytest.importorskip("openvino")

IDS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
PIXELS = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}
STATIC = ActivationSpec(kind="static", low=-2.0, high=3.0)
SIGNED = ActivationSpec(kind="static", symmetric=True, low=-2.0, high=3.0)
LAYERS = (nn.Linear, nn.Conv2d)


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16))


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (llama, "causal-lm", TEXT),
    "bert": (bert, "text-classification", TEXT),
    "gpt2": (gpt2, "causal-lm", TEXT),
    "vit": (vit, "image-classification", PIXELS),
    "resnet": (resnet, "image-classification", PIXELS),
}


def nearest(weight: torch.Tensor, spec: QuantSpec, transposed: bool = False) -> Quantized:
    """Plain rounding, one loop over the groups of a row."""
    rows = (weight.t() if transposed else weight.flatten(1)).detach().float()
    size = spec.group_size or rows.shape[1]
    codes, scales, zero_points = [], [], []
    for group in rows.split(size, dim=1):
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        if spec.symmetric:
            scale, zero_point = torch.maximum(-low, high).clamp(min=1e-6) / spec.high, torch.zeros_like(low)
        else:
            scale = (high - low).clamp(min=1e-6) / (spec.high - spec.low)
            zero_point = torch.round(spec.low - low / scale)
        codes.append((torch.round(group / scale) + zero_point).clamp(spec.low, spec.high))
        scales.append(scale)
        zero_points.append(zero_point)
    zero_point = None if spec.symmetric else torch.cat(zero_points, 1).to(torch.int8)
    return Quantized(
        torch.cat(codes, 1).to(torch.int8), torch.cat(scales, 1), zero_point, spec, tuple(weight.shape), transposed
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def make(name: str, folder: Path, cache: Path, dtype: torch.dtype = torch.float32) -> tuple[Candidate, ExportRequest]:
    torch.manual_seed(0)
    build, task_name, example = MODELS[name]
    build().save_pretrained(folder / "source")
    source, task = Source.open(folder / "source"), get_task(task_name)
    axes = {key: {0: "batch"} if key == "pixel_values" else {0: "batch", 1: "tokens"} for key in example}
    request = ExportRequest(task=task, example=example, axes=axes, outputs=("logits",), cache=cache)
    return Candidate(source=source, module=source.module(task), dtype=dtype), request


def quantize(candidate: Candidate, spec: QuantSpec, activation: ActivationSpec | None = None) -> None:
    for name, module in candidate.module.named_modules():
        if isinstance(module, LAYERS) and name != "lm_head":
            fits = module.weight[0].numel() % (spec.group_size or 1) == 0
            candidate.set_quantized(f"{name}.weight", nearest(module.weight, spec if fits else QuantSpec(bits=8)))
            if activation is not None:
                candidate.activations[name] = activation


def written(candidate: Candidate, request: ExportRequest, folder: Path) -> Path:
    folder.mkdir()
    OpenVino().write(candidate, folder, request)
    return folder


def check(candidate: Candidate, request: ExportRequest, folder: Path, atol: float) -> None:
    found = OpenVino().open(folder, threads=1).run(request.example)["logits"]
    with torch.no_grad(), candidate.simulated() as module:
        expected = module(**{name: torch.from_numpy(array) for name, array in request.example.items()}).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=atol)
    stored = {tensor.name: tensor for tensor in OpenVino().stored_tensors(folder)}
    size = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}[candidate.dtype]
    for name, quantized in candidate.quantized.items():
        held, spec = stored[name], quantized.spec
        assert (held.bits, held.symmetric, held.group_size) == (spec.bits, spec.symmetric, spec.group_size)
        assert held.shape == quantized.shape
    for name, held in stored.items():
        spec = candidate.quantized[name].spec if name in candidate.quantized else None
        rows_first = held.shape[::-1] if spec and candidate.quantized[name].transposed else held.shape
        assert held.bytes == OpenVino().stored_bytes("q", rows_first, spec, size)
        if spec is None:
            assert held.bits == 8 * size


@pytest.mark.parametrize("model", ["llama", "bert", "vit", "resnet"])
@pytest.mark.parametrize(
    ("spec", "activation"),
    [
        (None, None),
        (QuantSpec(bits=8), None),
        (QuantSpec(bits=4, group_size=16, symmetric=False), None),
        (QuantSpec(bits=3, group_size=16), None),
        (QuantSpec(bits=7), STATIC),
    ],
    ids=str,
)
def test_the_model_s_answers(
    model: str, spec: QuantSpec | None, activation: ActivationSpec | None, tmp_path: Path, cache: Path
) -> None:
    candidate, request = make(model, tmp_path, cache)
    if spec is not None:
        quantize(candidate, spec, activation)
    # integer layers: a value that float noise moves over a rounding point moves the output by a step of a grid
    check(candidate, request, written(candidate, request, tmp_path / "out"), atol=1e-5 if activation is None else 2e-3)


def test_signed_input_grids(tmp_path: Path, cache: Path) -> None:
    candidate, request = make("bert", tmp_path, cache)
    quantize(candidate, QuantSpec(bits=7), SIGNED)
    check(candidate, request, written(candidate, request, tmp_path / "out"), atol=2e-3)


@pytest.mark.parametrize("spec", [QuantSpec(bits=8), QuantSpec(bits=4, group_size=16, symmetric=False)], ids=str)
def test_a_tied_table_is_stored_once(spec: QuantSpec, tmp_path: Path, cache: Path) -> None:
    candidate, request = make("llama", tmp_path, cache)
    with torch.no_grad():  # OpenVINO writes equal constants once: no two norms may be all ones
        for parameter in candidate.module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    table = candidate.module.get_parameter("model.embed_tokens.weight")
    candidate.set_quantized("model.embed_tokens.weight", nearest(table, spec))
    folder = written(candidate, request, tmp_path / "out")
    check(candidate, request, folder, atol=1e-5)
    assert (folder / MODEL_FILE).read_text().count('name="model.embed_tokens.weight"') == 1
    total = sum(tensor.bytes for tensor in OpenVino().stored_tensors(folder))
    assert total <= (folder / MODEL_FILE).with_suffix(".bin").stat().st_size <= total + 2048  # shapes, masks


def test_conv1d_weights(tmp_path: Path, cache: Path) -> None:
    candidate, request = make("gpt2", tmp_path, cache)
    for name in ("c_attn", "c_proj"):
        parameter = f"transformer.h.0.attn.{name}.weight"
        weight = candidate.module.get_parameter(parameter)
        candidate.set_quantized(parameter, nearest(weight, QuantSpec(bits=4, group_size=16), transposed=True))
    check(candidate, request, written(candidate, request, tmp_path / "out"), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_hold_16_bits(dtype: torch.dtype, tmp_path: Path, cache: Path) -> None:
    candidate, request = make("llama", tmp_path, cache, dtype)
    with torch.no_grad():
        for parameter in candidate.module.parameters():
            parameter.copy_(parameter.to(dtype).float())
    check(candidate, request, written(candidate, request, tmp_path / "out"), atol=4e-3)


def test_same_candidate_same_bytes(tmp_path: Path, cache: Path) -> None:
    candidate, request = make("llama", tmp_path, cache)
    quantize(candidate, QuantSpec(bits=7), STATIC)
    one, two = (written(candidate, request, tmp_path / name) for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert names == [MODEL_FILE.replace(".xml", ".bin"), MODEL_FILE]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_layers_that_share_an_input_share_its_rounding(tmp_path: Path, cache: Path) -> None:
    candidate, request = make("llama", tmp_path, cache)
    quantize(candidate, QuantSpec(bits=7), STATIC)
    text = (written(candidate, request, tmp_path / "out") / MODEL_FILE).read_text()
    assert text.count('type="FakeQuantize"') == 4  # before q, k, v; before o; before gate, up; before down


def test_codes_wider_than_claimed_are_found(tmp_path: Path, cache: Path) -> None:
    candidate, request = make("llama", tmp_path, cache)
    quantize(candidate, QuantSpec(bits=8))
    path = written(candidate, request, tmp_path / "out") / MODEL_FILE
    path.write_text(path.read_text().replace("&quot;bits&quot;: 8", "&quot;bits&quot;: 5"))
    with pytest.raises(ArtifactError, match="claims 5 bits"):
        OpenVino().stored_tensors(path.parent)


def test_refusals_say_why(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OpenVino()
    assert "its own grid" in str(runtime.refusal("q", (8, 8), QuantSpec(bits=8), ActivationSpec(kind="dynamic")))
    assert "symmetric" in str(runtime.refusal("q", (8, 8), QuantSpec(bits=7, symmetric=False), STATIC))
    assert "does not divide" in str(runtime.refusal("q", (8, 8), QuantSpec(bits=4, group_size=3), None))
    assert runtime.refusal("q", (8, 8), QuantSpec(bits=7), STATIC) is None
    monkeypatch.setattr("gossamer.measure.machine.processor", lambda: ("old", ("avx2", "fma")))
    assert "7-bit" in str(runtime.refusal("q", (8, 8), QuantSpec(bits=8), STATIC))
    monkeypatch.setattr("gossamer.measure.machine.processor", lambda: ("new", ("avx2", "avx_vnni")))
    assert runtime.refusal("q", (8, 8), QuantSpec(bits=8), STATIC) is None
    candidate, request = make("llama", tmp_path, cache)
    quantize(candidate, QuantSpec(bits=7), ActivationSpec(kind="dynamic"))
    with pytest.raises(RuntimeUnavailable, match="its own grid"):
        written(candidate, request, tmp_path / "out")


def test_a_folder_without_an_ir_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=MODEL_FILE):
        OpenVino().open(tmp_path, threads=1)
