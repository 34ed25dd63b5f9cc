"""GGUF files: the gguf package reads the candidate's own numbers from them; llama.cpp computes the same model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.gguf_blocks import FORMATS
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.gguf import MODEL_FILE, Gguf
from gossamer.runtimes.gguf_model import pair_order
from gossamer.tasks import get_task
from gossamer.techniques.quantize.gguf_solve import solve

gguf = pytest.importorskip("gguf")
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, which compiles llama.cpp, is not installed"
)

IDS = np.array([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]])
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "linear": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LINEAR)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
}
SPECS = [
    QuantSpec(bits=8, group_size=32),
    QuantSpec(bits=8),
    QuantSpec(bits=4, group_size=32),
    QuantSpec(bits=4, group_size=32, symmetric=False),
    QuantSpec(bits=5, symmetric=False),
]


def rounded_inputs(inputs: Tensor, block: int) -> Tensor:
    """Round to 8 bits as llama.cpp rounds what it multiplies with weights in blocks (Q8_0; Q8_K for blocks of 256)."""
    blocks = inputs.unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / scales.clamp(min=1e-30))
    return (codes * (scales.half().float() if block == 32 else scales)).flatten(-2)


def nearest(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Plain rounding."""
    groups = weight.detach().unflatten(1, (-1, spec.group_size or weight.shape[1]))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if spec.symmetric:
        scale, zero = torch.maximum(-low, high) / spec.high, torch.zeros_like(low)
    else:
        scale = (high - low) / (spec.high - spec.low)
        zero = torch.round(spec.low - low / scale)
    codes = (groups / scale.unsqueeze(2)).round().add(zero.unsqueeze(2)).clamp(spec.low, spec.high)
    zero_point = None if spec.symmetric else zero.to(torch.int8)
    return Quantized(codes.flatten(1).to(torch.int8), scale, zero_point, spec, tuple(weight.shape))


def make(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Candidate, ExportRequest]:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are not all alike, weights that say something
            parameter.add_(torch.randn(parameter.shape) * 0.08)
    model.save_pretrained(folder / "source")
    source, task = Source.open(folder / "source"), get_task("causal-lm")
    example = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    request = ExportRequest(task, example, {}, ("logits",), folder / "cache")
    return Candidate(source=source, module=source.module(task), dtype=dtype), request


def quantize(candidate: Candidate, spec: QuantSpec) -> None:
    for name, parameter in list(candidate.module.named_parameters()):
        if parameter.dim() == 2:
            candidate.set_quantized(name, nearest(parameter, spec))


