"""AWQ: before rounding, enlarge the input columns of a weight that meet large activations; then clip each group.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, "AWQ: Activation-aware Weight Quantization for LLM
Compression and Acceleration", 2023, section 3.2 (scaling, equations 4 and 5) and the released searches. A column that
is multiplied by f before rounding, and its input divided by f, is rounded f times finer as long as it does not set the
scale of its group. The factors are one family with one free number:

    f = mean_abs^a / sqrt(max(mean_abs^a) min(mean_abs^a)),    a in [0, 1]

and a is the one on a grid that makes small, summed over all layers that read the producer,

    error(a) = sum_layers  trace(D S D^T),        D = W - round(W diag(f)) diag(f)^-1,        S = mean of x x^T

a = 0 is plain rounding, so the found error is never above it. The paper runs the block again for every a; the second
moments give the same mean squared error of each layer's output without touching a sample. What is different then: the
paper measures behind the whole attention or MLP, here each layer counts by its own output.

Clipping (the released code's `auto_clip`) shrinks each group's grid so that steps get finer, as far as the layer's
output gains. With d the error of a group's weights in one row and p = D S, all groups' error against the inputs:

    diagonal    d diag(S_gg) d^T                           each weight by the power of its own input
    full        d S_gg d^T and what it changes in other groups: 2 (d' - d) p_g, group after group, p kept up to date

so with `full` every change lowers the exact error of the layer's output. It starts, row by row, from the better of no
clipping and the diagonal's, and goes over the groups NUM_PASSES times: its error is never above either's. The paper
leaves out queries and keys; with the layers' own errors there is no reason to. Shrinking keeps zero points.

Behind a scaling the same layer sees x / f: S' = S / (f f^T), which is all that another solver (GPTQ) needs to go on.

Shape suffixes: O rows, I inputs, G groups, g inputs of a group, N rows of one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.models.levels import tensor_scale
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.techniques.quantize.grid import ScaleSearch, encode, quantize_weight, shrinks_of, storable

Clip = Literal["none", "weights", "diagonal", "full"]

NUM_EXPONENTS = 20
SMALLEST_MEAN = 1e-4  # of the largest: a dead channel must not take the whole range of factors
NUM_PASSES = 2
CHUNK_ROWS = 4096  # rows are clipped one by one: memory stays flat for large vocabularies


@dataclass(frozen=True)
class Reader:
    """Hold one layer that reads the scaled channels: its rows, its input's second moments, its grid."""

    weight_OI: Tensor
    second_II: Tensor
    spec: QuantSpec


@dataclass(frozen=True)
class Factors:
    """Hold the factors found, the exponent a that they came from, and the readers' error with and without them."""

    factors_I: Tensor
    exponent: float
    error: float
    plain_error: float


def awq_factors(
    mean_abs_I: Tensor,
    readers: Sequence[Reader],
    *,
    shared: Callable[[Tensor], Tensor] = lambda values_I: values_I,
    num_exponents: int = NUM_EXPONENTS,
    scale: ScaleSearch = "minmax",
) -> Factors:
    """Return the factors for which the readers' rounded weights keep their outputs best.

    `shared` makes values equal where one producer channel feeds several inputs (grouped heads); `scale` is how groups
    get their scales while searching.

    >>> reader = Reader(torch.tensor([[0.3, 1.0]]), torch.diag(torch.tensor([100.0, 1.0])), QuantSpec(bits=4))
    >>> found = awq_factors(torch.tensor([10.0, 1.0]), [reader])
    >>> found.error < found.plain_error
    True
    """
    means_I = shared(mean_abs_I.float())
    largest = float(means_I.max())
    ones_I = torch.ones_like(means_I)
    plain_error = scaled_error(readers, ones_I, scale)
    best = Factors(ones_I, 0.0, plain_error, plain_error)
    if largest == 0:
        return best
    means_I = means_I.clamp(min=SMALLEST_MEAN * largest)
    for step in range(1, num_exponents + 1):
        exponent = step / num_exponents
        factors_I = means_I**exponent
        factors_I = factors_I / torch.sqrt(factors_I.max() * factors_I.min())
        error = scaled_error(readers, factors_I, scale)
        if error < best.error:
            best = Factors(factors_I, exponent, error, plain_error)
    return best


def scaled_error(readers: Sequence[Reader], factors_I: Tensor, scale: ScaleSearch = "minmax") -> float:
    """Return the readers' output error when they are rounded with their columns multiplied by the factors."""
    total = 0.0
    for reader in readers:
        rounded_OI = quantize_weight(reader.weight_OI.float() * factors_I, reader.spec, scale=scale).dequantize()
        error_OI = reader.weight_OI.float() - rounded_OI / factors_I
        # float32: errors are compared with each other, dozens a place, and the products take most of the time
        total += float(((error_OI @ reader.second_II) * error_OI).sum(dtype=torch.float64))
    return total


def scaled_moments(second_II: Tensor, factors_I: Tensor) -> Tensor:
    """Return the second moments of x / f: S / (f f^T)."""
    return second_II / factors_I.unsqueeze(0) / factors_I.unsqueeze(1)


