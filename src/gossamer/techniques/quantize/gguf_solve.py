"""Weights onto the grids of GGUF blocks by weighted least squares: the solver of the technique `gguf`.

For one block with weights w_i, find integers q_i, a scale d and (where the format has one) a minimum m that make

    E = sum_i h_i (w_i - d q_i - m)^2                     h_i importance of input i: the mean of x_i^2 over tokens

small: with h the diagonal of the second moment of a layer's input this is the layer's squared output error, but for
the products of different inputs. Given d and m the best q_i is the nearest integer; given q the best d and m are

    no minimum     d = <h w q> / <h q q>
    a minimum      d = (S_h S_hwq - S_hw S_hq) / (S_h S_hqq - S_hq^2)       m = (S_hw - d S_hq) / S_h

(S_x the sum of x over the block). Both steps are taken in turn, from several starts: the range of the block, shrunk
step by step, so that clipped tails buy finer steps. Lloyd 1982, "Least squares quantization in PCM", on a uniform grid.
Scales are rounded to half precision before integers are chosen, so that E is the error of what the file holds.

Super-blocks have scales that are integers themselves, w' = (d a_j) q - (m b_j) for part j. The parts are solved alone;
d and m are the largest over the range of the integers; then in turn each part's (a_j, b_j, q) is solved for given d and
m, trying the integers next to its scale, and d, m are refitted to all 256 weights by the same least squares.

Invariants: E never rises from step to step; in plain blocks it is at most that of rounding to their range; a block of
zeros stays zeros. Left out: products of different inputs (GPTQ and learned rounding see them, and their codes need no
solving where a format has their grid), and minima above zero in super-blocks, which the format cannot hold.

Shape suffixes: O rows, I inputs, N blocks, P parts of a super-block (1 in a plain block), b weights of a part, y bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ArtifactError
from gossamer.models.gguf_blocks import HALF_MAX, BlockFormat, Blocks, pack

NUM_SHRINKS = {8: 6, 6: 10, 5: 14, 4: 18}
MIN_SHRINK = {8: 0.85, 6: 0.75, 5: 0.65, 4: 0.55}
NUM_REFITS = 3
NUM_ROUNDS = 3
PART_SCALE_HIGH = 63  # 6 bits in Q4_K and Q5_K; Q6_K has signed bytes
CHUNK_ELEMENTS = 1 << 19  # weights treated at a time: memory stays flat for large vocabularies


def solve(
    weight_OI: Tensor, block_format: BlockFormat, importance_I: Tensor | None = None, name: str = "weight"
) -> Tensor:
    """Return the rows of `weight_OI` as bytes of `block_format`, uint8 [O, y].

    `importance_I` weighs the inputs (the diagonal of their second moment); None counts all alike. Raises ArtifactError
    when blocks do not divide the rows, or weights or importance are not finite or too large for half precision.
    """
    num_inputs = weight_OI.shape[1]
    if num_inputs % block_format.size:
        raise ArtifactError(
            f"{block_format.name} holds blocks of {block_format.size}, which do not divide the {num_inputs} inputs "
            f"of {name}",
            "choose a format with blocks of 32, or name the layer under `ignore`",
        )
    largest = float(weight_OI.abs().max()) if weight_OI.numel() else 0.0
    if not largest <= HALF_MAX:
        raise ArtifactError(
            f"the largest weight of {name} is {largest:.4g}; half-precision scales reach {HALF_MAX:g}",
            f"name {name.removesuffix('.weight')} under `ignore`",
        )
    shape = (1, -1, block_format.num_parts, block_format.size // block_format.num_parts)
    importance = _damped(importance_I, num_inputs, name).to(weight_OI.device).reshape(shape)
    step = max(1, CHUNK_ELEMENTS // num_inputs)
    parts = []
    for rows_OI in torch.split(weight_OI.detach().float(), step):
        weights_NPb = rows_OI.reshape(rows_OI.shape[0], *shape[1:]).flatten(0, 1)
        importance_NPb = importance.expand(rows_OI.shape[0], -1, -1, -1).flatten(0, 1)
        blocks = _nested(weights_NPb, importance_NPb, block_format) if block_format.nested else None
        blocks = blocks or _plain(weights_NPb, importance_NPb, block_format)
        parts.append(pack(blocks).reshape(rows_OI.shape[0], -1))
    return torch.cat(parts)


def _damped(importance_I: Tensor | None, num_inputs: int, name: str) -> Tensor:
    """Return the importance with a ten-thousandth of its mean added: inputs that were never seen are not noise."""
    if importance_I is None:
        return torch.ones(num_inputs)
    importance = importance_I.detach().float().flatten()
    if importance.numel() != num_inputs or not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise ArtifactError(
            f"the importance of {name} has {importance.numel()} values for {num_inputs} inputs, or some are negative "
            "or not finite",
            "give the mean of the squared inputs, one number an input",
        )
    mean = float(importance.mean())
    return importance / mean + 1e-4 if mean > 0 else torch.ones(num_inputs)


@dataclass
class _Fit:
    """Hold the best grid of each part so far: scale, minimum, error [..., 1] and codes [..., b]."""

    scale: Tensor
    minimum: Tensor
    codes: Tensor
    error: Tensor

    def keep_better(self, other: _Fit) -> None:
        better = other.error < self.error
        self.scale = torch.where(better, other.scale, self.scale)
        self.minimum = torch.where(better, other.minimum, self.minimum)
        self.codes = torch.where(better, other.codes, self.codes)
        self.error = torch.where(better, other.error, self.error)


def _on_grid(values: Tensor, importance: Tensor, scale: Tensor, minimum: Tensor, form: BlockFormat) -> _Fit:
    """Return the nearest integers [..., b] on a grid, with their error."""
    divisor = torch.where(scale == 0, torch.inf, scale)  # a scale of zero: all integers zero
    codes = ((values - minimum) / divisor).round_().clamp_(form.low, form.high)
    error = (importance * (codes * scale + minimum - values).square()).sum(-1, keepdim=True)
    return _Fit(scale, minimum, codes, error)


def _refit(values: Tensor, importance: Tensor, fit: _Fit, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return the least-squares (scale, minimum) [..., 1] for the integers of a fit."""
    weighted = importance * fit.codes
    square = (weighted * fit.codes).sum(-1, keepdim=True)
    product = (weighted * values).sum(-1, keepdim=True)
    through_zero = torch.where(square > 0, product / square, fit.scale)
    if not form.has_minimum:
        return through_zero, fit.minimum
    total, codes_sum = importance.sum(-1, keepdim=True), weighted.sum(-1, keepdim=True)
    values_sum = (importance * values).sum(-1, keepdim=True)
    determinant = total * square - codes_sum.square()
    solvable = determinant > 1e-6 * total * square
    scale = torch.where(solvable, (total * product - values_sum * codes_sum) / determinant, fit.scale)
    minimum = (values_sum - scale * codes_sum) / total
    if form.nested:  # a minimum above zero cannot be held: the best grid without one
        above = minimum > 0
        scale, minimum = torch.where(above, through_zero, scale), torch.where(above, 0.0, minimum)
    return scale, minimum


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


