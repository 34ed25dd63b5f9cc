"""GPTQ: round one input channel after another, and let the channels that are still free make up for each error.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, section 3 and algorithm 1. For every row w of a weight, find codes that make

    error(w') = (w - w') S (w - w')^T,        S = second_II, the mean of x x^T over calibration tokens

small. With U the upper Cholesky factor of (S + damping * mean(diag S) * I)^-1, S^-1 = U^T U, for one channel j after
another:

    q_j = nearest value on the grid to w_j          e_j = (w_j - q_j) / U_jj          w_k -= e_j U_jk  for all k > j

which is the exact optimum of the free channels for each step (optimal brain surgeon), all rows at once. Updates of far
channels are gathered over `block` channels and done as one matrix product (section 3.3, "lazy batch updates").

Which channels come first matters: `static` takes them by decreasing S_jj, since the first are rounded with the most
freedom left to repair them, and fixes every group's grid from the original weights beforehand, so that groups remain
neighbouring inputs and a file needs no index of channels. `none` keeps the order and takes a group's grid from the
weights as they are when the group is reached.

Grids are chosen by the squared error of the weights, each counted by 1 / (S^-1)_jj: what an error of channel j costs
when all other channels make up for it, which is how GPTQ will treat it. (Counted by S_jj, as if nothing made up for
it, layers of SmolLM2 end 9 % worse than with all counted alike, and like this 1 to 2 % better.)

Channels that no token excites (S_jj = 0) change nothing: they are rounded to the nearest and repair nothing. Weights
that are exactly zero when it starts stay so, since a mask must outlive it: what they were to make up for goes on to the
free channels behind, as in SparseGPT (Frantar and Alistarh 2023, section 3.4).

Invariants: with S a multiple of the identity the codes are those of round-to-nearest; every code lies in the grid; the
result does not depend on `block`.

Left out: groups of channels in the permuted order (act-order with `g_idx`), their grids taken when they are reached. On
eight layers of SmolLM2 (4 bits, groups of 64, refitted and improved as in `calibrated.py`) outputs err by 3 to 7 % less
and by 6 to 8 % more where heads are mixed (`o`), by 2.5 % less in the geometric mean. A file then needs the number of
a group for each channel, which no runtime here reads; compressed-tensors dropped it before 0.20.

Shape suffixes: O rows, I inputs, G groups, b inputs of a block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.techniques.quantize.grid import ScaleSearch, check_finite, check_group, chosen_grid, scale_unit
from gossamer.techniques.quantize.inverse_factor import inverse_factor

Order = Literal["none", "static"]


def gptq(
    weight_OI: Tensor,
    second_II: Tensor,
    spec: QuantSpec,
    *,
    scale: ScaleSearch = "mse",
    order: Order = "static",
    damping: float = 0.01,
    block: int = 128,
    transposed: bool = False,
    shape: tuple[int, ...] | None = None,
    name: str = "weight",
) -> Quantized:
    """Return codes of `weight_OI` on the grid of `spec`, chosen by the second moments of its input.

    `shape` and `transposed` describe the parameter that the rows came from. Raises TechniqueError when the group size
    does not divide the inputs, and for weights or moments that are not finite.

    >>> gptq(torch.eye(2), torch.eye(2), QuantSpec(bits=8)).codes.tolist()
    [[127, 0], [0, 127]]
    """
    num_rows, num_inputs = weight_OI.shape
    group_size = spec.group_size or num_inputs
    check_group(num_inputs, spec, name)
    check_finite(weight_OI, name)
    device = weight_OI.device
    channels = torch.arange(num_inputs, device=device)
    if order == "static":
        channels = torch.argsort(second_II.diagonal(), descending=True, stable=True)
    factor_II = inverse_factor(second_II, damping, name, channels)
    # one row for each channel, in the order that they are taken: what is done for a channel is done in one stretch
    rows_IO = weight_OI.t()[channels].float()
    zero_IO = rows_IO == 0 if bool((weight_OI == 0).any()) else None
    # what an error of one channel costs once all others have made up for it: 1 / (S^-1)_jj, and S^-1 = U^T U
    importance_I = torch.empty(num_inputs, device=device)
    importance_I[channels] = 1 / factor_II.square().sum(0)
    unit = scale_unit(weight_OI, spec)
    grid = _grids(weight_OI.float(), spec, importance_I.view(-1, group_size), scale, unit)
    scale_GO, zero_GO = (part.t().contiguous() for part in grid)
    codes_IO = torch.empty(num_inputs, num_rows, device=device)
    taken, codes_of = channels.tolist(), codes_IO.unbind(0)
    position_O, present_O = (torch.empty(num_rows, device=device) for _ in range(2))  # made once: a step is short
    for start in range(0, num_inputs, block):
        stop = min(start + block, num_inputs)
        here_bO, factor_bb = rows_IO[start:stop], factor_II[start:stop, start:stop]
        errors_bO, pivots_b = torch.empty_like(here_bO), factor_bb.diagonal().tolist()
        for j, (weight_O, error_O, factor_b) in enumerate(zip(here_bO, errors_bO, factor_bb, strict=True)):
            channel = taken[start + j]
            group = channel // group_size
            if order == "none" and spec.group_size and channel % group_size == 0:
                present_gO = _present(rows_IO, errors_bO, factor_II, start, j, group_size)
                weights_g = importance_I[channel : channel + group_size][None]
                fresh = _grids(present_gO.t(), spec, weights_g, scale, unit)
                scale_GO[group], zero_GO[group] = fresh[0][:, 0], fresh[1][:, 0]
            scale_O, zero_O = scale_GO[group], zero_GO[group]
            code_O = spec.nearest(torch.div(weight_O, scale_O, out=position_O), zero_O)
            if zero_IO is not None:
                code_O = torch.where(zero_IO[start + j], zero_O, code_O)
            codes_of[channel].copy_(code_O)
            torch.sub(spec.steps(code_O), zero_O, out=present_O).mul_(scale_O)
            torch.sub(weight_O, present_O, out=error_O).div_(pivots_b[j])
            here_bO[j + 1 :].addr_(factor_b[j + 1 :], error_O, alpha=-1.0)
        rows_IO[stop:].addmm_(factor_II[start:stop, stop:].t(), errors_bO, alpha=-1.0)
    return Quantized(
        codes=codes_IO.to(torch.int8).t().contiguous(),
        scale=scale_GO.t().to(spec.scale_dtype).contiguous(),  # exact: the grids are of scales that files hold
        zero_point=None if spec.symmetric else zero_GO.t().to(torch.int8).contiguous(),
        spec=spec,
        shape=shape if shape is not None else tuple(weight_OI.shape),
        transposed=transposed,
    )


def output_error(weight_OI: Tensor, approximate_OI: Tensor, second_II: Tensor) -> float:
    """Return the mean squared error of the layer's output for one token, summed over its outputs."""
    difference_OI = (weight_OI - approximate_OI).double()
    return float(((difference_OI @ second_II.double()) * difference_OI).sum())


def _present(rows_IO: Tensor, errors_bO: Tensor, factor_II: Tensor, start: int, j: int, group_size: int) -> Tensor:
    """Return the next group's weights [g, O] with every update applied, also those that wait for the block's end."""
    first = start + j
    block = errors_bO.shape[0]
    inside = min(group_size, block - j)  # updates within the block have been made already
    present_gO = rows_IO[first : first + group_size].clone()
    if inside < group_size and j:
        waiting = factor_II[start : start + j, first + inside : first + group_size]
        present_gO[inside:].addmm_(waiting.t(), errors_bO[:j], alpha=-1.0)
    return present_gO


def _grids(
    weight_OI: Tensor, spec: QuantSpec, importance_Gg: Tensor, scale: ScaleSearch, unit: float
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point), each float32 [O, G], of the groups of neighbouring inputs."""
    groups_Ng = weight_OI.reshape(-1, importance_Gg.shape[1])
    scale_N1, zero_N1 = chosen_grid(groups_Ng, spec, scale, importance_Gg, unit)
    return scale_N1.reshape(weight_OI.shape[0], -1), zero_N1.reshape(weight_OI.shape[0], -1)
