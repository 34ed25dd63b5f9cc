"""HQQ beside a loop over single weights, and what must hold whatever the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gossamer.errors import RecipeError
from gossamer.models.quantized import QuantSpec
from gossamer.recipe import Recipe
from gossamer.techniques.quantize.gptq import gptq, output_error
from gossamer.techniques.quantize.grid import minmax_grid, quantize_weight, storable
from gossamer.techniques.quantize.hqq import BETA, KAPPA, POWER, ROUNDS, hqq_grid, shrink
from gossamer.techniques.registry import resolve

SPECS = [QuantSpec(bits=bits, symmetric=False, group_size=16) for bits in (2, 3, 4, 8)]


def groups(seed: int = 0, count: int = 24, size: int = 16) -> Tensor:
    """Return weights of which a few are far larger than the rest."""
    draw = torch.Generator().manual_seed(seed)
    return 0.03 * torch.randn(count, size, generator=draw) * (1 + 6 * (torch.rand(count, size, generator=draw) > 0.95))


def slow_hqq(weights: list[float], scale: float, zero: int, spec: QuantSpec) -> tuple[float, int, float]:
    """Return (scale, zero point, loss) of one group, one weight after another."""

    def rounded(scale: float, zero: int) -> tuple[list[int], list[float], float]:
        codes = [min(spec.high, max(spec.low, round(w / scale) + zero)) for w in weights]
        errors = [w - (q - zero) * scale for w, q in zip(weights, codes, strict=True)]
        return codes, errors, sum(abs(error) ** POWER for error in errors)

    codes, errors, loss = rounded(scale, zero)
    best = (scale, zero, loss)
    for number in range(ROUNDS):
        beta, kept = BETA * KAPPA**number, []
        for w, error in zip(weights, errors, strict=True):
            size = abs(error) / scale
            forgiven = max(0.0, size - size ** (POWER - 1) / beta) if size else 0.0
            kept.append(w - math.copysign(forgiven, error) * scale)
        mean = sum(q - k / scale for q, k in zip(codes, kept, strict=True)) / len(weights)
        zero = min(spec.high, max(spec.low, round(mean)))
        squares = sum((q - zero) ** 2 for q in codes)
        fit = sum(k * (q - zero) for q, k in zip(codes, kept, strict=True)) / max(1, squares)
        scale = float(storable(torch.tensor(fit))) if fit > 0 else scale
        codes, errors, loss = rounded(scale, zero)
        if loss < best[2]:
            best = (scale, zero, loss)
    return best


def losses(weights: Tensor, scale_N1: Tensor, zero_N1: Tensor, spec: QuantSpec) -> Tensor:
    codes = (weights / scale_N1).round().add(zero_N1).clamp(spec.low, spec.high)
    return ((weights - (codes - zero_N1) * scale_N1).abs() ** POWER).sum(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_agrees_with_a_loop_over_single_weights(spec: QuantSpec) -> None:
    weights = groups()
    start = minmax_grid(weights, spec)
    scale, zero = hqq_grid(weights, *start, spec, storable)
    same = 0
    for row in range(len(weights)):
        wanted = slow_hqq(weights[row].tolist(), float(start[0][row]), int(start[1][row]), spec)
        same += (float(scale[row]), int(zero[row])) == (pytest.approx(wanted[0], rel=2e-3), wanted[1])
        # a weight on the border of two codes may send float32 and float64 different ways, to like losses
        assert float(losses(weights, scale, zero, spec)[row]) == pytest.approx(wanted[2], rel=0.05)
    assert same >= 0.8 * len(weights)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_group_gets_worse_and_grids_are_integer(spec: QuantSpec) -> None:
    weights = groups(1, count=200)
    start = minmax_grid(weights, spec)
    scale, zero = hqq_grid(weights, *start, spec, storable)
    before, after = losses(weights, *start, spec), losses(weights, scale, zero, spec)
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < 0.98 * float(before.sum())
    assert torch.equal(zero, zero.round())
    assert spec.low <= int(zero.min()) <= int(zero.max()) <= spec.high
    assert torch.equal(scale, scale.half().float())


def test_shrink_is_the_papers_rule() -> None:
    x = torch.linspace(-3, 3, 61)
    wanted = [math.copysign(max(0.0, abs(v) - abs(v) ** -0.3 / 10), v) if v else 0.0 for v in x.tolist()]
    torch.testing.assert_close(shrink(x, 10.0), torch.tensor(wanted), rtol=1e-4, atol=1e-6)


def test_weights_and_gptq_take_their_grids_from_it() -> None:
    spec, weight = SPECS[2], groups(2, count=8, size=32)
    plain = quantize_weight(weight, spec, scale="hqq")
    scale, zero = hqq_grid(weight.reshape(-1, 16), *minmax_grid(weight.reshape(-1, 16), spec), spec, storable)
    assert plain.zero_point is not None
    assert torch.equal(plain.scale.float().flatten(), scale.flatten())
    assert torch.equal(plain.zero_point.float().flatten(), zero.flatten())
    solved = gptq(weight, torch.eye(32), spec, scale="hqq")
    assert torch.equal(solved.codes, plain.codes)
    assert output_error(weight, solved.dequantize(), torch.eye(32)) > 0


@pytest.mark.parametrize("recipe", ["- quantize: {scale: hqq}", "- gptq: {scale: hqq, format: nf4}"])
def test_grids_without_zero_points_are_refused(recipe: str) -> None:
    with pytest.raises(RecipeError, match="chooses zero points"):
        resolve(Recipe.from_yaml(recipe))
    assert resolve(Recipe.from_yaml("- quantize: {scale: hqq, bits: 4, symmetric: false, group_size: 64}"))
