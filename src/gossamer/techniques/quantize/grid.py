"""Round a weight matrix to a grid: where the scale of each group comes from, and round-to-nearest.

For one group of weights w, b bits, codes in [low, high] = [-2^(b-1), 2^(b-1) - 1]:

    min-max, symmetric     s = max(max(w) / high, max(-w) / -low, tiny)                                    z = 0
    min-max, asymmetric    s = (max(w, 0) - min(w, 0)) / (high - low)               z = round(low - min(w, 0) / s)
    mean squared error     s = argmin over r of || w - dequantize(quantize(w; r * s, z)) ||^2,      r from 1 down

The symmetric range uses the grid's extra negative step when the largest weight is negative, so nothing is clipped
that need not be. The search by mean squared error clips the tails of a group to make its steps finer (Choukroun et
al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference", section 3; Banner et al. 2018), then
refits the best scale by least squares for the codes found, s = <w, q> / <q, q>, and keeps it where the error falls.

Formats that are no integers (`models/levels.py`) have high and low levels in place of high and low. Their scales are
rounded to what the format holds before codes are chosen: MXFP4's min-max scale goes up to a power of two, and the
search tries its neighbours. E2M1 has nothing between 4 and 6, so a larger scale may be better: r begins at 3/2.

Invariant: every returned code is the nearest one on the returned grid, and the error of the searched grid is never
above that of min-max. Left out: weighting by activations (the calibrated solvers have it) and grids that do not
contain zero (a pruned weight must stay exactly zero).

Shape suffixes: O rows, I inputs, G groups, g inputs of a group, N groups of all rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.models.levels import E2M1, e4m3_scale, power_of_two, tensor_scale
from gossamer.models.quantized import Quantized, QuantSpec, rows_of
from gossamer.techniques.quantize.hqq import hqq_grid

ScaleSearch = Literal["minmax", "mse", "hqq"]

# candidates for r between 1 and MIN_SHRINK; at 8 bits there is little to clip, and little to gain
NUM_SHRINKS = {8: 6, 7: 8, 6: 12, 5: 16, 4: 20, 3: 20, 2: 20}
NUM_REFITS = 2
MIN_SHRINK = {8: 0.80, 7: 0.75, 6: 0.70, 5: 0.60, 4: 0.50, 3: 0.40, 2: 0.25}
WIDEST_E2M1 = 1.5  # of the min-max scale: the largest weight then lies at 4
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, torch.finfo(torch.float16).max
CHUNK_ELEMENTS = (
    1 << 18
)  # weights treated at a time: they stay in the cache, and memory stays flat for large vocabularies


def quantize_weight(
    weight: Tensor, spec: QuantSpec, *, scale: ScaleSearch = "minmax", transposed: bool = False, name: str = "weight"
) -> Quantized:
    """Round `weight` (any rank, one row per output channel; [I, O] when `transposed`) to the grid of `spec`.

    Raises TechniqueError when the group size does not divide the inputs or a weight is not finite; `name` is used in
    the message.

    >>> quantize_weight(torch.eye(2), QuantSpec(bits=8)).codes.tolist()
    [[127, 0], [0, 127]]
    """
    rows_OI = rows_of(weight.detach(), transposed)
    num_rows, num_inputs = rows_OI.shape
    check_group(num_inputs, spec, name)
    group_size = spec.group_size or num_inputs
    unit = scale_unit(rows_OI, spec)
    codes_OI = torch.empty(num_rows, num_inputs, dtype=torch.int8, device=rows_OI.device)
    scale_OG = codes_OI.new_empty(num_rows, num_inputs // group_size, dtype=spec.scale_dtype)
    zero_OG = None if spec.symmetric else torch.empty_like(scale_OG, dtype=torch.int8)
    step = max(1, CHUNK_ELEMENTS // num_inputs)
    for start in range(0, num_rows, step):
        here = slice(start, start + step)
        part_OI = rows_OI[here].float()
        check_finite(part_OI, name, rows_OI)
        groups_Ng = part_OI.reshape(-1, group_size)
        scale_N1, zero_N1 = chosen_grid(groups_Ng, spec, scale, unit=unit)
        codes_OI[here] = encode(groups_Ng, scale_N1, zero_N1, spec).view(part_OI.shape)
        scale_OG[here] = scale_N1.view(part_OI.shape[0], -1)
        if zero_OG is not None:
            zero_OG[here] = zero_N1.view(part_OI.shape[0], -1)
    return Quantized(
        codes=codes_OI, scale=scale_OG, zero_point=zero_OG, spec=spec, shape=tuple(weight.shape), transposed=transposed
    )


def check_group(num_inputs: int, spec: QuantSpec, name: str) -> None:
    """Raise TechniqueError when the groups of a grid do not divide the inputs of a weight."""
    if not spec.group_size or num_inputs % spec.group_size == 0:
        return
    message = f"group_size {spec.group_size} does not divide in_features {num_inputs} of {name}"
    if spec.number_format is not None and spec.number_format.group_size is not None:
        raise TechniqueError(message, f"{spec.format} has no other: name the layer under `ignore`, or use format: nf4")
    divisor = nearest_divisor(num_inputs, spec.group_size)
    raise TechniqueError(message, f"use group_size {divisor}, or name the layer under `ignore`")


def scale_unit(weight: Tensor, spec: QuantSpec) -> float:
    """Return what the scales of a whole weight are multiples of: NVFP4's second scale, else 1."""
    if spec.number_format is None or spec.number_format.scales != "e4m3" or not weight.numel():
        return 1.0
    return tensor_scale(max(float(weight.max()), -float(weight.min())) / spec.ends[1])


