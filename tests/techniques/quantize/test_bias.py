"""Bias correction: outputs have the right mean, and what is left is what the covariance says."""

from __future__ import annotations

import pytest
import torch

from gossamer.models.quantized import QuantSpec
from gossamer.techniques.quantize.bias import corrected_bias
from gossamer.techniques.quantize.gptq import gptq
from gossamer.techniques.quantize.moments import Moments

SPEC = QuantSpec(bits=3, symmetric=False, group_size=8)


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments]:
    """Return a weight [O, I], a bias, inputs with means far from zero (as behind GELU or a norm), their moments."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(12, 16, generator=draw), torch.randn(12, generator=draw)
    mixing = torch.randn(16, 16, generator=draw) / 4
    inputs = torch.randn(400, 16, generator=draw) @ mixing + 2 * torch.randn(16, generator=draw)
    seen = Moments.empty(16)
    for part in inputs.split(100):
        seen.add(part)
    return weight, bias, inputs, seen


def test_moments_hold_mean_and_covariance(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments]) -> None:
    _, _, inputs, seen = layer
    torch.testing.assert_close(seen.mean_I, inputs.mean(0))
    torch.testing.assert_close(seen.covariance_II, torch.cov(inputs.t(), correction=0), atol=1e-4, rtol=1e-4)
    assert bool((seen.second_II == seen.second_II.t()).all())


def test_the_mean_of_every_output_is_as_it_was(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments],
) -> None:
    weight, bias, inputs, seen = layer
    rounded = gptq(weight, seen.covariance_II, SPEC).dequantize()
    corrected = corrected_bias(bias, weight, rounded, seen.mean_I)
    before, after = inputs @ weight.t() + bias, inputs @ rounded.t() + corrected
    torch.testing.assert_close(after.mean(0), before.mean(0), atol=1e-4, rtol=1e-4)
    left = (after - before).square().mean(0)
    change = weight - rounded
    torch.testing.assert_close(left, ((change @ seen.covariance_II) * change).sum(1), atol=1e-3, rtol=1e-3)


def test_solving_for_the_covariance_beats_correcting_afterwards(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Moments],
) -> None:
    weight, bias, inputs, seen = layer

    def error(rounded: torch.Tensor, corrected: bool) -> float:
        new = corrected_bias(bias, weight, rounded, seen.mean_I) if corrected else bias
        return float(((inputs @ rounded.t() + new) - (inputs @ weight.t() + bias)).square().mean())

    plain = gptq(weight, seen.second_II, SPEC).dequantize()
    centred = gptq(weight, seen.covariance_II, SPEC).dequantize()
    assert error(centred, corrected=True) < 0.9 * error(plain, corrected=True) <= 0.9 * error(plain, corrected=False)
