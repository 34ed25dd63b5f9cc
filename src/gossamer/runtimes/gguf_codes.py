"""Our own codes in the blocks of a GGUF file, one by one, where a block has their grid.

For codes c with scale s and zero point z, w' = (c - z) s, and the q, d and m of a block (`models/gguf_blocks.py`)

    symmetric      q = c                      d = half(s)
    asymmetric     q = c - low                d = half(s)       m = half((low - z) d)

A group of 64, of 128 or a whole row repeats its scale in every block of 32, which changes nothing. Only scales change:
the format has half precision for them, so a weight moves by at most 2^-11 of its size (2^-24 for scales under 2^-14,
where half precision has fewer digits), and in asymmetric grids by at most 2^-11 of m besides: a weight that was
exactly zero there may come back as a tiny number. Codes of the blocks' own formats are their bytes and go in as such.

Shape suffixes: O rows, I inputs, N blocks, b weights of a block, y bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import ArtifactError
from gossamer.models.gguf_blocks import BLOCK, FORMATS, HALF_MAX, BlockFormat, Blocks, pack
from gossamer.models.quantized import Quantized, QuantSpec


def exact_format(spec: QuantSpec, num_inputs: int) -> BlockFormat | None:
    """Return the smallest format that holds codes of `spec` as they are, or None when there is none.

    >>> exact_format(QuantSpec(bits=4, group_size=64), 128).name
    'Q4_0'
    """
    if spec.format != "int" or num_inputs % BLOCK or (spec.group_size or num_inputs) % BLOCK:
        return None
    if spec.symmetric:
        return FORMATS["Q4_0" if spec.bits <= 4 else "Q5_0" if spec.bits == 5 else "Q8_0"]
    return FORMATS["Q4_1" if spec.bits <= 4 else "Q5_1"] if spec.bits <= 5 else None


def encode_codes(quantized: Quantized, name: str = "weight") -> tuple[BlockFormat, Tensor]:
    """Return the format that holds our codes one by one, and the rows as bytes, uint8 [O, y].

    Raises ArtifactError when no format has their grid, or when a scale is beyond half precision; `name` is for the
    message.
    """
    num_rows, num_inputs = quantized.codes.shape
    block_format = exact_format(quantized.spec, num_inputs)
    if block_format is None:
        raise ArtifactError(
            f"no GGUF block holds {quantized.spec} codes of {name} with rows of {num_inputs} as they are",
            "use symmetric 8 bits or less, or asymmetric 5 bits or less, in groups of a multiple of 32",
        )
    repeats = quantized.group_size // BLOCK
    scale_N = quantized.scale.repeat_interleave(repeats, dim=1).flatten().to(torch.float16)
    codes_Nb = quantized.codes.reshape(-1, BLOCK)
    minimum_N: Tensor | None = None
    if quantized.zero_point is not None:
        low = quantized.spec.low
        zero_N = quantized.zero_point.repeat_interleave(repeats, dim=1).flatten().float()
        minimum_N = ((low - zero_N) * scale_N.float()).to(torch.float16)
        codes_Nb = (codes_Nb.to(torch.int16) - low).to(torch.int8)
    for half_N, kind in ((scale_N, "scale"), (minimum_N, "minimum")):
        if half_N is not None and not bool(torch.isfinite(half_N).all()):
            largest = float(quantized.scale.abs().max())
            raise ArtifactError(
                f"a {kind} of {name} is beyond half precision ({HALF_MAX:g}): its largest scale is {largest:.4g}",
                f"name {name.removesuffix('.weight')} under `ignore`",
            )
    return block_format, pack(Blocks(block_format, codes_Nb, scale_N, minimum_N)).reshape(num_rows, -1)
