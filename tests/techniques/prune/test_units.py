"""Scores of units against slow loops, and the weights that make up for them against least squares."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.techniques.prune.units import (
    activation_scores,
    fisher_scores,
    joint_obs_order,
    made_up_for,
    magnitude_scores,
    obs_order,
    obs_path,
)
from gossamer.techniques.quantize.gptq import output_error

TINY = 1e-9


def case(outputs: int = 5, inputs: int = 12, tokens: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    mixing = torch.randn(inputs, inputs, generator=draw)
    inputs_tI = torch.randn(tokens, inputs, generator=draw) @ mixing
    return torch.randn(outputs, inputs, generator=draw), inputs_tI, inputs_tI.t() @ inputs_tI / tokens


def units(unit: int, inputs: int = 12) -> list[Tensor]:
    return list(torch.arange(inputs).view(-1, unit))


@pytest.mark.parametrize("unit", [1, 3])
def test_scores_are_those_of_slow_loops(unit: int) -> None:
    weight_OI, inputs_tI, second_II = case()
    fisher_O = torch.rand(5)
    for number, at in enumerate(units(unit)):
        assert float(magnitude_scores(weight_OI, unit)[number]) == pytest.approx(
            float(weight_OI[:, at].norm()), rel=1e-5
        )
        mean = float(inputs_tI[:, at].abs().mean())
        assert float(activation_scores(inputs_tI.abs().mean(0), unit)[number]) == pytest.approx(mean, rel=1e-5)
        lost_tO = inputs_tI[:, at] @ weight_OI[:, at].t()
        nats = 0.5 * float((lost_tO.square().mean(0) * fisher_O).sum())
        assert float(fisher_scores(weight_OI, second_II, fisher_O, unit)[number]) == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("unit", [1, 3])
def test_what_stays_is_the_least_squares_fit_to_the_outputs(unit: int) -> None:
    weight_OI, inputs_tI, second_II = case()
    stays_I = torch.ones(12, dtype=torch.bool)
    stays_I[units(unit)[1]] = False
    fitted = torch.linalg.lstsq(inputs_tI[:, stays_I].double(), (inputs_tI @ weight_OI.t()).double()).solution.t()
    found_OI = made_up_for(weight_OI, second_II, stays_I, damping=TINY)
    torch.testing.assert_close(found_OI[:, stays_I].double(), fitted, rtol=1e-3, atol=1e-4)
    assert not found_OI[:, ~stays_I].any()
    everything = torch.ones(12, dtype=torch.bool)
    torch.testing.assert_close(made_up_for(weight_OI, second_II, everything), weight_OI, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [1, 3])
def test_the_first_unit_to_go_is_the_one_whose_loss_is_least(unit: int) -> None:
    weight_OI, _, second_II = case()

    def left(gone: list[int]) -> float:
        stays_I = torch.ones(12, dtype=torch.bool)
        for number in gone:
            stays_I[units(unit)[number]] = False
        return output_error(weight_OI, made_up_for(weight_OI, second_II, stays_I, damping=TINY), second_II)

    count = 12 // unit
    first, *_ = obs_order(weight_OI, second_II, unit, 1, damping=TINY)
    assert first == min(range(count), key=lambda number: left([number]))
    pair = obs_order(weight_OI, second_II, unit, 2, damping=TINY)
    best = min(left(list(two)) for two in combinations(range(count), 2))
    assert left(pair) <= 1.5 * best  # greedy, but with what is left judged anew
    by_size = magnitude_scores(weight_OI, unit).argsort()[:2].tolist()
    assert left(pair) <= left(by_size)


@pytest.mark.parametrize("unit", [1, 3])
def test_each_unit_on_the_way_is_the_best_of_those_left_and_the_rest_makes_up_for_all(unit: int) -> None:
    weight_OI, _, second_II = case(inputs=36)
    counts = range(1, 36 // unit)
    stays_I = torch.ones(36, dtype=torch.bool)

    def left(gone: int) -> float:
        rest_I = stays_I.clone()
        rest_I[gone * unit : (gone + 1) * unit] = False
        return output_error(weight_OI, made_up_for(weight_OI, second_II, rest_I, damping=TINY), second_II)

    path = obs_path(weight_OI, second_II, unit, list(counts), damping=TINY)
    for count, (gone, found_OI) in zip(counts, path, strict=True):
        free = [number for number in range(36 // unit) if stays_I[number * unit]]
        assert left(gone[-1]) <= 1.001 * min(map(left, free))
        stays_I[gone[-1] * unit : (gone[-1] + 1) * unit] = False
        assert len(set(gone)) == len(gone) == count
        fitted_OI = made_up_for(weight_OI, second_II, stays_I, damping=TINY)
        torch.testing.assert_close(found_OI.float(), fitted_OI, rtol=1e-3, atol=1e-3)


def test_units_that_two_weights_read_go_by_the_losses_of_both() -> None:
    draw = torch.Generator().manual_seed(4)
    weights = [torch.randn(5, 12, generator=draw), 100 * torch.randn(7, 14, generator=draw)]
    seconds = [case(inputs=12)[2], case(inputs=14)[2]]
    columns = [torch.arange(12).view(4, 3), torch.arange(14)[2:].view(4, 3)]  # the second reads two others besides

    def lost(number: int) -> float:
        losses = []
        for weight_OI, second_II, at in zip(weights, seconds, columns, strict=True):
            stays_I = torch.ones(len(second_II), dtype=torch.bool)
            stays_I[at[number]] = False
            fitted_OI = made_up_for(weight_OI, second_II, stays_I, damping=TINY)
            losses.append(
                output_error(weight_OI, fitted_OI, second_II)
                / output_error(weight_OI, torch.zeros_like(weight_OI), second_II)
            )
        return sum(losses)

    (first,) = joint_obs_order(list(zip(weights, seconds, columns, strict=True)), 1, TINY)
    assert first == min(range(4), key=lost)


def test_of_two_units_that_do_the_same_only_one_goes() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs_tI = torch.randn(200, 4, generator=draw)
    inputs_tI[:, 1] = inputs_tI[:, 0] * 1.001
    weight_OI = torch.tensor([[1.0, 1.0, 1.2, 1.2]])
    gone = obs_order(weight_OI, inputs_tI.t() @ inputs_tI / 200, 1, 2, damping=TINY)
    assert len({0, 1} & set(gone)) == 1


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TechniqueError, match="NaN or infinite"):
        obs_order(torch.ones(1, 2), torch.tensor([[torch.nan, 0], [0, 1]]), 1, 1)
