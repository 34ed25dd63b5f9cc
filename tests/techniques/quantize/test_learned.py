"""Learned rounding beside the paper's update written out for one weight, and what it must never do."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.techniques.quantize.gptq import gptq
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.learned import learn_rounding

GRIDS = [QuantSpec(bits=4), QuantSpec(bits=3, symmetric=False, group_size=8), QuantSpec(bits=2, group_size=8)]


class Block:
    """Two layers with a bend between them, and samples of correlated inputs."""

    def __init__(self, seed: int = 0, samples: int = 16) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.weights = {"up": torch.randn(24, 16, generator=draw), "down": torch.randn(16, 24, generator=draw)}
        mixing = torch.randn(16, 16, generator=draw) * torch.logspace(0, -1, 16)[:, None]
        self.inputs = [torch.randn(12, 16, generator=draw) @ mixing for _ in range(samples)]
        self.targets = [self.run(self.weights, x) for x in self.inputs]

    def run(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ weights["up"].t()) @ weights["down"].t()

    def loss(self, weights: Mapping[str, Tensor], sample: int) -> Tensor:
        return (self.run(weights, self.inputs[sample]) - self.targets[sample]).square().mean()

    def nearest(self, spec: QuantSpec) -> dict[str, Quantized]:
        return {name: quantize_weight(weight, spec, scale="mse") for name, weight in self.weights.items()}

    def error(self, codes: Mapping[str, Quantized]) -> float:
        weights = {name: part.dequantize() for name, part in codes.items()}
        return sum(float(self.loss(weights, sample)) for sample in range(len(self.inputs)))


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_the_blocks_output_is_nearer_than_with_the_nearest_codes(spec: QuantSpec) -> None:
    block = Block()
    start = block.nearest(spec)
    learned, losses = learn_rounding(block.loss, block.weights, start, 16, steps=60, batch_size=4)
    assert block.error(learned) < 0.75 * block.error(start)
    assert len(losses) == 60
    for name, codes in learned.items():
        assert int(codes.codes.min()) >= spec.low
        assert int(codes.codes.max()) <= spec.high
        assert float((codes.codes - start[name].codes).abs().max()) <= 2  # offsets of half a code, and the scale's
        assert bool((codes.scale > 0).all())


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_learning_nothing_returns_any_start(spec: QuantSpec) -> None:
    block = Block()
    moments = torch.cat(block.inputs).t() @ torch.cat(block.inputs)
    far = gptq(block.weights["up"], moments, spec)  # many codes are not the nearest ones
    start = {**block.nearest(spec), "up": far}
    assert not torch.equal(far.codes, block.nearest(spec)["up"].codes)
    learned, _ = learn_rounding(block.loss, block.weights, start, 16, steps=1, batch_size=1, rate=1e-9)
    for name, codes in learned.items():
        assert torch.equal(codes.codes, start[name].codes)
        torch.testing.assert_close(codes.scale, start[name].scale)


def test_one_step_is_the_papers_update_written_out() -> None:
    block = Block(samples=1)
    weight, rate = {"up": block.weights["up"]}, 0.3
    spec = QuantSpec(bits=4)
    start = {"up": quantize_weight(weight["up"], spec, scale="mse")}

    def loss(weights: Mapping[str, Tensor], sample: int) -> Tensor:
        return block.loss({"down": block.weights["down"], **weights}, sample)

    found, _ = learn_rounding(loss, weight, start, 1, steps=1, batch_size=1, rate=rate)
    # dL/dw' by central differences at the start codes, in float64, one weight at a time
    value, scale = start["up"].dequantize().double(), start["up"].scale.double()
    down, x, target = block.weights["down"].double(), block.inputs[0].double(), block.targets[0].double()

    def slow(changed: Tensor) -> float:
        hidden = torch.nn.functional.silu(x @ changed.t())
        return float((hidden @ down.t() - target).square().mean())

    gradient = torch.zeros_like(value)
    for row in range(24):
        for column in range(16):
            nudge = torch.zeros_like(value)
            nudge[row, column] = 1e-6
            gradient[row, column] = (slow(value + nudge) - slow(value - nudge)) / 2e-6
    position = weight["up"].double() / scale
    inside = (position.round() >= spec.low) & (position.round() <= spec.high)  # beyond it the clamp stops gradients
    offset = -rate * torch.where(inside, gradient.sign(), 0)  # a positive scale keeps the sign
    # w' = clamp(round(w / (s f) + v)) s f: by f through the scale itself, and back through w / (s f) inside the grid
    steps = start["up"].codes.double() - torch.where(inside, position, 0)
    by_factor = (gradient * scale * steps).sum(1, keepdim=True)
    factor = 1 - rate / 8 * by_factor.sign()
    wanted = torch.clamp(torch.round(position / factor + offset), spec.low, spec.high)
    sure = ((position / factor + offset) - (position / factor + offset).floor() - 0.5).abs() > 1e-3
    torch.testing.assert_close(found["up"].scale.double(), scale * factor, rtol=2**-11, atol=0)
    assert torch.equal(found["up"].codes[sure].double(), wanted[sure])


def test_a_seed_gives_the_same_codes_and_another_gives_others() -> None:
    block = Block()
    start = block.nearest(GRIDS[1])
    once, again, other = (
        learn_rounding(block.loss, block.weights, start, 16, steps=20, batch_size=2, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert all(torch.equal(once[name].codes, again[name].codes) for name in start)
    assert any(not torch.equal(once[name].codes, other[name].codes) for name in start)
