"""Rounding of keys and values: the formats' own values, compared with compressed-tensors, and what reaches a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gossamer.models.caches import SMALLEST_SCALE, Cache, CacheSpec, cache_argument, intercept

FORMATS: Any = ("fp8", "int8")
SCOPES: Any = ("tensor", "head")
THEIRS = {"fp8": "float", "int8": "int", "tensor": "tensor", "head": "attn_head"}


def keys_BHTD(seed: int = 0) -> Tensor:
    values = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(seed))
    return values * torch.tensor([0.1, 1.0, 30.0]).reshape(1, 3, 1, 1)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("format", FORMATS)
def test_values_are_those_that_compressed_tensors_gives(format: Any, scope: Any) -> None:
    spec, keys = CacheSpec(format=format, scope=scope), keys_BHTD()
    scale = spec.scale(keys)
    arguments = QuantizationArgs(num_bits=8, type=THEIRS[format], symmetric=True, strategy=THEIRS[scope])
    for values in (keys, 3 * keys_BHTD(1)):  # the second goes beyond the range
        wanted = fake_quantize(values, scale, None, arguments)
        torch.testing.assert_close(spec.round(values, scale), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_scales_hold_the_largest_value_and_no_more(format: Any) -> None:
    keys = keys_BHTD()
    whole, heads = CacheSpec(format=format), CacheSpec(format=format, scope="head")
    assert whole.scale(keys).shape == (1,)
    assert heads.scale(keys).shape == (3, 1, 1)
    exact = keys.abs().amax((0, 2, 3)) / {"fp8": 448, "int8": 127}[format]
    found = heads.scale(keys).flatten()
    assert bool((found >= exact).all())
    assert bool((found <= exact * (1 + 2**-7)).all())
    torch.testing.assert_close(found, found.bfloat16().float(), rtol=0, atol=0)
    assert float(whole.scale(keys)) == float(found.max())
    torch.testing.assert_close(found.half().float(), found, rtol=0, atol=0)


def test_one_scale_a_head_is_nearer_where_heads_differ() -> None:
    keys = keys_BHTD()
    errors = {}
    for scope in SCOPES:
        spec = CacheSpec(format="int8", scope=scope)
        errors[scope] = float(((spec.round(keys, spec.scale(keys)) - keys) / keys.std((0, 2, 3), keepdim=True)).std())
    assert errors["head"] < 0.1 * errors["tensor"]


def test_silence_has_a_scale() -> None:
    spec = CacheSpec(format="fp8")
    scale = spec.scale(torch.zeros(1, 2, 3, 4))
    assert float(scale) == SMALLEST_SCALE
    assert not bool(spec.round(torch.zeros(1, 2, 3, 4), scale).any())


def test_token_by_token_with_a_cache_gives_what_one_pass_without_gives() -> None:
    model = llama()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    attentions = {n: m for n, m in model.named_modules() if n.endswith("self_attn")}
    spec = CacheSpec(format="int8", scope="head")
    plain = model(input_ids=ids, use_cache=False).logits
    caches = model(input_ids=ids).cache
    for (_, attention), layer in zip(attentions.items(), caches.layers, strict=True):
        Cache(spec, spec.scale(layer.keys), spec.scale(layer.values)).simulate(attention)
    with torch.no_grad():
        at_once = model(input_ids=ids, use_cache=False).logits
        state, steps = None, []
        for position in range(ids.shape[1]):
            output = model(input_ids=ids[:, position : position + 1], cache=state, use_cache=True)
            state = output.cache
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(at_once, plain, rtol=1e-4, atol=1e-4)
    keys = state.layers[1].keys  # what is kept is on the grid
    scale = spec.scale(keys)
    torch.testing.assert_close(spec.round(keys, scale), keys, rtol=1e-2, atol=1e-3)


def test_what_is_intercepted_is_let_go_again() -> None:
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(6)[None]
    seen: list[tuple[int, ...]] = []

    def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(tuple(keys.shape))
        return keys, 2 * values

    attention = model.transformer.h[0].attn
    assert cache_argument(attention) is not None
    assert cache_argument(model.transformer.h[0].mlp) is None
    with torch.no_grad():
        before = model(input_ids=ids).logits
        handle = intercept(attention, look)
        doubled = [model(input_ids=ids, use_cache=use).logits for use in (True, False)]
        handle.remove()
        after = model(input_ids=ids).logits
    assert seen == [(1, 4, 6, 8)] * 2
    torch.testing.assert_close(*doubled)
    assert not torch.allclose(doubled[0], before)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
