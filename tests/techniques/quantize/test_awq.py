"""AWQ's searches against slow loops over samples, and against what each promises never to do worse than."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.models.quantized import QuantSpec
from gossamer.techniques.quantize.awq import (
    Clip,
    Reader,
    awq_factors,
    clipped_scale,
    round_clipped,
    scaled_error,
    scaled_moments,
)
from gossamer.techniques.quantize.gptq import output_error
from gossamer.techniques.quantize.grid import MIN_SHRINK, NUM_SHRINKS, minmax_grid, quantize_weight

SPEC = QuantSpec(bits=3, symmetric=False, group_size=8)


def inputs_tI(num_inputs: int = 32, tokens: int = 400) -> Tensor:
    """Return inputs with a few loud channels and some correlation between neighbours."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, num_inputs, generator=draw) @ torch.randn(num_inputs, num_inputs, generator=draw)
    loud = torch.ones(num_inputs)
    loud[::11] = 20.0
    return mixed / num_inputs**0.5 * loud


def weight_OI(rows: int = 12, num_inputs: int = 32) -> Tensor:
    return torch.randn(rows, num_inputs, generator=torch.Generator().manual_seed(1))


def moments(x_tI: Tensor) -> Tensor:
    return x_tI.t() @ x_tI / len(x_tI)


def test_the_scaled_error_is_that_of_the_samples() -> None:
    x, weight = inputs_tI(), weight_OI()
    factors = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5
    rounded = quantize_weight(weight * factors, SPEC).dequantize()
    wanted = float((x @ weight.t() - (x / factors) @ rounded.t()).square().sum(1).mean())
    assert scaled_error([Reader(weight, moments(x), SPEC)], factors) == pytest.approx(wanted, rel=1e-4)


def test_moments_behind_a_scaling_are_those_of_the_divided_inputs() -> None:
    x = inputs_tI()
    factors = torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5
    torch.testing.assert_close(scaled_moments(moments(x), factors), moments(x / factors), rtol=1e-4, atol=1e-4)


def test_the_search_finds_the_best_exponent_of_its_grid() -> None:
    x = inputs_tI()
    readers = [Reader(weight_OI(), moments(x), SPEC), Reader(weight_OI(5) * 2, moments(x), SPEC)]
    means = x.abs().mean(0)
    found = awq_factors(means, readers, num_exponents=10)
    tried = {}
    for step in range(11):
        factors = means ** (step / 10)
        tried[step / 10] = scaled_error(readers, factors / (factors.max() * factors.min()).sqrt())
    assert found.exponent == min(tried, key=lambda exponent: tried[exponent])
    assert found.error == pytest.approx(min(tried.values()), rel=1e-5)
    assert found.plain_error == pytest.approx(tried[0.0], rel=1e-5)
    assert found.error < 0.8 * found.plain_error
    assert float(found.factors_I.max() * found.factors_I.min()) == pytest.approx(1.0, rel=1e-4)


def test_equal_inputs_are_not_scaled() -> None:
    readers = [Reader(weight_OI(), torch.eye(32), SPEC)]
    found = awq_factors(torch.ones(32), readers)
    assert found.exponent == 0
    assert torch.equal(found.factors_I, torch.ones(32))
    silent = awq_factors(torch.zeros(32), [Reader(weight_OI(), torch.zeros(32, 32), SPEC)])
    assert torch.equal(silent.factors_I, torch.ones(32))


def test_a_dead_channel_does_not_take_the_range_of_factors() -> None:
    x = inputs_tI()
    x[:, 3] = 0
    found = awq_factors(x.abs().mean(0), [Reader(weight_OI(), moments(x), SPEC)])
    assert found.exponent > 0
    assert bool(torch.isfinite(found.factors_I).all())
    assert bool((found.factors_I > 0).all())


def test_heads_of_a_group_get_equal_factors() -> None:
    x = inputs_tI()

    def shared(values_I: Tensor) -> Tensor:
        return values_I.reshape(2, 16).mean(0).repeat(2)

    found = awq_factors(x.abs().mean(0), [Reader(weight_OI(), moments(x), SPEC)], shared=shared)
    assert found.exponent > 0
    assert torch.equal(found.factors_I[:16], found.factors_I[16:])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 3])
def test_clipping_lowers_the_error_that_it_looks_at(bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=8)
    second = moments(inputs_tI())
    weight = weight_OI(64)
    errors = {}
    ways: tuple[Clip, ...] = ("none", "diagonal", "full")
    for clip in ways:
        codes = round_clipped(weight, second, spec, clip=clip)
        errors[clip] = output_error(weight, codes.dequantize(), second)
        # codes are the nearest on the grid that was found
        again = torch.round(weight.reshape(64, 4, 8) / codes.scale.unsqueeze(-1))
        again = again + (0 if codes.zero_point is None else codes.zero_point.float().unsqueeze(-1))
        assert torch.equal(again.clamp(spec.low, spec.high).flatten(1), codes.codes.float())
    assert errors["full"] < min(errors["diagonal"], errors["none"])
    alone = torch.diag(second.diagonal())
    by_diagonal = [
        output_error(weight, round_clipped(weight, second, spec, clip=clip).dequantize(), alone) for clip in ways[:2]
    ]
    assert by_diagonal[1] < by_diagonal[0]


def test_the_choice_for_a_group_is_the_best_one_by_a_slow_loop() -> None:
    second, weight = moments(inputs_tI())[:16, :16], weight_OI(3, 16)
    scale, zero = (part.reshape(3, 2) for part in minmax_grid(weight.reshape(-1, 8), SPEC))
    found = clipped_scale(weight, scale, scale, zero, SPEC, second)

    def rounded(row: int, scales: list[float]) -> Tensor:
        parts = []
        for group, step in enumerate(scales):
            values, shift = weight[row, 8 * group : 8 * group + 8], float(zero[row, group])
            codes = (torch.round(values / step) + shift).clamp(SPEC.low, SPEC.high)
            parts.append((codes - shift) * step)
        return torch.cat(parts)

    shrinks = torch.linspace(1, MIN_SHRINK[3], NUM_SHRINKS[3]).tolist()
    for row in range(3):
        chosen = scale[row].tolist()
        for group in range(2):
            errors = {}
            for shrink in shrinks:
                trial = list(chosen)
                trial[group] = float(scale[row, group]) * shrink
                gone = weight[row] - rounded(row, trial)
                errors[trial[group]] = float(gone @ second @ gone)
            chosen[group] = min(errors, key=lambda step: errors[step])
        torch.testing.assert_close(found[row], torch.tensor(chosen))


def test_turned_weights_give_turned_codes() -> None:
    second, weight = moments(inputs_tI()), weight_OI()
    straight = round_clipped(weight, second, SPEC)
    turned = round_clipped(weight.t().contiguous(), second, SPEC, transposed=True)
    assert torch.equal(straight.codes, turned.codes)
    torch.testing.assert_close(turned.dequantize(), straight.dequantize().t())


def test_a_group_size_that_does_not_divide_is_told() -> None:
    with pytest.raises(TechniqueError, match="group_size 24 does not divide in_features 32 of fc"):
        round_clipped(weight_OI(), torch.eye(32), QuantSpec(bits=4, group_size=24), name="fc")
