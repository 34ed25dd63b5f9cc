"""Codes that are made when they are asked for, so that those of one layer are in memory and not those of a model.

Rounding without data is a pure function of the weight, and codes that needs calibration lie in the run folder: either
way a layer's codes can be had again at any time, and nobody has to keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass

import torch

from gossamer.models.quantized import Quantized, QuantSpec


@dataclass(frozen=True)
class Outline:
    """Say what codes will be like without making them: their grid, and the shape of the parameter itself."""

    spec: QuantSpec
    shape: tuple[int, ...]
    transposed: bool = False
    scale_dtype: torch.dtype = torch.float16


class Deferred(MutableMapping[str, Quantized]):
    """Map parameter names to codes; those given by `defer` are made at each access."""

    def __init__(self) -> None:
        self._kept: dict[str, Quantized] = {}
        self._made: dict[str, tuple[Outline, Callable[[], Quantized]]] = {}

    def defer(self, parameter: str, outline: Outline, make: Callable[[], Quantized]) -> None:
        """Let `make` give a parameter's codes whenever they are asked for, in place of any that are kept."""
        self._kept.pop(parameter, None)
        self._made[parameter] = outline, make

    def outline(self, parameter: str) -> Outline:
        """Return what a parameter's codes are like."""
        if parameter in self._made:
            return self._made[parameter][0]
        return outline_of(self._kept[parameter])

    def __getitem__(self, parameter: str) -> Quantized:
        return self._made[parameter][1]() if parameter in self._made else self._kept[parameter]

    def __setitem__(self, parameter: str, codes: Quantized) -> None:
        self._made.pop(parameter, None)
        self._kept[parameter] = codes

    def __delitem__(self, parameter: str) -> None:
        del (self._made if parameter in self._made else self._kept)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._made or parameter in self._kept

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from self._made

    def __len__(self) -> int:
        return len(self._kept) + len(self._made)


def outline_of(codes: Quantized) -> Outline:
    """Return the outline of codes that are there."""
    return Outline(codes.spec, codes.shape, codes.transposed, codes.scale.dtype)
