"""The blocks of a GGUF file: how integers, scales and minima of neighbouring weights lie in bytes, both ways.

A row of a matrix is cut into blocks of 32 weights (super-blocks of 256 for the K formats). With q the integer of a
weight, d and m half-precision numbers of the block, and in a super-block integers a_j, b_j of its part j,

    Q4_0  Q5_0  Q8_0     w' = d q              q in [-8, 7], [-16, 15], [-128, 127]
    Q4_1  Q5_1           w' = d q + m          q in [0, 15], [0, 31]
    Q4_K  Q5_K           w' = (d a_j) q - (m b_j)      8 parts of 32, a_j and b_j in [0, 63], q in [0, 15], [0, 31]
    Q6_K                 w' = (d a_j) q        16 parts of 16, a_j in [-128, 127], q in [-32, 31]

Layouts: the GGUF specification and ggml-common.h of the ggml project. Where 256 does not divide a row, llama.cpp's own
tools take a plain format instead of a K format, and so do we: Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K.

Invariants: `unpack(pack(blocks)) == blocks`; `values` computes in float32 in the order of ggml's own decoder, so the
results are equal bit by bit. Left out: Q2_K, Q3_K and the formats with code books (IQ*), which are not uniform grids.

Shape suffixes: O rows, I inputs, N blocks (all rows), b weights of a block, P parts of a super-block, Y bytes of a
block, y bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BlockName = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"]
BLOCK = 32
SUPER_BLOCK = 256
HALF_MAX = 65504.0
CHUNK_ELEMENTS = 1 << 20  # weights decoded at a time: memory stays flat for large vocabularies


@dataclass(frozen=True)
class BlockFormat:
    """Describe a format: bits of a code, bytes and weights of a block, parts with a scale of their own, a minimum."""

    name: str
    bits: int
    num_bytes: int
    size: int = BLOCK
    num_parts: int = 1
    has_minimum: bool = False

    @property
    def low(self) -> int:
        """Return the smallest integer: zero where the block has a minimum."""
        return 0 if self.has_minimum else -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Return the largest integer."""
        return self.low + (1 << self.bits) - 1

    @property
    def group_size(self) -> int:
        """Return how many weights share a scale."""
        return self.size // self.num_parts

    @property
    def nested(self) -> bool:
        """Tell whether scales are themselves integers of a super-block."""
        return self.num_parts > 1

    def row_bytes(self, num_inputs: int) -> int:
        """Return the bytes of a row of `num_inputs` weights, which must be a multiple of `size`."""
        assert num_inputs % self.size == 0
        return num_inputs // self.size * self.num_bytes


FORMATS: dict[str, BlockFormat] = {
    block_format.name: block_format
    for block_format in (
        BlockFormat("Q4_0", 4, 18),
        BlockFormat("Q4_1", 4, 20, has_minimum=True),
        BlockFormat("Q5_0", 5, 22),
        BlockFormat("Q5_1", 5, 24, has_minimum=True),
        BlockFormat("Q8_0", 8, 34),
        BlockFormat("Q4_K", 4, 144, SUPER_BLOCK, 8, has_minimum=True),
        BlockFormat("Q5_K", 5, 176, SUPER_BLOCK, 8, has_minimum=True),
        BlockFormat("Q6_K", 6, 210, SUPER_BLOCK, 16),
    )
}
STAND_INS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Blocks:
    """Hold N blocks: `codes` int8 [N, b], `scale` half [N], `minimum` half [N] or None (the m of the lecture).

    The nested formats have `part_scale` and, where they have a minimum, `part_minimum`: int16 [N, P].
    """

    format: BlockFormat
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    part_scale: Tensor | None = None
    part_minimum: Tensor | None = None


