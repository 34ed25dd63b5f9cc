"""Write a Llama-shaped model of any size with random weights, shard by shard: something large to go through.

    python benchmarks/make_random_llama.py --params 7B DIR

The shapes are Llama's (grouped heads above 8B), bfloat16, shards of at most --shard bytes as published checkpoints have
them. Memory holds one tensor at a time. The tokenizer is byte-level: one token a byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from gossamer.models.shards import Entry, write_shards

# parameters -> hidden size, feed-forward size, layers, heads, key/value heads
SHAPES = {
    "125M": (768, 2048, 12, 12, 12),
    "1B": (2048, 5632, 22, 32, 4),
    "3B": (3200, 8640, 26, 32, 32),
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "15B": (5120, 13824, 46, 40, 40),
}
VOCABULARY = 32000


def config_of(params: str) -> LlamaConfig:
    """Return the configuration of a model of about so many parameters."""
    hidden, feed_forward, layers, heads, kv_heads = SHAPES[params]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def entries_of(config: LlamaConfig) -> list[Entry]:
    """Return every tensor of the model in the order of its blocks."""
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * (config.num_key_value_heads or config.num_attention_heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate_proj.weight": (feed_forward, hidden),
            f"{prefix}mlp.up_proj.weight": (feed_forward, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, feed_forward),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    return [Entry(name, torch.bfloat16, shape) for name, shape in shapes.items()]


def values_of(entries: list[Entry]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor: ones for norms, for matrices normal values of a spread that keeps activations in range."""
    draw = torch.Generator().manual_seed(0)
    for entry in entries:
        if len(entry.shape) == 1:
            yield entry.name, torch.ones(entry.shape, dtype=entry.dtype)
        else:
            values = torch.empty(entry.shape, dtype=entry.dtype)
            # one tile of noise, turned by another amount each time: as fast as memory, and no two rows alike
            tile = torch.randn(1 << 20, generator=draw).to(entry.dtype)
            flat = values.view(-1)
            for start in range(0, flat.numel(), tile.numel()):
                part = flat[start : start + tile.numel()]
                shift = int(torch.randint(0, tile.numel(), (1,), generator=draw))
                torch.mul(tile.roll(shift)[: part.numel()], entry.shape[1] ** -0.5, out=part)
            yield entry.name, values


def main() -> None:
    """Read the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", choices=sorted(SHAPES), default="7B")
    parser.add_argument("--shard", type=int, default=5_000_000_000, help="bytes of a shard")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(arguments.params)
    settings = {**json.loads(config.to_json_string(use_diff=True)), "architectures": ["LlamaForCausalLM"]}
    settings |= {"dtype": "bfloat16"}
    (arguments.folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(arguments.folder)
    entries = entries_of(config)
    write_shards(arguments.folder, entries, values_of(entries), {"format": "pt"}, arguments.shard)
    total = sum(entry.num_bytes for entry in entries)
    print(f"{arguments.folder}: {total / 2e9:.2f} G parameters, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
