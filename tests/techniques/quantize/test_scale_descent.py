"""Scales of a whole network: gradients and steps are torch's own, nothing but scales moves, the divergence falls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.scale_descent import Factors, descend_scales, factor_gradient, scaled

SPECS = [QuantSpec(bits=3, symmetric=False, group_size=4), QuantSpec(bits=4), QuantSpec(bits=2, group_size=8)]


def rounded(spec: QuantSpec, transposed: bool = False, seed: int = 0) -> Quantized:
    weight = torch.randn(8, 8 if transposed else 16, generator=torch.Generator().manual_seed(seed))
    return quantize_weight(weight, spec, scale="mse", transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_gradient_in_the_factors_is_that_of_autograd(spec: QuantSpec, transposed: bool) -> None:
    codes = rounded(spec, transposed)
    factor = torch.full(codes.scale.shape, 1.25, requires_grad=True)
    steps = codes.codes.float().reshape(codes.codes.shape[0], codes.num_groups, -1)
    steps = steps if codes.zero_point is None else steps - codes.zero_point.float().unsqueeze(-1)
    rows = (steps * (codes.scale.float() * factor).unsqueeze(-1)).flatten(1)
    weight = rows.t() if transposed else rows
    weight.retain_grad()
    weight.sin().sum().backward()
    assert weight.grad is not None
    assert factor.grad is not None
    found = factor_gradient(weight.detach(), weight.grad, codes, factor.detach())
    torch.testing.assert_close(found, factor.grad)


def test_a_step_is_that_of_torchs_adam() -> None:
    codes = rounded(SPECS[0])
    ours, theirs = Factors.of(codes), torch.ones(codes.scale.shape, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-12)
    draw = torch.Generator().manual_seed(1)
    for number in range(5):
        gradient = torch.randn(codes.scale.shape, generator=draw)
        ours.step(gradient, 1e-2, number)
        theirs.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(ours.factor_OG, theirs.detach())


FORMATS = [
    QuantSpec(bits=8, format="fp8"),
    QuantSpec(bits=4, group_size=16, format="nvfp4"),
    QuantSpec(bits=4, group_size=32, format="mxfp4"),
    QuantSpec(bits=4, group_size=8, format="nf4"),
]


@pytest.mark.parametrize("spec", [*SPECS, *FORMATS], ids=str)
def test_scales_stay_numbers_of_their_format(spec: QuantSpec) -> None:
    codes = quantize_weight(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), spec, scale="mse")
    served = scaled(codes, torch.full(codes.scale.shape, 1.3))
    again = scaled(replace(served, scale=served.scale.clone()), torch.ones(codes.scale.shape))
    assert torch.equal(again.scale, served.scale)
    assert served.scale.dtype == codes.scale.dtype


@pytest.mark.parametrize("spec", [*SPECS, *FORMATS], ids=str)
def test_factors_of_one_change_nothing(spec: QuantSpec) -> None:
    codes = quantize_weight(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), spec, scale="mse")
    assert torch.equal(scaled(codes, torch.ones(codes.scale.shape)).dequantize(), codes.dequantize())


class Two(nn.Module):
    """Two layers, so that the error of the first can be made up for by the scales of the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 12, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """Return logits."""
        return torch.log_softmax(self.second(torch.relu(self.first(values))) * 4, -1)


def fitted(numbers: list[range], num_steps: int = 24) -> tuple[dict[str, Factors], dict[str, Quantized], list[float]]:
    """Return factors behind the steps of some ranges, one call for each, with the mean divergence before each step."""
    network = Two().requires_grad_(False)
    inputs = torch.randn(6, 32, 16, generator=torch.Generator().manual_seed(3))
    wanted = network(inputs)
    spec = QuantSpec(bits=2, symmetric=False, group_size=8)
    codes = {name: quantize_weight(weight, spec, scale="mse") for name, weight in network.named_parameters()}
    factors = {name: Factors.of(held) for name, held in codes.items()}
    losses: list[float] = []

    def loss(sample: int) -> Tensor:
        return nn.functional.kl_div(network(inputs[sample]), wanted[sample], reduction="batchmean", log_target=True)

    for part in numbers:
        descend_scales(
            dict(network.named_parameters()),
            codes,
            factors,
            loss,
            {number: [number % 6, (number + 1) % 6] for number in part},
            rate=2e-2,
            num_steps=num_steps,
            after_step=lambda _, mean: losses.append(mean),
        )
    return factors, codes, losses


def test_the_divergence_falls_and_codes_stay() -> None:
    factors, codes, losses = fitted([range(24)])
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    for name, held in codes.items():
        served = scaled(held, factors[name].factor_OG)
        assert torch.equal(served.codes, held.codes)
        assert not torch.equal(served.scale, held.scale)
        assert served.scale.dtype == torch.float16


def test_steps_go_on_where_they_were_left() -> None:
    whole, _, _ = fitted([range(24)])
    parts, _, _ = fitted([range(7), range(7, 24)])
    for name, held in whole.items():
        assert torch.equal(held.factor_OG, parts[name].factor_OG)
