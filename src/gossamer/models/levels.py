"""What codes stand for where they are no integers: the levels of FP8, FP4 and NF4, and which of them is nearest.

    E4M3    sign, 4 bits of exponent e, 3 of mantissa m     2^(e-7) (1 + m/8),  or 2^-6 m/8 where e = 0;  up to 448
    E2M1    sign, 2 bits of exponent e, 1 of mantissa m     2^(e-1) (1 + m/2),  or m/2 where e = 0;       up to 6
    NF4     16 quantiles of the normal distribution, divided by the largest: from -1 to 1, one of them 0

A weight is its level times the scale of its group, and formats differ in what a scale may be:

    fp8     E4M3, any float16 scale                      Micikevicius et al., "FP8 Formats for Deep Learning", 2022
    mxfp4   E2M1 in groups of 32, a power of two         OCP, "Microscaling Formats (MX) v1.0", 2023, sections 5.3, 6.3
    nvfp4   E2M1 in groups of 16, E4M3 under one scale   NVIDIA, "Pretraining Large Language Models with NVFP4", 2025,
            for the whole tensor                         section 2
    nf4     NF4, any float16 scale                       Dettmers et al., "QLoRA", 2023, section 3 and appendix E

A code counts levels from zero: code 0 is 0.0, a larger code is a larger value. For E4M3 and E2M1 the two zeros are one
and |code| is the level's bit pattern without its sign, so that files hold code and sign as they are.

Ties go to the even pattern, as IEEE casts do (for NF4 to the lower level). The scale of a whole NVFP4 tensor is a power
of two here, where the paper takes any float32: E4M3 floats lose nothing by it but at most one of some 17 binades, and
level times scale is then exact in bfloat16, in which compressed-tensors multiplies them out.

Left out: E5M2 (a format for gradients), MXFP6 and MXFP8, FP4 with scales that are any float.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["int", "fp8", "mxfp4", "nvfp4", "nf4"]
Scales = Literal["float16", "power of two", "e4m3"]

# QLoRA, appendix E
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LARGEST_E4M3, SMALLEST_E4M3 = 448.0, 2.0**-9
FLOAT32_BIAS = 127
TABLE_BINS = 256
CHUNK_ELEMENTS = 1 << 18
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127  # of E8M0 scales; -127 is no normal bfloat16


class Codebook(ABC):
    """Hold the values of a format's codes, [K] ascending; `low` is the code of the first."""

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels_K = torch.tensor(levels)
        self.low = -levels.index(0.0)

    @abstractmethod
    def nearest(self, position: Tensor) -> Tensor:
        """Return the codes, as floats, of the levels nearest to positions in units of the scale, float32."""

    def values(self, codes: Tensor) -> Tensor:
        """Return the levels of codes, float32."""
        flat = codes.flatten()
        found, levels_K = torch.empty(flat.shape, device=codes.device), self.levels_K.to(codes.device)
        for start in range(0, len(flat), CHUNK_ELEMENTS):  # places are four times as wide as codes
            here = slice(start, start + CHUNK_ELEMENTS)
            torch.index_select(levels_K, 0, flat[here].to(torch.int32).sub_(self.low), out=found[here])
        return found.view(codes.shape)


class Minifloat(Codebook):
    """The values of a sign-magnitude float, from its first `num_patterns` patterns without sign.

    In the binade of exponent e the levels lie 2^(e - m) apart, m being the bits of the mantissa. So with e that of the
    position, or the smallest that has a binade, |code| = round(|x| 2^(m - e)) + 2^m (e - smallest).
    """

    def __init__(self, exponent_bits: int, mantissa_bits: int, bias: int, num_patterns: int) -> None:
        steps = 1 << mantissa_bits
        assert num_patterns <= steps << exponent_bits
        magnitudes = []
        for pattern in range(num_patterns):
            exponent, mantissa = divmod(pattern, steps)
            whole = steps if exponent else 0
            magnitudes.append((whole + mantissa) / steps * 2.0 ** (max(exponent, 1) - bias))
        super().__init__([*(-value for value in reversed(magnitudes[1:])), *magnitudes])
        self._mantissa_bits, self._smallest, self._largest = mantissa_bits, 1 - bias, magnitudes[-1]

    def nearest(self, position: Tensor) -> Tensor:
        """Return the codes nearest to positions; ties go to the even pattern, as rounding floats to integers does."""
        size = position.abs().clamp_(max=self._largest)
        exponent = (size.view(torch.int32) >> 23).sub_(FLOAT32_BIAS).clamp_(min=self._smallest)
        finer = ((self._mantissa_bits + FLOAT32_BIAS - exponent) << 23).view(torch.float32)
        codes = size.mul_(finer).round_().add_((exponent - self._smallest) << self._mantissa_bits)
        return codes.copysign_(position)