def check_finite(weight: Tensor, name: str, whole: Tensor | None = None) -> None:
    """Raise TechniqueError when a weight holds NaN or infinities, counting those of the `whole` it is part of."""
    # a sum is finite only when all terms are (or when it overflows: then count)
    if bool(torch.isfinite(weight.sum())):
        return
    counted = weight if whole is None else whole.float()
    if count := int((~torch.isfinite(counted)).sum()):
        raise TechniqueError(f"{count} of {counted.numel()} weights of {name} are NaN or infinite", "repair the model")


def chosen_grid(
    groups_Ng: Tensor, spec: QuantSpec, scale: ScaleSearch, importance_Gg: Tensor | None = None, unit: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point), each [N, 1], by min-max or one of the searches from there (see `mse_scale`)."""
    scale_N1, zero_N1 = minmax_grid(groups_Ng, spec, unit)
    if scale == "mse":
        return mse_scale(groups_Ng, scale_N1, zero_N1, spec, importance_Gg, unit), zero_N1
    if scale == "hqq":
        return hqq_grid(groups_Ng, scale_N1, zero_N1, spec, storable)
    return scale_N1, zero_N1


def minmax_grid(groups_Ng: Tensor, spec: QuantSpec, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (scale, zero point), each [N, 1], of the smallest grid that holds every weight of its group.

    `unit` is the `scale_unit` of the weight that the groups are of.
    """
    high_N1 = groups_Ng.amax(1, keepdim=True).clamp(min=0)
    low_N1 = groups_Ng.amin(1, keepdim=True).clamp(max=0)
    if spec.symmetric:
        lowest, highest = spec.ends
        scale_N1 = torch.maximum(high_N1 / highest, low_N1 / lowest)
    else:
        scale_N1 = (high_N1 - low_N1) / (spec.high - spec.low)
    scale_N1 = torch.where(scale_N1 > 0, scale_N1, torch.ones_like(scale_N1))  # an all-zero group keeps zero codes
    stored_N1 = storable(scale_N1, spec, unit, up=True)
    if spec.symmetric:
        return stored_N1, torch.zeros_like(stored_N1)
    return stored_N1, torch.clamp(torch.round(spec.low - low_N1 / scale_N1), spec.low, spec.high)


