"""Tiny random models with experts, and a folder to open them from: no real one is small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.2, "num_experts_per_tok": 2, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip


def mixtral(**more: Any) -> PreTrainedModel:
    """Return 4 experts of which 2 are used, called w1, w2, w3 in files under another parent's name."""
    settings = COMMON | {"num_local_experts": 4, "intermediate_size": 48} | more
    return _seeded(hf.MixtralForCausalLM, hf.MixtralConfig(**settings))


def qwen3_moe(**more: Any) -> PreTrainedModel:
    """Return 8 experts of which 2 are used, in the second block only: the first one has an ordinary network."""
    own = {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "intermediate_size": 64,
        "head_dim": 8,
        "mlp_only_layers": [0],
    }
    config = hf.Qwen3MoeConfig(**COMMON | own | more)
    return _seeded(hf.Qwen3MoeForCausalLM, config)


def qwen2_moe(**more: Any) -> PreTrainedModel:
    """Return experts beside a shared one that every token passes, with a gate of its own."""
    own = {
        "num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 64, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    config = hf.Qwen2MoeConfig(**COMMON | own | more)
    return _seeded(hf.Qwen2MoeForCausalLM, config)


def olmoe(**more: Any) -> PreTrainedModel:
    """Return 4 experts in every block."""
    return _seeded(hf.OlmoeForCausalLM, hf.OlmoeConfig(**COMMON | {"num_experts": 4, "intermediate_size": 16} | more))


def gpt_oss(**more: Any) -> PreTrainedModel:
    """Return experts with biases, stored [in, out], gate and up in turns; files hold them stacked."""
    config = hf.GptOssConfig(**COMMON | {"num_local_experts": 4, "intermediate_size": 16, "head_dim": 8} | more)
    return _seeded(hf.GptOssForCausalLM, config)


FAMILIES = [mixtral, qwen3_moe, qwen2_moe, olmoe, gpt_oss]


def _seeded(kind: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model: PreTrainedModel = kind(config).eval()
    with torch.no_grad():  # biases start at zero, where an error in them would not show
        for name, values in model.named_parameters():
            if name.endswith("bias"):
                values.normal_(std=0.2)
    return model


def ids(rows: int = 1, length: int = 24) -> torch.Tensor:
    """Return token ids [rows, length] that differ from row to row."""
    return (torch.arange(rows * length) * 7 % 251).reshape(rows, length)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model with a byte-level tokenizer, and return the folder."""
    model.save_pretrained(folder)
    letters = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    hf.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    return folder
