"""GPTQ beside a loop written straight from the paper, and what must hold whatever the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.models.quantized import QuantSpec
from gossamer.techniques.quantize.gptq import gptq, output_error
from gossamer.techniques.quantize.grid import minmax_grid, quantize_weight
from gossamer.techniques.quantize.inverse_factor import inverse_factor

GRIDS = [
    QuantSpec(bits=4),
    QuantSpec(bits=4, symmetric=False, group_size=8),
    QuantSpec(bits=3, group_size=16),
    QuantSpec(bits=2, symmetric=False, group_size=8),
    QuantSpec(bits=8),
]


def layer(seed: int = 0, rows: int = 6, inputs: int = 32, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Return a weight, and second moments of inputs that are correlated and of very different size."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=draw) * torch.logspace(0, -1.5, inputs)[:, None]
    x_tI = torch.randn(tokens, inputs, generator=draw) @ mixing
    return torch.randn(rows, inputs, generator=draw), x_tI.t() @ x_tI / tokens


def slow_gptq(weight_OI: Tensor, second_II: Tensor, spec: QuantSpec, damping: float, channels: list[int]) -> Tensor:
    """Return the dequantized weight by the greedy recursion on the inverse Hessian itself, in float64, min-max grids.

    Optimal brain quantization with a fixed order: after channel j is fixed, its row and column are eliminated from the
    inverse (GPTQ, equation 3), which is what the Cholesky factor does at once.
    """
    weight, moments = weight_OI.double().clone(), second_II.double().clone()
    size = spec.group_size or weight.shape[1]
    moments += damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    inverse = torch.linalg.inv(moments)
    grids = [minmax_grid(weight_OI[:, start : start + size], spec) for start in range(0, weight.shape[1], size)]
    rounded = torch.zeros_like(weight)
    for channel in channels:
        scale, zero = (part[:, 0].half().double() for part in grids[channel // size])  # as scales are stored
        code = torch.clamp(torch.round(weight[:, channel] / scale) + zero, spec.low, spec.high)
        rounded[:, channel] = (code - zero) * scale
        error = (weight[:, channel] - rounded[:, channel]) / inverse[channel, channel]
        weight -= error[:, None] * inverse[channel]
        inverse = inverse - torch.outer(inverse[:, channel], inverse[channel]) / inverse[channel, channel]
    return rounded


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_agrees_with_the_recursion_of_the_paper(spec: QuantSpec) -> None:
    weight_OI, second_II = layer()
    channels = torch.argsort(second_II.diagonal(), descending=True, stable=True).tolist()
    slow = slow_gptq(weight_OI, second_II, spec, 0.01, channels)
    fast = gptq(weight_OI, second_II, spec, scale="minmax", block=7)
    assert output_error(weight_OI, fast.dequantize(), second_II) <= 1.01 * output_error(weight_OI, slow, second_II)
    assert float((fast.dequantize() - slow).abs().lt(1e-5).double().mean()) > 0.97  # ties may round the other way


def test_per_channel_in_natural_order_agrees_too() -> None:
    weight_OI, second_II = layer(seed=3)
    slow = slow_gptq(weight_OI, second_II, QuantSpec(bits=4), 0.05, list(range(32)))
    fast = gptq(weight_OI, second_II, QuantSpec(bits=4), scale="minmax", order="none", damping=0.05)
    assert float((fast.dequantize() - slow).abs().lt(1e-5).double().mean()) > 0.97


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["none", "static"])
def test_the_output_error_is_well_below_that_of_rounding_to_the_nearest(spec: QuantSpec, order: str) -> None:
    ratios = []
    for seed in range(5):
        weight_OI, second_II = layer(seed)
        nearest = quantize_weight(weight_OI, spec, scale="mse").dequantize()
        found = gptq(weight_OI, second_II, spec, order=order).dequantize()  # type: ignore[arg-type]
        ratios.append(output_error(weight_OI, found, second_II) / output_error(weight_OI, nearest, second_II))
    assert max(ratios) < 1.0
    assert sum(ratios) / len(ratios) < 0.7


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["none", "static"])
def test_uncorrelated_inputs_leave_rounding_to_the_nearest(spec: QuantSpec, order: str) -> None:
    weight_OI, _ = layer()
    nearest = quantize_weight(weight_OI, spec, scale="mse")
    found = gptq(weight_OI, 3 * torch.eye(32), spec, order=order)  # type: ignore[arg-type]
    assert torch.equal(found.codes, nearest.codes)
    torch.testing.assert_close(found.scale, nearest.scale)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.sampled_from(["none", "static"]), st.sampled_from(GRIDS))
def test_the_block_changes_nothing(block: int, order: str, spec: QuantSpec) -> None:
    weight_OI, second_II = layer(seed=1)
    whole = gptq(weight_OI, second_II, spec, order=order, block=32)  # type: ignore[arg-type]
    parts = gptq(weight_OI, second_II, spec, order=order, block=block)  # type: ignore[arg-type]
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-3, atol=1e-4)
    assert float((parts.codes == whole.codes).double().mean()) > 0.97
    assert int(parts.codes.min()) >= spec.low
    assert int(parts.codes.max()) <= spec.high


def test_channels_that_no_token_excites_are_rounded_to_the_nearest() -> None:
    weight_OI, second_II = layer()
    second_II[5], second_II[:, 5] = 0.0, 0.0
    spec = QuantSpec(bits=4)
    found = gptq(weight_OI, second_II, spec)
    nearest_O = torch.round(weight_OI[:, 5] / found.scale[:, 0].float()).clamp(spec.low, spec.high)
    assert torch.equal(found.codes[:, 5].float(), nearest_O)
    assert bool(torch.isfinite(found.dequantize()).all())
    silent = gptq(weight_OI, torch.zeros(32, 32), spec)
    assert torch.equal(silent.codes, quantize_weight(weight_OI, spec, scale="mse").codes)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    _, second_II = layer()
    upper = inverse_factor(second_II, 0.1)
    damped = second_II + 0.1 * second_II.diagonal().mean() * torch.eye(32)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(32), atol=1e-3, rtol=1e-3)
    assert bool((upper.tril(-1) == 0).all())


def test_what_cannot_be_solved_is_told() -> None:
    weight_OI, second_II = layer()
    with pytest.raises(TechniqueError, match="group_size 24 does not divide in_features 32 of q"):
        gptq(weight_OI, second_II, QuantSpec(bits=4, group_size=24), name="q")
    with pytest.raises(TechniqueError, match="NaN or infinite on calibration rows"):
        gptq(weight_OI, second_II * float("nan"), QuantSpec(bits=4))
    with pytest.raises(TechniqueError, match="1 of 192 weights"):
        gptq(weight_OI.index_fill(1, torch.tensor([0]), 0).index_put((torch.tensor([0]), torch.tensor([0])),
             torch.tensor(float("nan"))), second_II, QuantSpec(bits=4))  # fmt: skip
    with pytest.raises(TechniqueError, match="not positive definite"):
        gptq(weight_OI, -second_II, QuantSpec(bits=4))


def test_grids_count_errors_by_what_they_cost_behind_the_others() -> None:
    spec = QuantSpec(bits=3, group_size=16)
    gains = []
    for seed in range(6):
        weight_OI, second_II = layer(seed)
        damped_II = second_II.double() + 0.01 * second_II.diagonal().mean() * torch.eye(32)
        cost_I = 1 / torch.linalg.inv(damped_II).diagonal()

        def cost(scale_OG: Tensor, weight: Tensor = weight_OI, cost_I: Tensor = cost_I) -> Tensor:
            groups, scale = weight.view(6, 2, 16), scale_OG.float().unsqueeze(-1)
            error = groups - torch.clamp(torch.round(groups / scale), spec.low, spec.high) * scale
            return (error.square() * cost_I.view(2, 16)).sum(-1)

        found = cost(gptq(weight_OI, second_II, spec).scale)
        gains.append(found / cost(quantize_weight(weight_OI, spec, scale="mse").scale))
    # (the search refits scales without the costs, so that a group may miss what that found by luck)
    assert float(torch.stack(gains).log().mean()) < -0.01
