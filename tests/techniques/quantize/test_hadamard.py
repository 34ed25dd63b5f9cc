"""Hadamard matrices are checked by their definition; fused rotations by what a small pre-norm network computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.techniques.quantize.hadamard import (
    fold_norm,
    hadamard,
    jacobsthal,
    random_hadamard,
    rotate_inputs,
    rotate_outputs,
)

# every multiple of 4 up to here but 92, 116, 156, 172, 184, 188, which need other constructions
REACHED = [1, 2, *(n for n in range(4, 200, 4) if n not in (92, 116, 156, 172, 184, 188))]


@pytest.mark.parametrize("order", REACHED)
def test_entries_have_one_size_and_rows_are_orthonormal(order: int) -> None:
    matrix = hadamard(order)
    signs = matrix * order**0.5
    assert bool(((signs - 1).abs().minimum((signs + 1).abs()) < 1e-12).all())
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [576, 896, 960, 1152, 1536])
def test_widths_of_real_models_are_reached(order: int) -> None:
    matrix = hadamard(order)
    probe = torch.randn(order, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ (matrix.t() @ probe), probe)
    assert float(matrix.abs().min()) == pytest.approx(order**-0.5) == float(matrix.abs().max())


@pytest.mark.parametrize(("order", "near"), [(3, 2), (92, 88), (0, 1), (6, 4)])
def test_other_orders_are_refused_with_the_nearest(order: int, near: int) -> None:
    with pytest.raises(TechniqueError, match=f"order {order}") as caught:
        hadamard(order)
    assert str(near) in str(caught.value.hint)


@pytest.mark.parametrize("size", [5, 7, 9, 13, 25, 27, 49])
def test_jacobsthal_matrices_of_prime_powers_have_their_product(size: int) -> None:
    # Q Q^T = q I - J and Q J = 0; symmetric for q = 1 mod 4, skew for q = 3 mod 4
    matrix = jacobsthal(size)
    ones = torch.ones(size, size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64) - ones)
    assert float((matrix @ ones).abs().max()) == 0
    assert torch.equal(matrix.t(), matrix if size % 4 == 1 else -matrix)


def test_a_prime_field_s_squares_are_euler_s() -> None:
    for a, b in itertools.product(range(11), repeat=2):
        euler = pow(a - b, 5, 11)
        assert float(jacobsthal(11)[a, b]) == (-1 if euler == 10 else euler)


def test_seeds_draw_different_rotations() -> None:
    one, same, other = random_hadamard(12, 0), random_hadamard(12, 0), random_hadamard(12, 1)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.t() @ one, torch.eye(12, dtype=torch.float64))


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(64, dtype=torch.float64)
    x[5] = 64.0
    assert float((x @ random_hadamard(64, 0)).abs().max()) == pytest.approx(8.0)


class Block(nn.Module):
    """Two sums of a pre-norm network: what reads and what writes the stream, with a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, 20), nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        added: Tensor = x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))
        return added


def test_a_pre_norm_network_computes_the_same_with_its_stream_rotated() -> None:
    torch.manual_seed(0)
    width = 12
    table, head, last = nn.Embedding(30, width), nn.Linear(width, 30, bias=False), nn.RMSNorm(width)
    blocks = nn.ModuleList([Block(width) for _ in range(2)])
    ids = torch.arange(10)

    def logits() -> Tensor:
        x = table(ids)
        for block in blocks:
            x = block(x)
        found: Tensor = head(last(x))
        return found

    with torch.no_grad():
        for norm in (last, *(block.norm for block in blocks if isinstance(block, Block))):
            norm.weight.uniform_(0.5, 2.0)
        before, stream = logits(), table(ids).clone()
        rotation = random_hadamard(width, 3)
        for block in blocks:
            assert isinstance(block, Block)
            ones, folded = fold_norm(block.norm.weight, [block.up.weight, block.gate.weight])
            block.norm.weight.copy_(ones)
            for layer, weight in zip((block.up, block.gate), folded, strict=True):
                layer.weight.copy_(rotate_inputs(weight, rotation))
            weight, bias = rotate_outputs(block.down.weight, rotation, block.down.bias)
            assert bias is not None
            block.down.weight.copy_(weight)
            block.down.bias.copy_(bias)
        ones, (folded_head,) = fold_norm(last.weight, [head.weight])
        last.weight.copy_(ones)
        head.weight.copy_(rotate_inputs(folded_head, rotation))
        table.weight.copy_(rotate_inputs(table.weight, rotation))
        torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(table(ids), (stream.double() @ rotation).float())