def mse_scale(
    groups_Ng: Tensor,
    scale_N1: Tensor,
    zero_N1: Tensor,
    spec: QuantSpec,
    importance_Gg: Tensor | None = None,
    unit: float = 1.0,
) -> Tensor:
    """Return the scale [N, 1] with the least squared error among shrunken and least-squares refitted ones.

    `importance_Gg` is what each squared error counts, the same for every row of a weight (rows being N / G).
    """
    best_scale = scale_N1
    best_error = squared_error(groups_Ng, scale_N1, zero_N1, spec, importance_Gg)
    shrinks = shrinks_of(spec)
    for attempt in range(len(shrinks) + NUM_REFITS):
        if attempt < len(shrinks):
            # with the zero point kept, a smaller scale clips both tails by the same share of their length
            trial_N1 = scale_N1 * shrinks[attempt]
        else:
            trial_N1 = refitted(groups_Ng, best_scale, zero_N1, spec)
        trial_N1 = storable(trial_N1, spec, unit)
        error = squared_error(groups_Ng, trial_N1, zero_N1, spec, importance_Gg)
        better = error < best_error
        best_scale = torch.where(better, trial_N1, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def shrinks_of(spec: QuantSpec) -> list[float]:
    """Return the shares of the min-max scale that a search tries besides the scale itself."""
    form = spec.number_format
    if form is not None and form.scales == "power of two":
        return [2.0, 0.5]
    count, widest = NUM_SHRINKS[spec.bits], 1.0 if form is None or form.codebook is not E2M1 else WIDEST_E2M1
    tried: list[float] = torch.linspace(widest, MIN_SHRINK[spec.bits], count).tolist()
    return tried[1:] if widest == 1.0 else tried


def storable(scale: Tensor, spec: QuantSpec | None = None, unit: float = 1.0, *, up: bool = False) -> Tensor:
    """Return scales as the numbers that files hold (in float32), never zero: float16 unless `spec` has others.

    `unit` is the weight's `scale_unit`; `up` takes powers of two that are not below. A scale is known to far less than
    11 bits, and 2 bytes instead of 4 save half a bit a weight in groups of 32. It is rounded before codes are chosen,
    so that codes fit the scale that is served. Raises TechniqueError above float16's range.
    """
    form = None if spec is None else spec.number_format
    if form is not None and form.scales == "power of two":
        return power_of_two(scale, up=up)
    if form is not None and form.scales == "e4m3":
        return e4m3_scale(scale, unit)
    largest = float(scale.max()) if scale.numel() else 0.0
    if largest > LARGEST_SCALE:
        raise TechniqueError(
            f"a group of weights needs the scale {largest:.3g}, float16 ends at {LARGEST_SCALE:.5g}",
            "the weights are out of any useful range: look at them with `gossamer inspect`",
        )
    return scale.clamp(min=SMALLEST_SCALE).half().float()


def refitted(groups_Ng: Tensor, scale_N1: Tensor, zero_N1: Tensor, spec: QuantSpec) -> Tensor:
    """Return the least-squares scale [N, 1] for the codes that `scale_N1` gives: <w, q> / <q, q>."""
    steps_Ng = spec.steps(encode(groups_Ng, scale_N1, zero_N1, spec)) - zero_N1
    norm_N1 = steps_Ng.square().sum(1, keepdim=True)
    least = 1.0 if spec.number_format is None else torch.finfo(torch.float32).tiny  # levels may be below 1
    fit_N1 = (groups_Ng * steps_Ng).sum(1, keepdim=True) / norm_N1.clamp(min=least)
    return torch.where((norm_N1 > 0) & (fit_N1 > 0), fit_N1, scale_N1)


def encode(groups_Ng: Tensor, scale_N1: Tensor, zero_N1: Tensor, spec: QuantSpec) -> Tensor:
    """Return the nearest codes [N, g] as floats."""
    return spec.nearest(torch.div(groups_Ng, scale_N1), zero_N1)


def squared_error(
    groups_Ng: Tensor, scale_N1: Tensor, zero_N1: Tensor, spec: QuantSpec, importance_Gg: Tensor | None = None
) -> Tensor:
    """Return the squared rounding error of each group, [N, 1]."""
    decoded_Ng = spec.steps(encode(groups_Ng, scale_N1, zero_N1, spec)).sub_(zero_N1).mul_(scale_N1)
    squares_Ng = decoded_Ng.sub_(groups_Ng).square_()
    if importance_Gg is not None:
        squares_Ng.view(-1, *importance_Gg.shape).mul_(importance_Gg)
    return squares_Ng.sum(1, keepdim=True)


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` nearest to `wanted`, powers of two first."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    powers = [size for size in divisors if size & (size - 1) == 0 and size >= 16]
    return min(powers or divisors, key=lambda size: abs(size - wanted))
