"""Self-attentions of tiny models of stock classes, and the rules of their maps against transformers' own maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from gossamer.errors import TechniqueError
from gossamer.models.factors import Factored
from gossamer.models.self_attention import find_map_rules, find_self_attentions, outputs_of

IDS = torch.arange(1, 8)[None]


def made(kind: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = kind(config).eval()
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():  # random attention looks everywhere alike: louder queries and keys do not
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
    return model


def bert(heads: int = 4) -> PreTrainedModel:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=heads, intermediate_size=48, vocab_size=50
    )
    return made(BertModel, config)


def opt() -> PreTrainedModel:
    config = OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=50, word_embed_proj_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip
    return made(OPTForCausalLM, config)


def whisper() -> PreTrainedModel:
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50, max_source_positions=10, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return made(WhisperForConditionalGeneration, config)


def run(module: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return module(**inputs)


def test_bert_has_one_in_each_block_and_its_maps_are_transformers_own() -> None:
    model = bert()
    found, unclear = find_self_attentions(model, {"input_ids": IDS})
    assert not unclear
    assert [(one.stack, one.block) for one in found] == [("encoder.layer", index) for index in range(3)]
    assert (found[0].k, found[0].v) == (
        "encoder.layer.0.attention.self.key",
        "encoder.layer.0.attention.self.value",
    )
    assert {(one.widths, one.key_size, one.value_size) for one in found} == {((32, 32, 32), 8, 8)}
    rules = find_map_rules(model, found, {"input_ids": IDS}, run)
    names = [name for one in found for name in (one.q, one.k)]
    with outputs_of(model, names) as outputs, torch.no_grad():
        wanted = model(input_ids=IDS, output_attentions=True).attentions
    for one, rule, map_BHTT in zip(found, rules, wanted, strict=True):
        assert not rule.causal
        assert torch.allclose(rule.scores(outputs[one.q], outputs[one.k]).softmax(-1), map_BHTT, atol=1e-5)


def test_a_causal_model_is_known_as_one() -> None:
    model = opt()
    found, _ = find_self_attentions(model, {"input_ids": IDS})
    assert [rule.causal for rule in find_map_rules(model, found, {"input_ids": IDS}, run)] == [True, True]


def test_of_an_encoder_decoder_each_stack_has_its_own_and_cross_attention_is_left_out() -> None:
    model = whisper()
    example = {"input_features": torch.randn(1, 80, 20), "decoder_input_ids": IDS}
    found, unclear = find_self_attentions(model, example)
    assert not unclear
    assert [(one.stack, one.block) for one in found] == [
        *(("model.encoder.layers", index) for index in range(2)),
        *(("model.decoder.layers", index) for index in range(2)),
    ]
    assert not any("encoder_attn" in one.k for one in found)
    assert [rule.causal for rule in find_map_rules(model, found, example, run)] == [False, False, True, True]


def test_grouped_keys_are_narrower_and_rotated_maps_are_refused() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = made(LlamaForCausalLM, config)
    found, _ = find_self_attentions(model, {"input_ids": IDS})
    assert [one.widths for one in found] == [(32, 16, 16)] * 2
    with pytest.raises(
        TechniqueError, match=r"none of the 2 softmaxes of a pass over 7 tokens is that of model\.layers"
    ):
        find_map_rules(model, found, {"input_ids": IDS}, run)


def test_maps_with_a_bias_of_positions_are_refused() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    model = made(T5ForConditionalGeneration, config)
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    found, _ = find_self_attentions(model, example)
    assert len(found) == 4
    with pytest.raises(TechniqueError, match="by `relations` instead"):
        find_map_rules(model, found, example, run)


def test_one_token_tells_nothing_about_maps() -> None:
    model = bert()
    found, _ = find_self_attentions(model, {"input_ids": IDS})
    with pytest.raises(TechniqueError, match="3 softmaxes of a pass over 1 tokens"):
        find_map_rules(model, found, {"input_ids": IDS[:, :1]}, run)


def test_a_model_that_goes_by_the_fused_kernel_is_tried_without_it_and_left_with_it() -> None:
    model = bert()
    found, _ = find_self_attentions(model, {"input_ids": IDS})
    rules = find_map_rules(model, found, {"input_ids": IDS}, run)
    model.set_attn_implementation("sdpa")
    assert find_self_attentions(model, {"input_ids": IDS})[0] == found
    assert find_map_rules(model, found, {"input_ids": IDS}, run) == rules
    assert model.config._attn_implementation == "sdpa"


class Own(nn.Module):
    """A network of a user's own: one block twice, its attention by torch's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in "qkvo"}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            q, k, v = (block[name](x).view(1, -1, 2, 4).transpose(1, 2) for name in "qkv")
            found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["o"](found)
        return x


def test_of_a_kernel_of_the_users_own_relations_can_be_followed_and_maps_cannot() -> None:
    found, _ = find_self_attentions(Own(), {"x": torch.randn(1, 5, 8)})
    assert [(one.q, one.k, one.v, one.key_size) for one in found] == [
        (f"blocks.{index}.q", f"blocks.{index}.k", f"blocks.{index}.v", 4) for index in range(2)
    ]
    with pytest.raises(TechniqueError, match="none of the 0 softmaxes of a pass over 5 tokens"):
        find_map_rules(Own(), found, {"x": torch.randn(1, 5, 8)}, run)


def test_queries_keys_and_values_out_of_one_layer_are_named() -> None:
    model = made(GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32))
    found, unclear = find_self_attentions(model, {"input_ids": IDS})
    assert found == ()
    assert unclear.startswith("queries, keys and values come out of one layer: transformer.h.0.attn.c_attn")


def test_a_layer_that_became_two_thin_ones_is_still_one() -> None:
    model = bert()
    attention = model.get_submodule("encoder.layer.2.attention.self")
    for name in ("query", "key", "value"):
        weight = attention.get_submodule(name).get_parameter("weight").detach()
        bias = attention.get_submodule(name).get_parameter("bias").detach()
        attention.register_module(name, Factored(weight[:, :4].clone(), torch.eye(4, 32), bias))
    found, unclear = find_self_attentions(model, {"input_ids": IDS})
    assert not unclear
    assert found[2].q == "encoder.layer.2.attention.self.query.1"
    assert len(find_map_rules(model, found, {"input_ids": IDS}, run)) == 3


def test_images_have_them_too() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model, example = made(ViTModel, config), {"pixel_values": torch.randn(1, 3, 16, 16)}
    found, _ = find_self_attentions(model, example)
    assert len(find_map_rules(model, found, example, run)) == 2