def _search(values: Tensor, importance: Tensor, form: BlockFormat) -> _Fit:
    """Return the best grid found for each part; scales of plain blocks are half-precision numbers."""
    best: _Fit | None = None
    for scale, minimum in _starts(values, form):
        best = _try(values, importance, scale, minimum, form, best)
        best = _try(values, importance, *_refit(values, importance, best, form), form, best)
    assert best is not None
    for _ in range(NUM_REFITS):
        best = _try(values, importance, *_refit(values, importance, best, form), form, best)
    return best


def _try(
    values: Tensor, importance: Tensor, scale: Tensor, minimum: Tensor, form: BlockFormat, best: _Fit | None
) -> _Fit:
    if not form.nested:
        scale, minimum = _half(scale), _half(minimum)
    fit = _on_grid(values, importance, scale, minimum, form)
    if best is None:
        return fit
    best.keep_better(fit)
    return best


def _starts(values: Tensor, form: BlockFormat) -> list[tuple[Tensor, Tensor]]:
    """Return (scale, minimum) pairs: the range of each part, then shrunk ranges about the same centre."""
    shrinks = torch.linspace(1.0, MIN_SHRINK[form.bits], NUM_SHRINKS[form.bits]).tolist()
    if form.has_minimum:
        high, low = values.amax(-1, keepdim=True), values.amin(-1, keepdim=True)
        if form.nested:
            low = low.clamp(max=0)
            high = torch.maximum(high, low)
        scale = (high - low) / form.high
        starts = [(scale * shrink, (low + high - (high - low) * shrink) / 2) for shrink in shrinks]
        return [(scale, minimum.clamp(max=0) if form.nested else minimum) for scale, minimum in starts]
    position = values.abs().argmax(-1, keepdim=True)
    extreme = values.gather(-1, position)
    zero = torch.zeros_like(extreme)
    # the grid has one more step below zero: the extreme takes it, if need be by a negative scale
    wide = [(extreme / form.low * shrink, zero) for shrink in shrinks]
    return [(extreme / form.high, zero), *wide]


def _plain(values: Tensor, importance: Tensor, form: BlockFormat) -> Blocks:
    fit = _search(values, importance, form)
    codes = fit.codes.flatten(1).to(torch.int8)
    scale, minimum = (number.flatten().to(torch.float16) for number in (fit.scale, fit.minimum))
    return Blocks(form, codes, scale, minimum if form.has_minimum else None)


@dataclass
class _Super:
    """Hold super-blocks: numbers d and m [N, 1, 1], integers a and b [N, P, 1], and the fit that they make."""

    scale: Tensor
    minimum: Tensor
    part_scale: Tensor
    part_minimum: Tensor
    fit: _Fit


