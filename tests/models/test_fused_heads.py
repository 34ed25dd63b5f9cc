"""Heads in fused queries, keys and values: in which order they lie is found, cut they compute what they did masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gossamer.models.attention import fused_attention
from gossamer.models.candidate import Candidate
from gossamer.models.channel_trials import mask
from gossamer.models.reduction import reduced, shrink_in_place
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.runtimes import get_runtime
from gossamer.runtimes.base import ExportRequest
from gossamer.tasks import get_task

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SHORT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, "bos_token_id": 0,
         "eos_token_id": 1}  # fmt: skip
ROW = {"input_ids": torch.arange(12)[None]}


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SHORT))


def phi3() -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(num_key_value_heads=2, **SIZES))


def neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES))


def bloom() -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64))


def falcon() -> nn.Module:
    grouped = {"num_kv_heads": 2, "new_decoder_architecture": True}
    return hf.FalconForCausalLM(hf.FalconConfig(**SIZES, **grouped))


def big_code() -> nn.Module:
    return hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**SHORT))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = build().eval()
    with torch.no_grad():
        for values in module.parameters():  # biases that start at 0 would hide what is left out
            values.add_(0.05 * torch.randn_like(values))
    return module


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        found = module(**ROW).logits
    assert isinstance(found, Tensor)
    return found


def places(model: ModelMap) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return the heads of each attention, and where the fused rows of the first lie: (first, how many)."""
    return [
        (one.size, [(member.offset, member.unit) for member in one.members if member.parameter.endswith("weight")][:-1])
        for one in model.dimensions
        if one.kind == "heads"
    ]


@pytest.mark.parametrize(
    ("build", "size", "rows"),
    [
        (gpt2, 4, [(0, 8), (32, 8), (64, 8)]),
        (phi3, 2, [(0, 16), (32, 8), (48, 8)]),
        (neox, 4, [(0, 24)]),
    ],
)
def test_orders_are_told_apart_and_cut_heads_are_masked_ones(
    build: Callable[[], nn.Module], size: int, rows: list[tuple[int, int]]
) -> None:
    module = made(build)
    model = map_model(module, ROW)
    assert places(model) == [(size, rows)] * 2
    heads = [one for one in model.dimensions if one.kind == "heads"]
    uneven = {heads[0]: list(range(1, size)), heads[1]: [size - 1]}
    masked, cut = copy.deepcopy(module), copy.deepcopy(module)
    mask(masked, uneven)
    shrink_in_place(cut, uneven)
    assert not torch.allclose(logits(masked), logits(module), atol=1e-3)
    torch.testing.assert_close(logits(cut), logits(masked), rtol=1e-4, atol=1e-5)
    count = "n_head" if build is gpt2 else "num_attention_heads"
    assert getattr(cut.config, count) == 4, "the model's own config stays as it is"


def test_attentions_with_heads_of_their_own_still_follow_the_model_s_kernel() -> None:
    module = made(gpt2)
    module.set_attn_implementation("eager")  # type: ignore[operator]
    heads = [one for one in map_model(module, ROW).dimensions if one.kind == "heads"]
    shrink_in_place(module, {heads[0]: [0, 1, 2], heads[1]: [3]})
    configs = [module.get_submodule(one.name).config for one in heads]
    assert [config.n_head for config in configs] == [3, 1]  # type: ignore[union-attr]
    written_out = logits(module)
    with fused_attention(module):
        assert {config._attn_implementation for config in configs} == {"sdpa"}  # type: ignore[union-attr]
        torch.testing.assert_close(logits(module), written_out, rtol=1e-4, atol=1e-5)
    assert {config._attn_implementation for config in configs} == {"eager"}  # type: ignore[union-attr]


@pytest.mark.parametrize("build", [bloom, falcon, big_code])
def test_what_is_not_understood_is_named(build: Callable[[], nn.Module]) -> None:
    model = map_model(made(build), ROW)
    assert not places(model)
    assert any("heads are not understood, so that none is cut" in note for note in model.notes)


def test_a_model_read_piece_by_piece_has_the_same(tmp_path: Path) -> None:
    module = made(phi3)
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    source, task = Source.open(tmp_path), get_task("causal-lm")
    streamed = Candidate.streamed(source, source.skeleton(task), source.read, 0)
    held = streamed.held
    model = map_model(streamed.module, ROW, source.forward, held)
    assert places(model) == places(map_model(module, ROW))
    heads = [one for one in model.dimensions if one.kind == "heads"]
    smaller = reduced(streamed, {one: [1] for one in heads})
    assert smaller.stock
    assert smaller.module.config.num_attention_heads == 2  # type: ignore[union-attr]
    whole = reduced(Candidate(source=source, module=module), {one: [1] for one in heads})
    torch.testing.assert_close(logits(smaller.module), logits(whole.module))


@pytest.mark.slow  # exports twice
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_files_hold_what_no_config_says(runtime: str, tmp_path: Path) -> None:
    made(gpt2).save_pretrained(tmp_path / "source")  # type: ignore[operator]
    source, task = Source.open(tmp_path / "source"), get_task("causal-lm")
    module = source.module(task)
    heads = [one for one in map_model(module, ROW, source.forward).dimensions if one.kind == "heads"]
    cut = reduced(Candidate(source=source, module=module), {heads[0]: [1, 2, 3], heads[1]: [0]})
    assert not cut.stock
    example = {"input_ids": ROW["input_ids"].numpy()}
    axes, writer = {"input_ids": {0: "batch", 1: "tokens"}}, get_runtime(runtime)
    (tmp_path / "artifact").mkdir()
    request = ExportRequest(task=task, example=example, axes=axes, outputs=(task.output,), cache=tmp_path / "cache")
    writer.write(cut, tmp_path / "artifact", request)
    found = writer.open(tmp_path / "artifact", threads=1).run(example)[task.output]
    torch.testing.assert_close(torch.from_numpy(found), logits(cut.module), rtol=1e-4, atol=1e-5)