class Table(Codebook):
    """Levels in [-1, 1] that follow no rule. A position's bin leaves two levels, and their border decides."""

    def __init__(self, levels: Sequence[float]) -> None:
        super().__init__(levels)
        wide_K = self.levels_K.double()
        borders = (wide_K[1:] + wide_K[:-1]).div(2).float()
        # the place of the level at the start of each bin, or a little before: positions may round up into it
        starts = torch.arange(TABLE_BINS + 1) / (TABLE_BINS / 2) - 1 - 1e-6
        self._below = torch.bucketize(starts, borders).float()
        self._borders = torch.cat([borders, torch.tensor([math.inf])])  # the last position of each lower level
        assert float(borders.diff().min()) > 2.01 / TABLE_BINS, "a bin may hold one border only"

    def nearest(self, position: Tensor) -> Tensor:
        """Return the codes nearest to positions; ties go to the lower level."""
        inside = position.clamp(-1, 1).flatten()
        bins = inside.add(1).mul_(TABLE_BINS / 2).to(torch.int32)
        places = self._below.to(bins.device).index_select(0, bins)
        places += inside > self._borders.to(bins.device).index_select(0, places.to(torch.int32))
        return places.add_(self.low).view(position.shape)


@dataclass(frozen=True)
class NumberFormat:
    """Describe a format: bits of a code, what scales may be, the only group size that it has (None: any)."""

    bits: int
    codebook: Codebook
    scales: Scales
    group_size: int | None = None
    usual_group_size: int | None = None

    def disagreement(self, bits: int, symmetric: bool, group_size: int | None) -> str | None:
        """Return how settings contradict this format, both sides named, or None when they do not."""
        grouped = self.group_size is None or self.group_size == group_size
        if bits == self.bits and symmetric and grouped:
            return None
        wanted = f"{self.bits} bits, symmetric" + (f", groups of {self.group_size}" if self.group_size else "")
        scope = f"groups of {group_size}" if group_size else "one scale a channel"
        return f"has {wanted}; asked for were {bits} bits, {'symmetric' if symmetric else 'asymmetric'}, {scope}"


E4M3 = Minifloat(4, 3, 7, num_patterns=127)  # the last pattern is no number
E2M1 = Minifloat(2, 1, 1, num_patterns=8)
NF4 = Table(NF4_LEVELS)

FORMATS: dict[Format, NumberFormat] = {
    "fp8": NumberFormat(8, E4M3, "float16"),
    "mxfp4": NumberFormat(4, E2M1, "power of two", group_size=32, usual_group_size=32),
    "nvfp4": NumberFormat(4, E2M1, "e4m3", group_size=16, usual_group_size=16),
    "nf4": NumberFormat(4, NF4, "float16", usual_group_size=64),
}


def power_of_two(scale: Tensor, *, up: bool = False) -> Tensor:
    """Return the power of two nearest to each scale by ratio, or with `up` the first that is not below it."""
    fraction, exponent = torch.frexp(scale.float())  # scale = fraction 2^exponent, 1/2 <= fraction < 1
    exponent = exponent - (fraction <= (0.5 if up else math.sqrt(0.5))).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(fraction), exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT))


def tensor_scale(largest: float) -> float:
    """Return the smallest power of two under which E4M3 holds scales up to `largest`: a tensor's scale in NVFP4.

    Scales that E4M3 holds under one such power it also holds under any smaller one that reaches the largest of them,
    so it need not be kept beside them.

    >>> tensor_scale(448.0), tensor_scale(0.1)
    (1.0, 0.000244140625)
    """
    if not 0 < largest < math.inf:
        return 1.0
    return float(2.0 ** math.ceil(math.log2(largest / LARGEST_E4M3)))


def e4m3_scale(scale: Tensor, of_tensor: float) -> Tensor:
    """Return the nearest scales that E4M3 holds under a tensor's scale, never zero, float32."""
    held = (scale.float() / of_tensor).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return held.float() * of_tensor
