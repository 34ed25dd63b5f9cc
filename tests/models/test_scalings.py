"""Scaling by random factors at the places found leaves tiny models of many families as they were."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gossamer.models.example import made_up_example
from gossamer.models.scalings import Scaling, apply_scaling, find_scalings, scaled_weights
from gossamer.models.structure import map_model
from gossamer.models.walker import Call, Stream, Walker, block_keys

tiny = runpy.run_path(str(Path(__file__).parent / "test_structure.py"))
TEXT = tiny["TEXT"]


def gemma() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(num_key_value_heads=1, head_dim=8, **TEXT))


def neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT))


def multi_query() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=1, **TEXT))


SELF = "input_layernorm -> self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GATED = [
    SELF, "post_attention_layernorm -> mlp.gate_proj mlp.up_proj",
    "self_attn.v_proj -> self_attn.o_proj", "mlp.up_proj -> mlp.down_proj",
]  # fmt: skip
WHISPER = ["self_attn_layer_norm -> self_attn.k_proj self_attn.v_proj self_attn.q_proj", "final_layer_norm -> fc1"]
PLACES: dict[Callable[[], nn.Module], list[str]] = {
    # norms behind the sum are read by the next sum, GELU stands between up and down
    tiny["bert"]: ["attention.self.value -> attention.output.dense"],
    tiny["distilbert"]: ["attention.v_lin -> attention.out_lin"],
    tiny["llama"]: GATED,
    multi_query: GATED,
    gemma: GATED,
    tiny["qwen3"]: GATED,
    tiny["phi3"]: [
        "input_layernorm -> self_attn.qkv_proj", "post_attention_layernorm -> mlp.gate_up_proj",
        "self_attn.qkv_proj -> self_attn.o_proj", "mlp.gate_up_proj -> mlp.down_proj",
    ],
    tiny["gpt2"]: ["ln_1 -> attn.c_attn", "ln_2 -> mlp.c_fc", "attn.c_attn -> attn.c_proj"],
    neox: [
        "input_layernorm -> attention.query_key_value", "post_attention_layernorm -> mlp.dense_h_to_4h",
        "attention.query_key_value -> attention.dense",
    ],
    tiny["whisper"]: [*WHISPER, "self_attn.v_proj -> self_attn.out_proj"],
    # ReLU lets positive factors through
    tiny["t5"]: [
        "layer.0.layer_norm -> layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
        "layer.1.layer_norm -> layer.1.DenseReluDense.wi", "layer.0.SelfAttention.v -> layer.0.SelfAttention.o",
        "layer.1.DenseReluDense.wi -> layer.1.DenseReluDense.wo",
    ],
}  # fmt: skip


def words(place: Scaling) -> str:
    readers = sorted(name.removesuffix(".weight") for name in place.consumers)
    return f"{place.producers[0].removesuffix('.weight')} -> {' '.join(readers)}"


def ordered(text: str) -> str:
    producer, readers = text.split(" -> ")
    return f"{producer} -> {' '.join(sorted(readers.split()))}"


def grown(module: nn.Module) -> nn.Module:
    """Return the model with every parameter random and large enough that each branch is seen in the output."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in module.named_parameters():
            noise = torch.randn(values.shape, generator=draw)
            values.copy_(values + 0.3 * noise if values.dim() == 1 else 0.3 * noise)
            assert name
    return module.eval()


