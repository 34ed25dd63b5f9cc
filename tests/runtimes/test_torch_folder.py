"""The canonical folder: stock transformers computes what was judged, and the file holds what the recipe asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
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
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.tasks import get_task

IDS = np.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
PIXELS = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}
STATIC = ActivationSpec(kind="static", low=-2.0, high=3.0)


def llama(tied: bool = True) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        )
    )  # fmt: skip


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )


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
    "vit": (vit, "image-classification", PIXELS),
    "resnet": (resnet, "image-classification", PIXELS),
}


def random_codes(shape: tuple[int, ...], spec: QuantSpec, seed: int = 0) -> Quantized:
    """Codes that no rounding made: what is stored can only be these."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    groups = columns // spec.group_size if spec.group_size else 1
    codes = torch.randint(spec.low, spec.high + 1, (rows, columns), generator=generator).to(torch.int8)
    scale = ((torch.rand((rows, groups), generator=generator) + 0.5) * (0.1 / spec.high)).half()
    zero_point = None
    if not spec.symmetric:
        zero_point = torch.randint(spec.low, spec.high + 1, (rows, groups), generator=generator).to(torch.int8)
    return Quantized(codes, scale, zero_point, spec, shape)


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Candidate, ExportRequest]:
    torch.manual_seed(0)
    build, task_name, example = MODELS[name]
    build().save_pretrained(folder / "source")
    source, task = Source.open(folder / "source"), get_task(task_name)
    request = ExportRequest(task=task, example=example, axes={}, outputs=("logits",), cache=folder / "cache")
    return Candidate(source=source, module=source.module(task), dtype=dtype), request


def quantize(candidate: Candidate, spec: QuantSpec, activation: ActivationSpec | None = None) -> None:
    for index, (name, module) in enumerate(candidate.module.named_modules()):
        if isinstance(module, nn.Linear) and name not in ("lm_head", "classifier", "bert.pooler.dense"):
            candidate.set_quantized(f"{name}.weight", random_codes(tuple(module.weight.shape), spec, index))
            if activation is not None:
                candidate.activations[name] = activation


def written(candidate: Candidate, request: ExportRequest, folder: Path) -> Path:
    folder.mkdir()
    TorchFolder().write(candidate, folder, request)
    return folder


def served(folder: Path, request: ExportRequest) -> np.ndarray[Any, Any]:
    return TorchFolder().open(folder, threads=1, task=request.task).run(request.example)["logits"]


def simulated(candidate: Candidate, request: ExportRequest) -> np.ndarray[Any, Any]:
    with torch.no_grad(), candidate.simulated() as module:
        return module(**{k: torch.from_numpy(v) for k, v in request.example.items()}).logits.numpy()


@pytest.mark.parametrize("model", MODELS)
def test_unquantized_folder_computes_the_same(model: str, tmp_path: Path) -> None:
    candidate, request = make(model, tmp_path)
    folder = written(candidate, request, tmp_path / "out")
    np.testing.assert_allclose(served(folder, request), simulated(candidate, request), atol=1e-6)
    stored = {tensor.name: tensor for tensor in TorchFolder().stored_tensors(folder)}
    for name, parameter in candidate.module.named_parameters():
        assert (stored[name].bits, stored[name].bytes) == (32, 4 * parameter.numel())


@pytest.mark.parametrize(
    ("spec", "activation"),
    [
        *[(QuantSpec(bits=bits, group_size=16), None) for bits in (2, 3, 4, 5, 6, 7, 8)],
        (QuantSpec(bits=4), None),
        (QuantSpec(bits=4, symmetric=False, group_size=16), None),
        (QuantSpec(bits=3, symmetric=False), None),
        (QuantSpec(bits=8), ActivationSpec(kind="dynamic")),
        (QuantSpec(bits=7, symmetric=False), ActivationSpec(kind="dynamic", scope="token")),
        (QuantSpec(bits=8), STATIC),
        (QuantSpec(bits=8), ActivationSpec(kind="static", symmetric=True, low=-2.0, high=3.0)),
    ],
    ids=str,
)
def test_codes_are_served_and_stored_as_decided(
    spec: QuantSpec, activation: ActivationSpec | None, tmp_path: Path
) -> None:
    candidate, request = make("llama", tmp_path)
    quantize(candidate, spec, activation)
    folder = written(candidate, request, tmp_path / "out")
    np.testing.assert_allclose(served(folder, request), simulated(candidate, request), atol=1e-5)
    stored = {tensor.name: tensor for tensor in TorchFolder().stored_tensors(folder)}
    assert len(candidate.quantized) == 14
    for name, quantized in candidate.quantized.items():
        held = stored[name]
        assert (held.bits, held.symmetric, held.group_size) == (spec.bits, spec.symmetric, spec.group_size)
        assert held.shape == quantized.shape
        assert held.bytes == TorchFolder().stored_bytes("q", held.shape, spec, 4, activation=activation)
        assert TorchFolder().refusal("q", held.shape, spec, activation) is None


