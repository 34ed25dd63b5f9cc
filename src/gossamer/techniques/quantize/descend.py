"""Improve a layer one input channel at a time, again and again: coordinate descent on the error of its output.

Behdin, Acharya, Gupta, Keerthi and Mazumder, "QuantEase: Optimization-based Quantization for Language Models", 2023,
section 3. GPTQ and SparseGPT take each channel once and never look back: what is chosen early cannot answer to what is
chosen behind it. With all other channels fixed, the error of a row,

    error(w') = (w - w') S (w - w')^T,        S = second_II + damping * mean(diag S) * I

is a parabola in w'_j, so the best value of channel j is its vertex, or the value on the grid that is nearest to it:

    w'_j = nearest to  w'_j + r_j / S_jj,        r = (w - w') S

all rows at once. Every step lowers the error or leaves it, so a pass over all channels does, and passes may stop
anywhere. r is kept up to date: within `block` channels at once, for the others as one matrix product for each block.

Channels that no token excites stay as they are, and so do weights outside of a mask. Scales and zero points are not
touched; between passes `refit_scales` may move them. Invariants: no row's error rises; every code lies in the grid.

Shape suffixes: O rows, I inputs, G groups, b inputs of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.models.quantized import Quantized, rows_of

Move = Callable[[int, Tensor, Tensor], None]  # (channel, way to the vertex [O], which is lost; way that is gone [O])


def descend(
    weight_OI: Tensor,
    second_II: Tensor,
    start: Quantized,
    *,
    keep_OI: Tensor | None = None,
    passes: int = 1,
    damping: float = 0.01,
    block: int = 128,
) -> Quantized:
    """Return codes whose damped output error is not above that of `start`, row by row, on the same grids.

    `keep_OI` is False where a code must stay, by default where the weight is exactly zero.

    >>> descend(weight_OI, moments.second_II, gptq(weight_OI, moments.second_II, spec), passes=2)  # doctest: +SKIP
    """
    spec, codes_IO = start.spec, start.codes.t().float().contiguous()
    scale_GO = start.scale.t().float().contiguous()
    keep_OI = weight_OI != 0 if keep_OI is None else keep_OI
    keep_IO = None if bool(keep_OI.all()) else keep_OI.t().contiguous()
    codes_of, scales_of, group_size = codes_IO.unbind(0), scale_GO.unbind(0), start.group_size

    def move(channel: int, way_O: Tensor, moved_O: Tensor) -> None:
        code_O, scale_O = codes_of[channel], scales_of[channel // group_size]
        step_O = spec.steps(code_O)
        best_O = spec.nearest(way_O.div_(scale_O).add_(step_O))
        if keep_IO is not None:
            best_O = torch.where(keep_IO[channel], best_O, code_O)
        torch.sub(spec.steps(best_O), step_O, out=moved_O).mul_(scale_O)
        code_O.copy_(best_O)

    change_OI = weight_OI.float() - rows_of(start.dequantize(), start.transposed)
    _walk(change_OI, second_II, move, passes=passes, damping=damping, block=block)
    return replace(start, codes=codes_IO.to(torch.int8).t().contiguous())


def descend_values(
    weight_OI: Tensor,
    second_II: Tensor,
    start_OI: Tensor,
    *,
    passes: int = 1,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Return values [O, I] with the zeros of `start_OI` and a damped output error that is not above its, row by row.

    >>> descend_values(weight_OI, moments.second_II, sparsegpt(weight_OI, moments.second_II, 0.5))  # doctest: +SKIP
    """
    values_IO, keep_IO = start_OI.t().float().contiguous(), (start_OI != 0).t().contiguous()

    def move(channel: int, way_O: Tensor, moved_O: Tensor) -> None:
        torch.mul(way_O, keep_IO[channel], out=moved_O)
        values_IO[channel] += moved_O

    _walk(weight_OI.float() - start_OI.float(), second_II, move, passes=passes, damping=damping, block=block)
    return values_IO.t().contiguous()


def _walk(change_OI: Tensor, second_II: Tensor, move: Move, *, passes: int, damping: float, block: int) -> None:
    """Call `move` for one channel after another; `change_OI` is how far the weights lie from what is there."""
    num_inputs = len(second_II)
    damped_II = second_II.float()
    diagonal_I = damped_II.diagonal()
    undamped_I = diagonal_I.clone()
    excited_I = (undamped_I > 0).tolist()
    diagonal_I += damping * undamped_I.mean()  # in place, since a copy may be as large as all else; put back below
    try:
        against_IO = damped_II @ change_OI.t()  # one row for each channel: what is done for it is done in one stretch
        way_O = torch.empty_like(against_IO[0])  # made once: a step is short
        for _ in range(passes):
            for first in range(0, num_inputs, block):
                here = slice(first, min(first + block, num_inputs))
                here_bO, inside_bb = against_IO[here].clone(), damped_II[here, here]
                moved_bO, pivots_b = torch.zeros_like(here_bO), inside_bb.diagonal().tolist()
                for j, (against_O, moved_O, inside_b) in enumerate(zip(here_bO, moved_bO, inside_bb, strict=True)):
                    if excited_I[first + j]:
                        move(first + j, torch.div(against_O, pivots_b[j], out=way_O), moved_O)
                        # what lies in front of it in this block is not looked at before the next pass
                        here_bO[j + 1 :].addr_(inside_b[j + 1 :], moved_O, alpha=-1.0)
                against_IO.addmm_(damped_II[here].t(), moved_bO, alpha=-1.0)
    finally:
        diagonal_I.copy_(undamped_I)