def written(candidate: Candidate, request: ExportRequest, folder: Path) -> Path:
    folder.mkdir()
    Gguf().write(candidate, folder, request)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a file as the gguf package decodes it, by its name in the file."""
    reader = gguf.GGUFReader(folder / MODEL_FILE)
    return {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }


def old_order(stored: Tensor, heads: int) -> Tensor:
    """Undo the order of query and key rows, one row at a time."""
    size = stored.shape[0] // heads
    rows = [None] * stored.shape[0]
    for head in range(heads):
        for pair in range(size // 2):
            rows[head * size + pair] = stored[head * size + 2 * pair]
            rows[head * size + pair + size // 2] = stored[head * size + 2 * pair + 1]
    return torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_file_holds_the_candidate_s_numbers(spec: QuantSpec, tmp_path: Path) -> None:
    candidate, request = make(MODELS["llama"](), tmp_path)
    quantize(candidate, spec)
    folder = written(candidate, request, tmp_path / "out")
    found = read(folder)
    places = {
        "blk.1.attn_q.weight": ("model.layers.1.self_attn.q_proj.weight", 4),
        "blk.1.attn_k.weight": ("model.layers.1.self_attn.k_proj.weight", 2),
        "blk.0.attn_v.weight": ("model.layers.0.self_attn.v_proj.weight", 0),
        "blk.0.attn_output.weight": ("model.layers.0.self_attn.o_proj.weight", 0),
        "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", 0),
        "blk.1.attn_norm.weight": ("model.layers.1.input_layernorm.weight", 0),
        "output_norm.weight": ("model.norm.weight", 0),
        "token_embd.weight": ("model.embed_tokens.weight", 0),
    }
    assert "output.weight" not in found  # tied: written once
    assert len(found) == len(list(candidate.module.parameters()))
    for stored_name, (parameter, heads) in places.items():
        stored = old_order(found[stored_name], heads) if heads else found[stored_name]
        expected = candidate.module.get_parameter(parameter).detach()
        if parameter in candidate.quantized and spec.symmetric:
            quantized = candidate.quantized[parameter]
            halves = Quantized(quantized.codes, quantized.scale.half().float(), None, spec, quantized.shape)
            assert torch.equal(stored, halves.dequantize())
        tolerance = 2.0**-10 * float(expected.abs().max()) if parameter in candidate.quantized else 0.0
        torch.testing.assert_close(stored, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(bits=3, group_size=64), QuantSpec(bits=7)], ids=str)
def test_the_file_says_which_grid_it_holds(spec: QuantSpec, tmp_path: Path) -> None:
    candidate, request = make(MODELS["qwen2"](), tmp_path)
    for name, parameter in list(candidate.module.named_parameters()):
        if parameter.dim() == 2 and parameter.shape[1] % (spec.group_size or 1) == 0:
            candidate.set_quantized(name, nearest(parameter, spec))
    stored = {tensor.name: tensor for tensor in Gguf().stored_tensors(written(candidate, request, tmp_path / "out"))}
    assert stored.keys() == dict(candidate.module.named_parameters()).keys()
    for name, held in stored.items():
        found = candidate.quantized.get(name)
        assert held.shape == candidate.module.get_parameter(name).shape
        assert held.bytes == Gguf().stored_bytes("q", held.shape, found.spec if found else None, 4)
        if found is not None:
            assert (held.bits, held.symmetric, held.group_size) == (spec.bits, spec.symmetric, spec.group_size)
            assert Gguf().refusal("q", held.shape, spec, None) is None
    total = (tmp_path / "out" / MODEL_FILE).stat().st_size
    assert 0 < total - sum(tensor.bytes for tensor in stored.values()) < 8192  # names and sizes


def test_a_false_claim_is_found(tmp_path: Path) -> None:
    candidate, request = make(MODELS["llama"](), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    quantized = nearest(candidate.module.get_parameter(name), QuantSpec(bits=4, group_size=32))
    claims = {"8-bit": QuantSpec(bits=3, group_size=32), "one scale": QuantSpec(bits=4)}
    for index, spec in enumerate(claims.values()):
        candidate.quantized[name] = Quantized(quantized.codes, quantized.scale, None, spec, quantized.shape)
        folder = written(candidate, request, tmp_path / str(index))
        with pytest.raises(ArtifactError, match="claims"):
            Gguf().stored_tensors(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts(dtype: torch.dtype, tmp_path: Path) -> None:
    candidate, request = make(MODELS["llama"](), tmp_path, dtype)
    folder = written(candidate, request, tmp_path / "out")
    for tensor in Gguf().stored_tensors(folder):
        assert tensor.bits == (16 if len(tensor.shape) == 2 else 32)
        assert tensor.bytes == Gguf().stored_bytes("q", tensor.shape, None, 2)
    expected = candidate.module.get_parameter("model.layers.0.mlp.up_proj.weight").to(dtype).float()
    assert torch.equal(read(folder)["blk.0.ffn_up.weight"], expected.detach())


@pytest.mark.parametrize("name", FORMATS)
def test_solved_blocks_go_in_as_they_are(name: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}))
    candidate, request = make(model, tmp_path)
    form = FORMATS[name]
    for parameter, weight in list(candidate.module.named_parameters()):
        if weight.dim() == 2:
            rows = solve(weight.detach(), form)
            codes = Quantized.of_blocks(rows, form, tuple(weight.shape), transposed=False)
            candidate.set_quantized(parameter, codes)
    folder = written(candidate, request, tmp_path / "out")
    found = read(folder)
    for stored_name, parameter, heads in (
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 4),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", 2),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", 0),
        ("token_embd.weight", "model.embed_tokens.weight", 0),
    ):
        held = old_order(found[stored_name], heads) if heads else found[stored_name]
        assert torch.equal(held, candidate.module.get_parameter(parameter).detach())
    stored = {tensor.name: tensor for tensor in Gguf().stored_tensors(folder)}
    spec = QuantSpec.of_block(form)
    for parameter in candidate.quantized:
        one = stored[parameter]
        assert (one.dtype, one.bits, one.group_size, one.symmetric) == (
            spec.format, spec.bits, spec.group_size, spec.symmetric
        )  # fmt: skip
        assert one.bytes == Gguf().stored_bytes("q", one.shape, spec, 4)
        assert Gguf().refusal("q", one.shape, spec, None) is None


def test_codes_that_no_block_holds_are_refused(tmp_path: Path) -> None:
    candidate, request = make(MODELS["llama"](), tmp_path)
    spec = QuantSpec(bits=4, group_size=16)
    name = "model.layers.1.self_attn.q_proj.weight"
    candidate.set_quantized(name, nearest(candidate.module.get_parameter(name), spec))
    assert "multiple" in str(Gguf().refusal("q", (64, 64), spec, None))
    with pytest.raises(RuntimeUnavailable, match=r"int4 symmetric group 16 codes of model\.layers\.1"):
        written(candidate, request, tmp_path / "out")
    assert "256 weights, which do not divide 64" in str(
        Gguf().refusal("q", (64, 64), QuantSpec.of_block(FORMATS["Q4_K"]), None)
    )


def test_equal_candidates_give_equal_bytes(tmp_path: Path) -> None:
    candidate, request = make(MODELS["qwen3"](), tmp_path)
    quantize(candidate, SPECS[2])
    first, second = (written(candidate, request, tmp_path / name) / MODEL_FILE for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_refusals(tmp_path: Path) -> None:
    runtime = Gguf()
    assert "rounds the inputs" in str(runtime.refusal("q", (64, 64), None, ActivationSpec(kind="dynamic")))
    assert "divide" in str(runtime.refusal("q", (64, 48), QuantSpec(bits=8), None))
    assert "mxfp4" in str(runtime.refusal("q", (64, 64), QuantSpec(bits=4, group_size=32, format="mxfp4"), None))
    assert "asymmetric" in str(runtime.refusal("q", (64, 64), QuantSpec(bits=8, symmetric=False), None))
    assert "matrices" in str(runtime.refusal("convolution", (8, 4, 3, 3), QuantSpec(bits=8), None))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16))
    candidate, request = make(gpt2, tmp_path)
    with pytest.raises(RuntimeUnavailable, match="llama, mistral, qwen2, qwen3"):
        runtime.write(candidate, tmp_path, request)
    with pytest.raises(ArtifactError, match=MODEL_FILE):
        runtime.stored_tensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "rope", "message"),
    [
        ("llama", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "yarn"),
        ("qwen2", LLAMA3, "llama3"),
    ],
)
def test_positions_that_the_file_cannot_say(name: str, rope: dict[str, Any], message: str, tmp_path: Path) -> None:
    candidate, request = make(MODELS[name](), tmp_path)
    candidate.module.config.rope_parameters = rope  # type: ignore[union-attr]
    with pytest.raises(RuntimeUnavailable, match=message):
        Gguf().write(candidate, tmp_path, request)


def test_a_block_of_another_size_is_refused(tmp_path: Path) -> None:
    candidate, request = make(MODELS["llama"](), tmp_path)
    candidate.module.get_submodule("model.layers.1.mlp").up_proj = nn.Linear(64, 32, bias=False)
    with pytest.raises(RuntimeUnavailable, match="32 rows where the config says 96"):
        Gguf().write(candidate, tmp_path, request)


def test_pairs_of_a_head_become_neighbours() -> None:
    assert pair_order(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@needs_llama
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(name: str, tmp_path: Path) -> None:
    candidate, request = make(MODELS[name](), tmp_path)
    found = Gguf().open(written(candidate, request, tmp_path / "out"), threads=1).run(request.example)["logits"]
    with torch.no_grad():
        expected = candidate.module(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(expected).max()))


@needs_llama
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_llama_cpp_computes_with_the_codes(spec: QuantSpec, tmp_path: Path) -> None:
    candidate, request = make(MODELS["llama"](), tmp_path)
    quantize(candidate, spec)
    found = Gguf().open(written(candidate, request, tmp_path / "out"), threads=1).run(request.example)["logits"]
    with torch.no_grad():
        expected = candidate.module(torch.from_numpy(IDS)).logits.numpy()
    assert np.square(found - expected).mean() < np.square(0.03 * expected.std())  # inputs are rounded to 8 bits


@needs_llama
@pytest.mark.parametrize("name", FORMATS)
def test_llama_cpp_computes_with_solved_blocks(name: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}))
    candidate, request = make(model, tmp_path)
    for parameter, weight in list(candidate.module.named_parameters()):
        if weight.dim() == 2:
            rows = solve(weight.detach(), FORMATS[name])
            codes = Quantized.of_blocks(rows, FORMATS[name], tuple(weight.shape), transposed=False)
            candidate.set_quantized(parameter, codes)
    found = Gguf().open(written(candidate, request, tmp_path / "out"), threads=1).run(request.example)["logits"]
    for module in candidate.module.modules():
        if isinstance(module, nn.Linear):  # llama.cpp rounds what comes in, which alone moves logits by 2 to 3 %
            module.register_forward_pre_hook(lambda _, inputs: (rounded_inputs(inputs[0], FORMATS[name].size),))
    with torch.no_grad():
        expected = candidate.module(torch.from_numpy(IDS)).logits.numpy()
    bound = 0.03 if name in ("Q4_1", "Q5_1") else 0.01  # these two meet inputs in a format of their own
    assert np.square(found - expected).mean() < np.square(bound * expected.std())


@needs_llama
def test_hidden_positions_and_long_rows(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 1024}))
    candidate, request = make(model, tmp_path)
    session = Gguf().open(written(candidate, request, tmp_path / "out"), threads=1)
    alone = session.run({"input_ids": IDS[:1, :4]})["logits"]
    ids, mask = np.stack([IDS[0], np.roll(IDS[0], 3)]), np.ones_like(IDS)
    mask[0, 4:], mask[1, :3] = 0, 0
    found = session.run({"input_ids": ids, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(found[0, :4], alone[0], atol=1e-5)
    np.testing.assert_allclose(found[1, 3:], alone[0], atol=1e-5)
    assert not found[0, 4:].any()
    row = np.random.default_rng(0).integers(0, 64, (1, 600))  # longer than what is computed at a time
    with torch.no_grad():
        expected = candidate.module(torch.from_numpy(row)).logits.numpy()
    np.testing.assert_allclose(session.run({"input_ids": row})["logits"], expected, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="the binding is installed here")
def test_opening_without_the_binding_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"GGUF")
    with pytest.raises(RuntimeUnavailable) as error:
        Gguf().open(tmp_path, threads=1)
    assert 'pip install "gossamer[gguf]"' in error.value.hint