@pytest.mark.parametrize("model", ["bert", "vit"])
def test_encoders(model: str, tmp_path: Path) -> None:
    candidate, request = make(model, tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=16), None)
    folder = written(candidate, request, tmp_path / "out")
    np.testing.assert_allclose(served(folder, request), simulated(candidate, request), atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_takes_8_bits_per_code(bits: int, tmp_path: Path) -> None:
    candidate, request = make("bert", tmp_path)
    spec = QuantSpec(bits=bits, group_size=16)
    name = "bert.embeddings.word_embeddings.weight"
    candidate.set_quantized(name, random_codes((50, 32), spec))
    folder = written(candidate, request, tmp_path / "out")
    np.testing.assert_allclose(served(folder, request), simulated(candidate, request), atol=1e-5)
    held = next(tensor for tensor in TorchFolder().stored_tensors(folder) if tensor.name == name)
    assert (held.dtype, held.bits, held.group_size) == ("int8", bits, 16)
    assert held.bytes == TorchFolder().stored_bytes("embedding", (50, 32), spec, 4) == 50 * 32 + 50 * 2 * 2


@pytest.mark.parametrize("spec", [QuantSpec(bits=8), QuantSpec(bits=4, group_size=16, symmetric=False)], ids=str)
def test_a_tied_table_is_stored_once(spec: QuantSpec, tmp_path: Path) -> None:
    candidate, request = make("llama", tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=16))
    candidate.set_quantized("model.embed_tokens.weight", random_codes((50, 32), spec))
    folder = written(candidate, request, tmp_path / "out")
    np.testing.assert_allclose(served(folder, request), simulated(candidate, request), atol=1e-5)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.int8
    assert not any(name in tensors for name in ("lm_head.weight", "lm_head.weight_packed"))
    stored = {tensor.name: tensor for tensor in TorchFolder().stored_tensors(folder)}
    held = stored["model.embed_tokens.weight"]
    assert "lm_head.weight" not in stored
    assert (held.dtype, held.bits) == ("int8", spec.bits)
    assert held.bytes == TorchFolder().stored_bytes("embedding", (50, 32), spec, 4, tied=True)
    assert sum(tensor.bytes for tensor in stored.values()) == sum(t.nbytes for t in tensors.values())


def test_mixed_settings_in_one_folder(tmp_path: Path) -> None:
    candidate, request = make("llama", tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=16))
    up, down = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
    candidate.set_quantized(f"{up}.weight", random_codes((64, 32), QuantSpec(bits=8)))
    candidate.activations[up] = STATIC
    candidate.set_quantized(f"{down}.weight", random_codes((32, 64), QuantSpec(bits=3, symmetric=False)))
    folder = written(candidate, request, tmp_path / "out")
    np.testing.assert_allclose(served(folder, request), simulated(candidate, request), atol=1e-5)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["model.embed_tokens", "lm_head"]
    assert sorted(group["weights"]["num_bits"] for group in config["config_groups"].values()) == [3, 4, 8]


