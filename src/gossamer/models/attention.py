"""Let a model compute attention by torch's fused kernel while samples pass through it.

Models are opened with the attention that is written out (`eager`): that is what is traced, exported and compared. Where
only the numbers are wanted, torch's `scaled_dot_product_attention` gives the same ones without storing a score for each
pair of tokens: on SmolLM2-135M, 512 tokens in bfloat16 on two cores, a block takes 0.75 of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

WRITTEN_OUT, FUSED = "eager", "sdpa"


@contextmanager
def fused_attention(module: nn.Module) -> Iterator[None]:
    """Switch a model of transformers to the fused kernel while the `with` lasts, where its code has it."""
    able = bool(getattr(module, "_supports_sdpa", False))
    with _switched(module, WRITTEN_OUT, FUSED if able else WRITTEN_OUT):
        yield


@contextmanager
def written_out_attention(module: nn.Module) -> Iterator[None]:
    """Switch a model of transformers to attention that is written out while the `with` lasts."""
    with _switched(module, FUSED, WRITTEN_OUT):
        yield


@contextmanager
def _switched(module: nn.Module, before: str, now: str) -> Iterator[None]:
    if not isinstance(module, PreTrainedModel) or before == now or module.config._attn_implementation != before:
        yield
        return
    _switch(module, now)
    try:
        yield
    finally:
        _switch(module, before)


def _switch(module: PreTrainedModel, now: str) -> None:
    """Switch a model, and attentions that were cut to heads of their own and have a config of their own since."""
    module.set_attn_implementation(now)
    known = {id(part.config): part.config for part in module.modules() if isinstance(part, PreTrainedModel)}
    switched = {type(config) for config in known.values() if config._attn_implementation == now}
    for part in module.modules():
        own = getattr(part, "config", None)
        if own is not None and type(own) in switched and id(own) not in known:
            own._attn_implementation = now
