"""How the keys and values that attention keeps from token to token are rounded to 8 bits.

A decoder keeps the keys K and values V of every token it has read: at long contexts they are larger than the weights.
A server that stores them in 8 bits wants scales that were found beforehand, one for the keys and one for the values of
each attention, or one for each of its key/value heads:

    fp8     K' = s * e4m3(clamp(K / s, -448, 448))            s = max |K| / 448
    int8    K' = s * clamp(round(K / s), -128, 127)           s = max |K| / 127

K is what goes into the cache: after the rotation by position. Scales are rounded up to bfloat16, so that every dtype
that a file or a server may hold them in has the same number.

Shape suffixes: B samples, H key/value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ARGUMENTS = ("cache", "past_key_values", "past_key_value")  # how transformers calls an attention's cache
LARGEST = {"fp8": 448.0, "int8": 127.0}
SMALLEST_SCALE = 2.0**-14  # the smallest that float16 holds with all its digits


class CacheSpec(BaseModel):
    """Describe how keys and values are kept: 8 bits, one scale for an attention or one for each of its heads.

    >>> str(CacheSpec(format="fp8"))
    'fp8 per tensor'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fp8", "int8"]
    scope: Literal["tensor", "head"] = "tensor"

    def __str__(self) -> str:
        return f"{self.format} per {self.scope}"

    def scale(self, values_BHTD: Tensor) -> Tensor:
        """Return the scale that just holds some keys or values: float32 [1], or [H, 1, 1] for one a head."""
        sizes_BHTD = values_BHTD.detach().abs().float()
        largest = sizes_BHTD.amax() if self.scope == "tensor" else sizes_BHTD.amax((0, 2, 3))
        return _rounded_up(largest / LARGEST[self.format]).reshape((1,) if self.scope == "tensor" else (-1, 1, 1))

    def round(self, values_BHTD: Tensor, scale: Tensor) -> Tensor:
        """Return keys or values as a cache of 8 bits gives them back, same shape and dtype."""
        scale = scale.to(values_BHTD.device)
        position = values_BHTD / scale
        if self.format == "fp8":
            codes = position.clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)
        else:
            codes = position.clamp(-128, 127).round()
        return codes.to(values_BHTD.dtype) * scale


def _rounded_up(values: Tensor) -> Tensor:
    """Return the nearest bfloat16 numbers that are not smaller, as float32."""
    rounded = values.clamp(min=SMALLEST_SCALE).bfloat16()
    step = torch.tensor(2.0**-7)
    return torch.where(rounded.float() < values, (rounded.float() * (1 + step)).bfloat16(), rounded).float()


@dataclass(frozen=True)
class Cache:
    """Hold how one attention's keys and values are kept."""

    spec: CacheSpec
    key_scale: Tensor
    value_scale: Tensor

    def simulate(self, attention: nn.Module) -> RemovableHandle:
        """Let an attention compute with rounded keys and values until the handle is removed."""
        return intercept(attention, self._round)

    def _round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.spec.round(keys, self.key_scale), self.spec.round(values, self.value_scale)


class _Passing:
    """Stand in for a cache, or for none: what goes into it is changed first. Whatever else is asked, it answers."""

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], cache: Any) -> None:
        self._change = change
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return all keys and values so far, [B, H, T, D] both."""
        keys, values = self._change(keys, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def cache_argument(attention: nn.Module) -> str | None:
    """Return the name of the argument in which a module is handed a cache, or None where it takes none."""
    taken = inspect.signature(attention.forward).parameters
    return next((name for name in ARGUMENTS if name in taken), None)


def intercept(attention: nn.Module, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> RemovableHandle:
    """Let `change` have the keys and values [B, H, T, D] that an attention puts into its cache, until removed.

    It is asked when there is no cache either: an attention that is handed one computes with what the cache returns.
    """
    argument = cache_argument(attention)
    assert argument is not None, f"{type(attention).__name__} takes no cache"

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, argument: _Passing(change, kwargs.get(argument))}

    return attention.register_forward_pre_hook(hand_on, with_kwargs=True)
