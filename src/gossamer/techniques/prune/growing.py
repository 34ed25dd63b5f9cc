"""Masks in front of weights that grow from step to step of a training: the schedule of `gradual`.

Masks and scores are buffers of the network, so that checkpoints hold them; the step says the rest. Every process sees
the same weights and the same averaged gradients, and so finds the same masks. What is masked keeps its value until the
end, when it is zero. Weights that were zero before stay so, and count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.models.parametrized import parametrized
from gossamer.models.quantized import rows_of
from gossamer.models.straight_through import straight_through
from gossamer.techniques.base import Decision
from gossamer.techniques.prune.growth import gone_of_layers, gone_of_pattern, grown
from gossamer.techniques.prune.masks import Pattern

CHOICES = 32  # how often at most masks are chosen while they grow: Zhu and Gupta leave hundreds of steps between two
By = Literal["magnitude", "movement"]
Within = Literal["layer", "model"]


@dataclass(frozen=True)
class Growth:
    """Say how far masks grow, by what, and in which part of the steps."""

    sparsity: float
    pattern: Pattern | None
    by: By
    within: Within
    start: float  # share of the steps behind which the first weight goes
    rest: float  # share of the steps, the last ones, that train what is left

    @property
    def final(self) -> float:
        """Return the share of weights that is gone at the end."""
        return self.sparsity if self.pattern is None else 1 - self.pattern[0] / self.pattern[1]

    def steps(self, steps: int) -> tuple[int, int]:
        """Return the step behind which masks begin to grow, and the first that has them whole.

        >>> Growth(0.6, None, "magnitude", "layer", start=0.1, rest=0.4).steps(100)
        (10, 60)
        """
        last = min(steps - 1, math.ceil((1 - self.rest) * steps))
        return min(last, int(self.start * steps)), last


class Masked(nn.Module):
    """Compute a weight with zeros where its mask has them."""

    stays: Tensor
    alive: Tensor
    score: Tensor | None

    def __init__(self, weight: Tensor, *, scored: bool, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.register_buffer("alive", weight != 0)
        self.register_buffer("stays", weight != 0)
        self.register_buffer("score", torch.zeros_like(weight, dtype=torch.float32) if scored else None)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight; gradients of what is masked pass where it has scores that look at them."""
        if self.score is None:
            return weight * self.stays
        return straight_through(weight, weight.detach() * self.stays)

    def rows(self, values: Tensor) -> Tensor:
        """Return scores in the weight's shape as [O, I], below all others where the weight was zero before."""
        return rows_of(torch.where(self.alive, values.float(), -math.inf), self.transposed)

    def put(self, gone_OI: Tensor) -> None:
        """Take another mask."""
        gone = (gone_OI.t() if self.transposed else gone_OI).reshape(self.stays.shape)
        self.stays.copy_(self.alive & ~gone)


class GrowingMasks:
    """Choose masks anew before steps, and keep scores of movement: the `Schedule` of a lesson."""

    def __init__(self, held: Sequence[tuple[nn.Parameter, Masked]], growth: Growth) -> None:
        self.held, self.growth = held, growth

    def at_once(self) -> None:
        """Take as many weights as at the end, the smallest: what training has to be better than."""
        self._choose(1.0, by="magnitude")

    def before_step(self, taken: int, steps: int) -> None:
        """Choose masks, where it is time."""
        first, last = self.growth.steps(steps)
        every = max(1, (last - first) // CHOICES)
        if taken == 0 or taken == last or (first < taken < last and (taken - first) % every == 0):
            self._choose((taken - first) / (last - first) if last > first else float(taken >= last), by=self.growth.by)

    def before_update(self) -> None:
        """Add up scores; what is masked does not learn."""
        for weight, mask in self.held:
            if mask.score is not None and weight.grad is not None:
                moved = weight.grad * weight.detach()
                if bool(torch.isfinite(moved).all()):  # a step in fp16 that overflowed is not taken either
                    mask.score -= moved
                weight.grad *= mask.stays

    def after_update(self) -> None:
        """Leave the weights: masks stand in front of them."""

    def settled(self, taken: int, steps: int) -> bool:
        """Say whether the last of the steps taken had the masks whole."""
        return taken > self.growth.steps(steps)[1]

    @torch.no_grad()
    def _choose(self, progress: float, by: By) -> None:
        sizes = [mask.rows(weight.detach().abs()) for weight, mask in self.held]
        scores = sizes
        if by == "movement":
            scores = [mask.rows(mask.score) for _, mask in self.held if mask.score is not None]
        if self.growth.within == "model":
            gone = gone_of_layers(scores, self._share(progress, [mask for _, mask in self.held]), sizes)
        else:
            gone = [self._gone(*each, progress) for each in zip(scores, sizes, self.held, strict=True)]
        for (_, mask), gone_OI in zip(self.held, gone, strict=True):
            mask.put(gone_OI)

    def _gone(self, score: Tensor, size: Tensor, held: tuple[nn.Parameter, Masked], progress: float) -> Tensor:
        share = self._share(progress, [held[1]])
        if self.growth.pattern is not None:
            return gone_of_pattern(score, self.growth.pattern, share, size)
        return gone_of_layers([score], share, [size])[0]

    def _share(self, progress: float, masks: Sequence[Masked]) -> float:
        """Return the share of zeros at a progress, from that of weights that were zero before on."""
        alive = sum(int(mask.alive.sum()) for mask in masks) / sum(mask.alive.numel() for mask in masks)
        return grown(min(1 - alive, self.growth.final), self.growth.final, progress)


@contextmanager
def growing_masks(network: nn.Module, decisions: Sequence[Decision], growth: Growth) -> Iterator[GrowingMasks]:
    """Put masks in front of the decided weights while the `with` lasts; what they masked at its end is zero then."""
    parts = {
        one.parameter: Masked(
            network.get_parameter(one.parameter).detach(),
            scored=growth.by == "movement",
            transposed=one.layer.transposed,
        )
        for one in decisions
    }
    try:
        with parametrized(network, parts) as held:
            yield GrowingMasks([(held[name], mask) for name, mask in parts.items()], growth)
    finally:
        with torch.no_grad():
            for name, mask in parts.items():
                network.get_parameter(name).mul_(mask.stays)
