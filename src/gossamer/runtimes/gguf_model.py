"""What a GGUF file says of a model besides its weights: architecture, sizes, positions, and where each tensor goes.

llama.cpp computes a model from an architecture's name and a few numbers, so a file is right only for architectures that
both sides know: Llama and Mistral (`llama`), Qwen 2 (`qwen2`) and Qwen 3 (`qwen3`).

Rotary positions: transformers turns the pairs (x_i, x_{i + D/2}) of a head of D channels, llama.cpp's `llama` the pairs
(x_2i, x_2i+1). The rows of the query and key projections are put in the order that makes them the same pairs,

    new row h D + 2 i + t  =  old row h D + t D/2 + i           t in {0, 1}, i < D/2

codes, scales, zero points and biases alike, which is exact; products of queries and keys do not change. `qwen2` and
`qwen3` turn the same pairs as transformers.

Scaled positions: `linear` is a number of the file; Llama 3's is a tensor of factors, one a frequency, which are the
model's own frequencies before and after scaling, divided. Sliding windows (Mistral) are not computed by `llama`, so
the file's context ends where the window would begin to cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import RuntimeUnavailable

ROPE_FACTORS = "rope_freqs.weight"
REMEDY = "use the runtime onnxruntime, openvino or torch"


@dataclass(frozen=True)
class Architecture:
    """Name an architecture of llama.cpp, and say whether query and key rows are reordered for it."""

    name: str
    reordered: bool
    position_factors: bool  # it reads a tensor of factors for its frequencies


LLAMA = Architecture("llama", reordered=True, position_factors=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", reordered=False, position_factors=False),
    "qwen3": Architecture("qwen3", reordered=False, position_factors=False),
}


@dataclass(frozen=True)
class Place:
    """Say where a parameter goes: its name in the model, its name in the file, the order of its rows [O] or None."""

    parameter: str
    stored_name: str
    order_O: Tensor | None


def architecture_of(module: nn.Module) -> Architecture:
    """Return the architecture of a causal language model. Raises RuntimeUnavailable for one that is not written."""
    config: Any = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if model_type not in ARCHITECTURES or head is None:
        raise RuntimeUnavailable(
            f"GGUF files are written for causal language models of the types {', '.join(ARCHITECTURES)}; "
            f"this is a {type(module).__name__} of type {model_type}",
            REMEDY,
        )
    if config.hidden_act not in ("silu", "swish"):
        raise RuntimeUnavailable(
            f"llama.cpp computes {model_type} models with silu; this one has {config.hidden_act}", REMEDY
        )
    return ARCHITECTURES[model_type]


def head_size(config: Any) -> int:
    """Return the channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def places(module: nn.Module) -> Iterator[Place]:
    """Yield where every parameter goes, shared ones once. Raises RuntimeUnavailable for one that has no place."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config: Any = module.config
    architecture = architecture_of(module)
    kinds = MODEL_ARCH[architecture.name.upper()]
    names = get_tensor_name_map(kinds, config.num_hidden_layers)
    for parameter, tensor in module.named_parameters():
        found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RuntimeUnavailable(f"llama.cpp's {architecture.name} has no place for {parameter}", REMEDY)
        _check_shape(parameter, found, tensor, config)
        order_O = None
        if architecture.reordered and (heads := _heads(found, config)):
            order_O = pair_order(heads, tensor.shape[0] // heads)
        yield Place(parameter, found, order_O)


def pair_order(num_heads: int, size: int) -> Tensor:
    """Return the old row of each new row [O], for heads of `size` rows.

    >>> pair_order(1, 6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return torch.arange(num_heads * size).reshape(num_heads, 2, size // 2).transpose(1, 2).flatten()


def _heads(stored_name: str, config: Any) -> int:
    """Return how many heads a projection's rows make when it is a query or key projection, else 0."""
    kind = stored_name.split(".")[-2]
    return int({"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind, 0))


def _check_shape(parameter: str, stored_name: str, tensor: Tensor, config: Any) -> None:
    """Raise when a matrix is not of the size that the config says: llama.cpp has one size for all blocks."""
    kind, size = stored_name.split(".")[-2], head_size(config)
    expected = {
        "attn_q": config.num_attention_heads * size,
        "attn_k": config.num_key_value_heads * size,
        "attn_v": config.num_key_value_heads * size,
        "ffn_gate": config.intermediate_size,
        "ffn_up": config.intermediate_size,
    }
    if tensor.shape[0] != expected.get(kind, tensor.shape[0]):
        raise RuntimeUnavailable(
            f"{parameter} has {tensor.shape[0]} rows where the config says {expected[kind]}: llama.cpp has one size "
            "for all blocks",
            "write a model whose blocks are all alike",
        )


def write_metadata(writer: Any, module: nn.Module, name: str) -> None:
    """Add sizes and positions to a GGUFWriter."""
    from gguf import RopeScalingType

    config: Any = module.config
    size = head_size(config)
    writer.add_name(name)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def position_factors(module: nn.Module) -> Tensor | None:
    """Return what llama.cpp divides its frequencies by, float32 [D/2], or None when they are the plain ones.

    Raises RuntimeUnavailable for a scaling that a file cannot say.
    """
    config: Any = module.config
    rope, size = config.rope_parameters, head_size(config)
    kind = rope.get("rope_type", "default")
    known = ("default", "linear", "llama3") if architecture_of(module).position_factors else ("default", "linear")
    if kind not in known or rope.get("partial_rotary_factor", 1.0) != 1.0:
        part = f" on {rope['partial_rotary_factor']:.0%} of the channels" if "partial_rotary_factor" in rope else ""
        raise RuntimeUnavailable(
            f"rotary positions of kind {kind}{part} are not written; for this architecture {', '.join(known)} are",
            REMEDY,
        )
    if kind != "llama3":
        return None
    scaled: Tensor = next(
        buffer for buffer_name, buffer in module.named_buffers() if buffer_name.endswith("rotary_emb.inv_freq")
    )
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: Tensor = plain / scaled.float()
    return factors


def _context(config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    return int(min(config.max_position_embeddings, window) if window else config.max_position_embeddings)