def round_clipped(
    weight: Tensor,
    second_II: Tensor,
    spec: QuantSpec,
    *,
    clip: Clip = "full",
    transposed: bool = False,
    name: str = "weight",
) -> Quantized:
    """Round a parameter to the nearest on grids that are clipped as far as its output gains.

    `none` takes the extremes of each group, `weights` the least squared error of the weights alone. Raises
    TechniqueError as `quantize_weight` does.

    >>> round_clipped(torch.eye(2), torch.eye(2), QuantSpec(bits=8)).codes.tolist()
    [[127, 0], [0, 127]]
    """
    search: ScaleSearch = "mse" if clip == "weights" else "minmax"
    start = quantize_weight(weight, spec, scale=search, transposed=transposed, name=name)
    if clip in ("none", "weights"):
        return start
    rows_OI = (weight.t() if transposed else weight.flatten(1)).detach().float()
    scale_OG = start.scale.clone()
    zero_OG = start.zero_point.float() if start.zero_point is not None else torch.zeros_like(scale_OG)
    unit = tensor_scale(float(start.scale.max()))
    for rows in torch.split(torch.arange(len(rows_OI), device=rows_OI.device), CHUNK_ROWS):
        part = rows_OI[rows], start.scale[rows], zero_OG[rows]
        clipped = _diagonal if clip == "diagonal" else _full
        scale_OG[rows] = clipped(*part, spec, second_II, unit).to(scale_OG.dtype)
    codes_OGg = encode(
        rows_OI.reshape(*scale_OG.shape, start.group_size), scale_OG.unsqueeze(-1), zero_OG.unsqueeze(-1), spec
    )
    return Quantized(
        codes=codes_OGg.flatten(1).to(torch.int8),
        scale=scale_OG,
        zero_point=start.zero_point,
        spec=spec,
        shape=start.shape,
        transposed=transposed,
    )


def clipped_scale(
    weight_OI: Tensor,
    widest_OG: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    spec: QuantSpec,
    second_II: Tensor,
    unit: float = 1.0,
) -> Tensor:
    """Return scales [O, G], each that of `scale_OG` or a share of the widest, that lower every row's error D S D^T.

    Groups are taken in order, each with all others as they are by then. `unit` is the whole weight's `scale_unit`.
    """
    group_size = weight_OI.shape[1] // scale_OG.shape[1]
    shrinks = [1.0, *shrinks_of(spec)]
    error_OI = rounding_error(weight_OI, scale_OG, zero_OG, spec)
    against_OI = error_OI @ second_II
    found_OG = scale_OG.clone()
    for group in range(scale_OG.shape[1]):
        here, only = slice(group * group_size, (group + 1) * group_size), slice(group, group + 1)
        block_gg, weight_Og, error_Og = second_II[here, here], weight_OI[:, here], error_OI[:, here]
        best_change_O1 = weight_OI.new_zeros(len(weight_OI), 1)
        best_move_Og = torch.zeros_like(error_Og)
        for shrink in shrinks:
            trial_O1 = widest_OG[:, only] * shrink
            if spec.number_format is not None:
                trial_O1 = storable(trial_O1, spec, unit).to(widest_OG.dtype)
            move_Og = rounding_error(weight_Og, trial_O1, zero_OG[:, only], spec) - error_Og
            change_O1 = ((move_Og @ block_gg + 2 * against_OI[:, here]) * move_Og).sum(1, keepdim=True)
            better_O1 = change_O1 < best_change_O1
            best_change_O1 = torch.where(better_O1, change_O1, best_change_O1)
            best_move_Og = torch.where(better_O1, move_Og, best_move_Og)
            found_OG[:, only] = torch.where(better_O1, trial_O1, found_OG[:, only])
        error_OI[:, here] += best_move_Og
        against_OI.addmm_(best_move_Og, second_II[here])
    return found_OG


def rounding_error(weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, spec: QuantSpec) -> Tensor:
    """Return the weights less the nearest values on their grids, [O, I]."""
    groups_OGg = weight_OI.reshape(*scale_OG.shape, -1)
    scale_OG1, zero_OG1 = scale_OG.unsqueeze(-1), zero_OG.unsqueeze(-1)
    steps_OGg = spec.steps(encode(groups_OGg, scale_OG1, zero_OG1, spec)) - zero_OG1
    return (groups_OGg - steps_OGg * scale_OG1).reshape_as(weight_OI)


def _diagonal(
    weight_OI: Tensor, widest_OG: Tensor, zero_OG: Tensor, spec: QuantSpec, second_II: Tensor, unit: float
) -> Tensor:
    """Return scales clipped by the diagonal of the moments."""
    alone_II = torch.diag(second_II.diagonal())
    return clipped_scale(weight_OI, widest_OG, widest_OG, zero_OG, spec, alone_II, unit)


def _full(
    weight_OI: Tensor, widest_OG: Tensor, zero_OG: Tensor, spec: QuantSpec, second_II: Tensor, unit: float
) -> Tensor:
    """Return scales clipped by all moments, from the better start of each row."""
    starts = (widest_OG, _diagonal(weight_OI, widest_OG, zero_OG, spec, second_II, unit))
    errors_OI = [rounding_error(weight_OI, start, zero_OG, spec) for start in starts]
    plain_O1, diagonal_O1 = (((error @ second_II) * error).sum(1, keepdim=True) for error in errors_OI)
    scale_OG = torch.where(diagonal_O1 < plain_O1, starts[1], starts[0])
    for _ in range(NUM_PASSES):
        scale_OG = clipped_scale(weight_OI, widest_OG, scale_OG, zero_OG, spec, second_II, unit)
    return scale_OG
