"""Grids in front of weights: the same values as files hold, the gradients as stated, tied weights, and order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.techniques.quantize.fake_grid import FakeGrid, fake_grids
from gossamer.techniques.quantize.grid import quantize_weight

SPECS = [
    QuantSpec(bits=3, group_size=8),
    QuantSpec(bits=4, symmetric=False, group_size=8),
    QuantSpec(bits=2, symmetric=False),
    QuantSpec(bits=8),
]


def codes_of(spec: QuantSpec, *, transposed: bool = False) -> Quantized:
    torch.manual_seed(0)
    weight = torch.randn(16, 12) if transposed else torch.randn(12, 16)
    return quantize_weight(weight, spec, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_weight_is_what_the_files_will_hold_at_the_start_and_on_the_way(spec: QuantSpec, transposed: bool) -> None:
    codes = codes_of(spec, transposed=transposed)
    grid = FakeGrid(codes, reach=20)
    position = grid.position()
    assert torch.equal(grid(position), codes.dequantize())
    assert torch.equal(grid.rounded(position).codes, codes.codes)
    with torch.no_grad():
        moved = position + 0.1 * torch.randn_like(position)
        grid.factor_OG.mul_(1 + 0.3 * torch.randn_like(grid.factor_OG))
    found = grid.rounded(moved)
    assert torch.equal(grid(moved), found.dequantize())
    assert not torch.equal(found.codes, codes.codes)
    assert not torch.equal(found.scale, codes.scale)
    assert found.scale.dtype == codes.scale.dtype


def test_gradients_are_those_of_the_lecture() -> None:
    codes = codes_of(QuantSpec(bits=3, symmetric=False, group_size=8))
    grid, slope = FakeGrid(codes, reach=5.0), torch.randn(12, 16)
    position = grid.position()
    position[0, 0] = 50.0  # beyond the end
    position.requires_grad_()
    weight = grid(position)
    weight.backward(slope)
    scale_OI = codes.scale.float().repeat_interleave(8, 1)
    wanted = slope * scale_OI * 5.0
    wanted[0, 0] = 0
    torch.testing.assert_close(position.grad, wanted)
    torch.testing.assert_close(grid.factor_OG.grad, (slope * weight.detach()).reshape(12, 2, 8).sum(-1))


def test_weights_that_are_zero_stay_zero_under_a_mask() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 16) * (torch.rand(12, 16) < 0.5)
    grid = FakeGrid(quantize_weight(weight, QuantSpec(bits=4, group_size=8)), reach=5.0, masked=True)
    position = grid.position().requires_grad_()
    grid(position).backward(torch.ones(12, 16))
    assert position.grad is not None
    assert bool((position.grad[weight == 0] == 0).all())
    assert bool((position.grad[grid(position) != 0] != 0).all())


class Tied(nn.Module):
    """Two layers of one weight, one with a bias behind it in the order of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.head = nn.Linear(16, 12)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return one prediction a token."""
        found: Tensor = self.head(self.table(ids))
        return found


def test_tied_weights_stay_one_and_everything_is_as_it_was_afterwards() -> None:
    network, codes = Tied(), codes_of(QuantSpec(bits=4, group_size=8))
    names, ids = list(network.state_dict()), torch.arange(12)
    with torch.no_grad():
        network.table.weight.copy_(codes.dequantize())
    before = network(ids).detach()
    with fake_grids(network, {"table.weight": codes}, reach=20) as grids:
        assert torch.equal(network(ids), before)
        position, grid = grids["table.weight"]
        with torch.no_grad():
            position.add_(0.1 * torch.randn_like(position))
        assert torch.equal(network.table.weight, grid.rounded(position).dequantize())
        assert torch.equal(network.head.weight, network.table.weight)
    assert network.head.weight is network.table.weight
    assert list(network.state_dict()) == names
    assert type(network.head) is nn.Linear
    assert torch.equal(network(ids), before)


def test_the_weight_of_a_convolution_is_trained_in_its_own_shape() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    codes = quantize_weight(network.get_parameter("0.weight").detach(), QuantSpec(bits=4))
    with torch.no_grad():
        network.get_parameter("0.weight").copy_(codes.dequantize())
    images = torch.randn(2, 3, 8, 8)
    before = network(images)
    with fake_grids(network, {"0.weight": codes}, reach=20) as grids:
        after = network(images)
        after.sum().backward()
        assert grids["0.weight"][0].grad is not None
    assert torch.equal(before, after)