@pytest.mark.slow
def test_a_fresh_process_needs_only_transformers(tmp_path: Path) -> None:
    candidate, request = make("llama", tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=16))
    folder = written(candidate, request, tmp_path / "out")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0, -1, :3].tolist(), 'gossamer' in sys.modules)"
    )
    command = [sys.executable, "-I", "-c", program, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    expected = simulated(candidate, request)[0, -1, :3]
    assert found.endswith("False")
    np.testing.assert_allclose(json.loads(found.removesuffix(" False")), expected, atol=1e-5)


def test_weights_are_unpacked_once(tmp_path: Path) -> None:
    candidate, request = make("llama", tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=16))
    model = AutoModelForCausalLM.from_pretrained(written(candidate, request, tmp_path / "out"))
    layer = model.model.layers[0].mlp.up_proj
    assert "weight_packed" in dict(layer.named_parameters())
    model(input_ids=torch.from_numpy(IDS))
    first = layer.weight
    model(input_ids=torch.from_numpy(IDS))
    assert layer.weight is first
    assert first.dtype == torch.float32
    torch.testing.assert_close(first.data, candidate.quantized["model.layers.0.mlp.up_proj.weight"].dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts(dtype: torch.dtype, tmp_path: Path) -> None:
    candidate, request = make("llama", tmp_path, dtype)
    folder = written(candidate, request, tmp_path / "out")
    expected = candidate.module.to(dtype)(input_ids=torch.from_numpy(IDS)).logits.float().detach().numpy()
    logits = served(folder, request)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=4e-3)
    assert {tensor.bits for tensor in TorchFolder().stored_tensors(folder)} == {16}


def test_config_is_readable_by_transformers_4_and_5(tmp_path: Path) -> None:
    candidate, request = make("llama", tmp_path)
    config = json.loads((written(candidate, request, tmp_path / "out") / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e4
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_same_candidate_same_bytes(tmp_path: Path) -> None:
    candidate, request = make("llama", tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=16), STATIC)
    one = written(candidate, request, tmp_path / "one")
    # a killed run puts codes back in another order, and so do several processes
    candidate.quantized = dict(reversed(candidate.quantized.items()))
    two = written(candidate, request, tmp_path / "two")
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_own_folder_runs_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "own")
    request = ExportRequest(get_task("causal-lm"), TEXT, {}, ("logits",), tmp_path)
    expected = model.float()(input_ids=torch.from_numpy(IDS)).logits.detach().numpy()
    np.testing.assert_allclose(served(tmp_path / "own", request), expected, atol=1e-6)


def test_refusals_say_why() -> None:
    runtime, spec = TorchFolder(), QuantSpec(bits=8)
    assert "convolution" in str(runtime.refusal("convolution", (8, 3, 3, 3), spec, None))
    assert "127.5" in str(runtime.refusal("q", (8, 8), spec, ActivationSpec(kind="dynamic", symmetric=True)))
    assert "row numbers" in str(runtime.refusal("embedding", (8, 8), spec, STATIC))
    assert "does not divide" in str(runtime.refusal("q", (8, 8), QuantSpec(bits=4, group_size=3), None))
    assert runtime.refusal("embedding", (8, 8), spec, None) is None
    assert "more than row numbers" in str(runtime.refusal("positions", (8, 8), spec, None))


def test_a_convolution_is_refused_when_written(tmp_path: Path) -> None:
    candidate, request = make("resnet", tmp_path)
    name, module = next((n, m) for n, m in candidate.module.named_modules() if isinstance(m, nn.Conv2d))
    candidate.set_quantized(f"{name}.weight", random_codes(tuple(module.weight.shape), QuantSpec(bits=8)))
    with pytest.raises(RuntimeUnavailable, match="Conv2d"):
        written(candidate, request, tmp_path / "out")


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    candidate, request = make("bert", tmp_path)
    folder = written(candidate, request, tmp_path / "out")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="does not open"):
        TorchFolder().open(folder, threads=1, task=request.task)
    with pytest.raises(ArtifactError, match=r"neither config\.json"):
        TorchFolder().open(tmp_path, threads=1, task=request.task)


def test_missing_weights_are_not_invented(tmp_path: Path) -> None:
    candidate, request = make("bert", tmp_path)
    folder = written(candidate, request, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"classifier\.weight"):
        TorchFolder().open(folder, threads=1, task=request.task)


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.runtimes.torch_folder.MAX_SHARD_BYTES", 10_000)
    candidate, request = make("llama", tmp_path)
    quantize(candidate, QuantSpec(bits=4, group_size=16))
    folder = written(candidate, request, tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 1
    np.testing.assert_allclose(served(folder, request), simulated(candidate, request), atol=1e-5)