def format_named(name: BlockName, num_inputs: int) -> BlockFormat | None:
    """Return the format for rows of `num_inputs` weights: the one named, or what stands in for it; None when none does.

    >>> format_named("q4_k", 256).name, format_named("q4_k", 576).name
    ('Q4_K', 'Q5_0')
    """
    form = FORMATS[name.upper()]
    if num_inputs % form.size:
        form = FORMATS[STAND_INS.get(form.name, form.name)]
    return form if num_inputs % form.size == 0 else None


def decode(rows_Oy: Tensor, block_format: BlockFormat) -> Tensor:
    """Return the float32 weights [O, I] of rows of bytes."""
    num_rows, num_inputs = rows_Oy.shape[0], rows_Oy.shape[1] // block_format.num_bytes * block_format.size
    weight_OI = torch.empty(num_rows, num_inputs, device=rows_Oy.device)
    step = max(1, CHUNK_ELEMENTS // max(1, num_inputs))
    for first in range(0, num_rows, step):
        part_Oy = rows_Oy[first : first + step]
        blocks = unpack(part_Oy.reshape(-1, block_format.num_bytes), block_format)
        weight_OI[first : first + step] = values(blocks).reshape(len(part_Oy), -1)
    return weight_OI


def values(blocks: Blocks) -> Tensor:
    """Return the float32 weights [N, b] of blocks."""
    scale_N1 = blocks.scale.float().unsqueeze(1)
    if blocks.part_scale is None:
        values_Nb = scale_N1 * blocks.codes.float()
        return values_Nb if blocks.minimum is None else values_Nb + blocks.minimum.float().unsqueeze(1)
    num_parts = blocks.format.num_parts
    codes_NPb = blocks.codes.float().reshape(-1, num_parts, blocks.format.size // num_parts)
    values_NPb = (scale_N1 * blocks.part_scale.float()).unsqueeze(2) * codes_NPb
    if blocks.minimum is not None and blocks.part_minimum is not None:
        values_NPb = values_NPb - (blocks.minimum.float().unsqueeze(1) * blocks.part_minimum.float()).unsqueeze(2)
    return values_NPb.flatten(1)


def pack(blocks: Blocks) -> Tensor:
    """Return blocks as bytes, uint8 [N, Y]."""
    form = blocks.format
    scale_N2 = _half_bytes(blocks.scale)
    if form.bits == 8:
        return torch.cat([scale_N2, blocks.codes.contiguous().view(torch.uint8)], 1)
    unsigned_Nb = (blocks.codes.to(torch.int16) - form.low).to(torch.uint8)
    if form.name == "Q6_K":
        assert blocks.part_scale is not None
        scales_NP = blocks.part_scale.to(torch.int8).view(torch.uint8)
        return torch.cat(
            [_join(unsigned_Nb & 15, 2, 64), _join(unsigned_Nb >> 4, 4, 32), scales_NP, scale_N2], 1
        )  # the one format whose half-precision scale comes last
    parts = [scale_N2]
    if blocks.minimum is not None:
        parts.append(_half_bytes(blocks.minimum))
    if form.nested:
        assert blocks.part_scale is not None and blocks.part_minimum is not None
        parts.append(_join_part_scales(blocks.part_scale, blocks.part_minimum))
    if form.bits == 5:
        # a super-block keeps bit j of byte i for weight i of part j, a block the bits of its weights in order
        high_Nb = unsigned_Nb >> 4
        parts.append(_join(high_Nb, 8, 32) if form.nested else _join(high_Nb, 8, 1))
    parts.append(_join(unsigned_Nb & 15, 2, 32 if form.nested else 16))
    return torch.cat(parts, 1)


def unpack(bytes_NY: Tensor, block_format: BlockFormat) -> Blocks:
    """Return the blocks that `pack` wrote as `bytes_NY`."""
    form, minimum_N, part_minimum_NP = block_format, None, None
    if form.bits == 8:
        return Blocks(form, bytes_NY[:, 2:].contiguous().view(torch.int8), _half(bytes_NY[:, :2]))
    if form.name == "Q6_K":
        low_NY, high_NY, scales_NP, scale_N2 = torch.split(bytes_NY, [128, 64, 16, 2], dim=1)
        unsigned_Nb = _cut(low_NY, 2, 64) | _cut(high_NY, 4, 32) << 4
        part_scale_NP = scales_NP.contiguous().view(torch.int8).to(torch.int16)
        return Blocks(form, _signed(unsigned_Nb, form), _half(scale_N2), part_scale=part_scale_NP)
    start = 2
    part_scale: Tensor | None = None
    if form.has_minimum:
        minimum_N, start = _half(bytes_NY[:, 2:4]), 4
    if form.nested:
        part_scale, part_minimum_NP = _cut_part_scales(bytes_NY[:, start : start + 12])
        start += 12
    num_low = form.size // 2
    unsigned_Nb = _cut(bytes_NY[:, -num_low:], 2, 32 if form.nested else 16)
    if form.bits == 5:
        high_NY = bytes_NY[:, start:-num_low]
        unsigned_Nb = unsigned_Nb | _cut(high_NY, 8, 32 if form.nested else 1) << 4
    codes_Nb = _signed(unsigned_Nb, form)
    return Blocks(form, codes_Nb, _half(bytes_NY[:, :2]), minimum_N, part_scale, part_minimum_NP)


def _half_bytes(half_N: Tensor) -> Tensor:
    return half_N.contiguous().unsqueeze(1).view(torch.uint8)


def _half(bytes_N2: Tensor) -> Tensor:
    return bytes_N2.contiguous().view(torch.float16).squeeze(1)


def _signed(unsigned_Nb: Tensor, block_format: BlockFormat) -> Tensor:
    return (unsigned_Nb.to(torch.int16) + block_format.low).to(torch.int8)


def _join(numbers_Nb: Tensor, per_byte: int, stride: int) -> Tensor:
    """Return numbers of 8 / per_byte bits as bytes; those of one byte lie `stride` apart, the first one lowest."""
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=numbers_Nb.device) * (8 // per_byte)
    grouped = numbers_Nb.reshape(numbers_Nb.shape[0], -1, per_byte, stride)
    return (grouped << shifts.view(1, 1, -1, 1)).sum(2).to(torch.uint8).flatten(1)


def _cut(bytes_NY: Tensor, per_byte: int, stride: int) -> Tensor:
    """Undo `_join`: uint8 [N, Y * per_byte]."""
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=bytes_NY.device) * (8 // per_byte)
    grouped = bytes_NY.reshape(bytes_NY.shape[0], -1, 1, stride)
    return (grouped >> shifts.view(1, 1, -1, 1) & (1 << (8 // per_byte)) - 1).flatten(1)


def _join_part_scales(scale_NP: Tensor, minimum_NP: Tensor) -> Tensor:
    """Return 8 scales and 8 minima of 6 bits as 12 bytes: the last four of each spread over the others' free bits."""
    scale_NP, minimum_NP = scale_NP.to(torch.uint8), minimum_NP.to(torch.uint8)
    near_scale, far_scale = scale_NP[:, :4], scale_NP[:, 4:]
    near_minimum, far_minimum = minimum_NP[:, :4], minimum_NP[:, 4:]
    return torch.cat(
        [
            near_scale | far_scale >> 4 << 6,
            near_minimum | far_minimum >> 4 << 6,
            far_scale & 15 | (far_minimum & 15) << 4,
        ],
        1,
    )


def _cut_part_scales(bytes_NY: Tensor) -> tuple[Tensor, Tensor]:
    near_scale, near_minimum, far = torch.split(bytes_NY, 4, dim=1)
    scale_NP = torch.cat([near_scale & 63, far & 15 | near_scale >> 6 << 4], 1)
    minimum_NP = torch.cat([near_minimum & 63, far >> 4 | near_minimum >> 6 << 4], 1)
    return scale_NP.to(torch.int16), minimum_NP.to(torch.int16)
