"""The fused kernel: switched on for a while, the same numbers, and switched off whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gossamer.models.attention import fused_attention

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "initializer_range": 0.3, "attn_implementation": "eager"}  # fmt: skip


def models() -> list[PreTrainedModel]:
    torch.manual_seed(0)
    return [
        LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval(),
        BertForSequenceClassification(BertConfig(**SIZES)).eval(),
    ]


@pytest.mark.parametrize("model", models(), ids=["llama", "bert"])
def test_padded_rows_come_out_the_same(model: PreTrainedModel) -> None:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        written_out = model(input_ids=ids, attention_mask=mask).logits
        with fused_attention(model):
            assert model.config._attn_implementation == "sdpa"
            fused = model(input_ids=ids, attention_mask=mask).logits
    assert model.config._attn_implementation == "eager"
    kept = mask.bool() if fused.dim() == 3 else torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(fused[kept], written_out[kept], rtol=1e-4, atol=1e-4)


def test_it_is_switched_back_after_an_error_and_leaves_other_models_alone() -> None:
    model = models()[0]
    with pytest.raises(ValueError, match="stop"), fused_attention(model):
        raise ValueError("stop")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with fused_attention(model):
        pass
    assert model.config._attn_implementation == "sdpa"
    with fused_attention(nn.Linear(2, 2)):
        pass