def _nested(values: Tensor, importance: Tensor, form: BlockFormat) -> Blocks:
    alone = _search(values, importance, form)
    found = best = _super_block(values, importance, alone, *_ranges(alone, form), form)
    for _ in range(NUM_ROUNDS):
        found = _super_block(values, importance, found.fit, *_refit_super(values, importance, found, form), form)
        _keep_better(best, found)
    codes = best.fit.codes.flatten(1).to(torch.int8)
    part_scale = best.part_scale.squeeze(2).to(torch.int16)
    scale = best.scale.flatten().to(torch.float16)
    if not form.has_minimum:
        return Blocks(form, codes, scale, part_scale=part_scale)
    part_minimum = best.part_minimum.squeeze(2).to(torch.int16)
    return Blocks(form, codes, scale, best.minimum.flatten().to(torch.float16), part_scale, part_minimum)


def _bounds(form: BlockFormat) -> tuple[int, int]:
    return (0, PART_SCALE_HIGH) if form.has_minimum else (-128, 127)


def _ranges(alone: _Fit, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return (d, m) [N, 1, 1] with which the integers reach the largest scale and minimum of the parts."""
    if form.has_minimum:
        scale = alone.scale.amax(1, keepdim=True) / PART_SCALE_HIGH
        return _half(scale), _half(-alone.minimum.amin(1, keepdim=True) / PART_SCALE_HIGH)
    extreme = alone.scale.gather(1, alone.scale.abs().argmax(1, keepdim=True))
    return _half(extreme / -128), torch.zeros_like(extreme)


def _super_block(
    values: Tensor, importance: Tensor, fit: _Fit, scale: Tensor, minimum: Tensor, form: BlockFormat
) -> _Super:
    """Return the best integers of each part for given (d, m), starting from the parts' own grids."""
    low, high = _bounds(form)
    nearest = _integers(fit.scale, scale, low, high)
    found: _Super | None = None
    for offset in (0, -1, 1):
        part_scale = (nearest + offset).clamp(low, high)
        part_minimum = _integers(-fit.minimum, minimum, 0, PART_SCALE_HIGH)
        for _ in range(2):
            trial = _on_grid(values, importance, part_scale * scale, -part_minimum * minimum, form)
            tried = _Super(scale, minimum, part_scale, part_minimum, trial)
            if found is None:
                found = tried
            else:
                better = trial.error < found.fit.error
                found.part_scale = torch.where(better, part_scale, found.part_scale)
                found.part_minimum = torch.where(better, part_minimum, found.part_minimum)
                found.fit.keep_better(trial)
            if not form.has_minimum:
                break
            rest = (importance * (values - trial.codes * trial.scale)).sum(-1, keepdim=True)
            part_minimum = _integers(-rest / importance.sum(-1, keepdim=True), minimum, 0, PART_SCALE_HIGH)
    assert found is not None
    return found


def _integers(numbers: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    return (numbers / torch.where(step == 0, torch.inf, step)).round_().clamp_(low, high)


def _refit_super(values: Tensor, importance: Tensor, found: _Super, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return the least-squares (d, m) [N, 1, 1] over all weights of a super-block, as half-precision numbers."""
    steps, lifts = found.part_scale * found.fit.codes, -found.part_minimum.expand_as(values)

    def total(product: Tensor) -> Tensor:
        return (importance * product).sum((1, 2), keepdim=True)

    steps_2, product = total(steps.square()), total(steps * values)
    alone = torch.where(steps_2 > 0, product / steps_2, found.scale)
    if not form.has_minimum:
        return _half(alone), found.minimum
    lifts_2, mixed, lifted = total(lifts.square()), total(steps * lifts), total(lifts * values)
    determinant = steps_2 * lifts_2 - mixed.square()
    solvable = determinant > 1e-6 * steps_2 * lifts_2
    scale = torch.where(solvable, (lifts_2 * product - mixed * lifted) / determinant, found.scale)
    minimum = torch.where(solvable, (steps_2 * lifted - mixed * product) / determinant, found.minimum)
    positive = (scale > 0) & (minimum >= 0)  # the integers are not negative: a sign that turned would undo the parts
    return _half(torch.where(positive, scale, found.scale)), _half(torch.where(positive, minimum, found.minimum))


def _keep_better(best: _Super, found: _Super) -> None:
    better = found.fit.error.sum(1, keepdim=True) < best.fit.error.sum(1, keepdim=True)
    best.scale = torch.where(better, found.scale, best.scale)
    best.minimum = torch.where(better, found.minimum, best.minimum)
    best.part_scale = torch.where(better, found.part_scale, best.part_scale)
    best.part_minimum = torch.where(better, found.part_minimum, best.part_minimum)
    best.fit = _Fit(
        torch.where(better, found.fit.scale, best.fit.scale),
        torch.where(better, found.fit.minimum, best.fit.minimum),
        torch.where(better, found.fit.codes, best.fit.codes),
        torch.where(better, found.fit.error, best.fit.error),
    )
