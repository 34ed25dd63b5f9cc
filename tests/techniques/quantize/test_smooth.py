"""SmoothQuant's factors against the paper's formula, and its predicted error against real 8-bit products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.techniques.quantize.awq import Reader
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.smooth import balanced, predicted_error, smooth_factors

SPEC = QuantSpec(bits=8)


def outlying_tI() -> Tensor:
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    x[:, [2, 13]] *= 60
    return x


def reader(x_tI: Tensor, rows: int = 16) -> Reader:
    weight = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows))
    return Reader(weight, x_tI.t() @ x_tI / len(x_tI), SPEC)


def measured(x_tI: Tensor, readers: list[Reader], factors_I: Tensor) -> float:
    """Return the mean squared error of real 8-bit products, the input's range that of the whole tensor."""
    rounded = ActivationSpec(kind="dynamic").fake_quantize(x_tI / factors_I)
    total = 0.0
    for each in readers:
        weight = quantize_weight(each.weight_OI * factors_I, SPEC).dequantize()
        total += float((rounded @ weight.t() - x_tI @ each.weight_OI.t()).square().sum(1).mean())
    return total


def test_factors_are_the_paper_s_up_to_one_common_factor() -> None:
    x = outlying_tI()
    most, weights = x.abs().amax(0), torch.rand(24, generator=torch.Generator().manual_seed(3)) + 0.1
    for alpha in (0.0, 0.5, 1.0):
        found = balanced(most, weights, alpha)
        ratio = found / (most**alpha / weights ** (1 - alpha))
        torch.testing.assert_close(ratio, ratio[0].expand(24), rtol=1e-4, atol=0)
        assert float(found.log().mean()) == pytest.approx(0, abs=1e-5)


def test_the_prediction_is_near_what_8_bit_products_do() -> None:
    x = outlying_tI()
    readers = [reader(x), reader(x, 9)]
    for factors in (torch.ones(24), balanced(x.abs().amax(0), readers[0].weight_OI.abs().amax(0), 0.5)):
        predicted = predicted_error(x.abs().amax(0), readers, factors)
        assert predicted == pytest.approx(measured(x, readers, factors), rel=0.35)


def test_outliers_are_moved_and_the_products_gain() -> None:
    x = outlying_tI()
    readers = [reader(x), reader(x, 9)]
    found = smooth_factors(x.abs().amax(0), readers)
    assert 0 < found.exponent <= 1
    assert found.error < found.plain_error
    assert measured(x, readers, found.factors_I) < 0.3 * measured(x, readers, torch.ones(24))


def test_nothing_is_moved_where_nothing_is_gained() -> None:
    flat = torch.ones(4, 8)
    found = smooth_factors(torch.ones(8), [Reader(flat, torch.eye(8), SPEC)])
    torch.testing.assert_close(found.factors_I, torch.ones(8))


def test_silent_channels_and_zero_columns_keep_their_factor() -> None:
    x = outlying_tI()
    x[:, 5] = 0
    one = reader(x)
    one.weight_OI[:, 7] = 0
    found = smooth_factors(x.abs().amax(0), [one])
    assert float(found.factors_I[5]) == float(found.factors_I[7]) == 1
    assert bool(torch.isfinite(found.factors_I).all())
    assert found.exponent > 0


def test_a_given_alpha_is_taken() -> None:
    x = outlying_tI()
    found = smooth_factors(x.abs().amax(0), [reader(x)], alpha=0.9)
    assert found.exponent == 0.9
    torch.testing.assert_close(found.factors_I, balanced(x.abs().amax(0), reader(x).weight_OI.abs().amax(0), 0.9))


def test_heads_of_a_group_get_equal_factors() -> None:
    x = outlying_tI()

    def shared(values_I: Tensor) -> Tensor:
        return values_I.reshape(2, 12).mean(0).repeat(2)

    found = smooth_factors(x.abs().amax(0), [reader(x)], shared=shared)
    assert found.exponent > 0
    torch.testing.assert_close(found.factors_I[:12], found.factors_I[12:])