def block_and_call(network: nn.Module, stack: int, index: int) -> tuple[nn.Module, Call, str]:
    example = made_up_example(network)
    assert example is not None

    def run(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        found = module(**inputs).logits
        assert isinstance(found, Tensor)
        return found

    model = map_model(network, example, run)
    walker, stream = Walker(network, run, [example]), Stream()
    with torch.no_grad():
        for earlier in model.stacks[:stack]:
            for position, key in enumerate(block_keys(network.get_submodule(earlier.name))):
                block = network.get_submodule(f"{earlier.name}.{key}")
                stream.outputs = [call(block) for call in walker.calls(earlier, position, stream)]
            stream.finish(earlier.name)
        chosen = model.stacks[stack]
        for position, key in enumerate(block_keys(network.get_submodule(chosen.name))):
            name = f"{chosen.name}.{key}"
            (call,) = walker.calls(chosen, position, stream)
            if position == index:
                return network.get_submodule(name), call, name
            stream.outputs = [call(network.get_submodule(name))]
    raise AssertionError


def factors_of(place: Scaling, seed: int) -> Tensor:
    by_channel = torch.rand(max(place.channels) + 1, generator=torch.Generator().manual_seed(seed)) * 3 + 0.3
    return by_channel[torch.tensor(place.channels)]


@pytest.mark.parametrize("family", list(PLACES), ids=lambda family: family.__name__)
def test_the_places_of_a_family_are_found_and_scaling_them_all_changes_nothing(family: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = grown(family())
    example = made_up_example(network)
    assert example is not None
    block, call, _ = block_and_call(network, 0, 1)
    before_block = {name: values.clone() for name, values in block.named_parameters()}
    places = find_scalings(block, call)
    assert sorted(map(words, places)) == sorted(map(ordered, PLACES[family]))
    assert all(torch.equal(values, before_block[name]) for name, values in block.named_parameters())
    with torch.no_grad():
        before = network(**example).logits
        for seed, place in enumerate(places):
            apply_scaling(block, place, factors_of(place, seed))
        after = network(**example).logits
    touched = {name for place in places for name in (*place.producers, *place.consumers)}
    assert all(not torch.equal(block.get_parameter(name), before_block[name]) for name in touched)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


@pytest.mark.parametrize("family", [tiny["gpt2"], tiny["llama"], tiny["t5"]], ids=lambda family: family.__name__)
def test_a_call_can_be_repeated(family: Callable[[], nn.Module]) -> None:
    block, call, _ = block_and_call(grown(family()), 0, 0)
    with torch.no_grad():
        first, second = call(block), call(block)
        wanted = (first, second) if isinstance(first, Tensor) else (first[0], second[0])
        torch.testing.assert_close(*wanted, rtol=0, atol=0)
        block.get_parameter([name for name, _ in block.named_parameters() if "bias" not in name][1]).mul_(2)
        third = call(block)
    assert not torch.equal(third if isinstance(third, Tensor) else third[0], wanted[0])


def test_vit_offers_what_the_norms_in_front_feed() -> None:
    torch.manual_seed(0)
    block, call, _ = block_and_call(grown(tiny["vit"]()), 0, 1)
    found = {len(place.consumers): place for place in find_scalings(block, call) if "norm" in place.producers[0]}
    assert set(found) == {3, 1}  # q, k and v; up
    assert all(len(place.producers) == 2 for place in found.values())  # weight and bias


def test_a_decoder_s_cross_attention_reads_the_norm_with_its_queries_only() -> None:
    torch.manual_seed(0)
    block, call, _ = block_and_call(grown(tiny["whisper"]()), 1, 1)
    found = [words(place) for place in find_scalings(block, call)]
    assert "encoder_attn_layer_norm -> encoder_attn.q_proj" in found
    assert "encoder_attn.v_proj -> encoder_attn.out_proj" in found


def test_heads_of_a_group_read_one_channel_and_share_its_factor() -> None:
    torch.manual_seed(0)
    block, call, _ = block_and_call(grown(tiny["llama"]()), 0, 0)
    (place,) = (place for place in find_scalings(block, call) if "o_proj" in place.consumers[0])
    assert place.repeat == 2
    assert place.channels == (*range(8), *range(8), *range(8, 16), *range(8, 16))
    different = torch.arange(1.0, 33.0)
    shared = place.shared(different)
    torch.testing.assert_close(shared[:8], (different[:8] + different[8:16]) / 2)
    torch.testing.assert_close(shared[:8], shared[8:16])
    scaled_weights(block, place, shared)
    with pytest.raises(AssertionError, match="different factors"):
        scaled_weights(block, place, different)


def test_a_norm_around_one_keeps_its_one() -> None:
    torch.manual_seed(0)
    block, call, _ = block_and_call(grown(gemma()), 0, 0)
    (place,) = (place for place in find_scalings(block, call) if len(place.consumers) == 3)
    assert place.offset == 1.0
    weight = block.get_parameter(place.producers[0]).detach().clone()
    scaled = scaled_weights(block, place, torch.full((32,), 2.0))
    torch.testing.assert_close(scaled[place.producers[0]], (1 + weight) / 2 - 1)
