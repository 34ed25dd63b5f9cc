"""Ranks that go from layer to layer while thin layers are trained: AdaLoRA, by what `peft` finds of use.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023: beside a weight stands

    U diag(e) D,        U [O, R], e [R], D [R, I], all trained

All layers begin with START times the ranks that they have in the mean at the end. What a rank is good for is the
product of how much the loss moves with its numbers, |p dL/dp|, and of how much that varies from step to step, both
averaged over steps (section 3.2); those that are good for least lose their e, over all layers, along a cubic
(section 3.3). The first steps take none, the last ones train what is left. So that U and D are like a decomposition's,
their products with themselves are kept near the identity by a term in the loss, which is left out where rows judge.

What was averaged lies in buffers beside the layers, so that checkpoints hold it; the step says the rest.

Shape suffixes: O outputs, I inputs, R ranks at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer, RankAllocator
from torch import Tensor, nn

from gossamer.train.objectives import Seen

NAME = "default"
START = 1.5  # times the mean rank at the end: what all layers begin with
FIRST = 0.1  # share of the steps behind which ranks begin to go
REST = 0.5  # share of the steps, the last ones, that train what is left
CHOICES = 32  # how often at most ranks are chosen
ORTHOGONAL = 0.1  # weight of that term in the loss
PARTS = ("lora_A", "lora_E", "lora_B")


def first_rank(rank: int) -> int:
    """Return the rank that every layer begins with where the mean at the end is `rank`.

    >>> first_rank(8)
    12
    """
    return math.ceil(START * rank)


def settings(rank: int, alpha: int, names: list[str]) -> AdaLoraConfig:
    """Return what `peft` puts layers in by; steps are counted here, since nobody knows them yet."""
    return AdaLoraConfig(
        init_r=first_rank(rank), target_r=rank, lora_alpha=alpha, target_modules=names, total_step=1 << 30
    )


class MovingRanks:
    """Take ranks from layers where they are good for little: the `Schedule` of a lesson."""

    def __init__(self, layers: Mapping[str, AdaLoraLayer], config: AdaLoraConfig) -> None:
        # the allocator looks at parameters by the ends of their names; these are of the layers alone
        self.layers = nn.ModuleList([layer for layer in layers.values() if isinstance(layer, nn.Module)])
        self.allocator: Any = RankAllocator(self.layers, config, NAME)  # type: ignore[no-untyped-call]
        for layer in self.layers:
            ranks = layer.get_parameter(f"lora_E.{NAME}")
            layer.register_buffer("stays", torch.ones_like(ranks, dtype=torch.bool))
            for part in PARTS:
                for what in ("moved", "varied"):
                    values = layer.get_parameter(f"{part}.{NAME}")
                    layer.register_buffer(f"{what}_{part}", torch.zeros_like(values, dtype=torch.float32))

    @staticmethod
    def steps(steps: int) -> tuple[int, int]:
        """Return the step behind which ranks begin to go, and the first with those of the end.

        >>> MovingRanks.steps(100)
        (10, 50)
        """
        last = min(steps - 1, math.ceil((1 - REST) * steps))
        return min(last, int(FIRST * steps)), last

    def before_step(self, taken: int, steps: int) -> None:
        """Take ranks away, where it is time."""
        first, last = self.steps(steps)
        every = max(1, (last - first) // CHOICES)
        if taken == last or (first < taken < last and (taken - first) % every == 0):
            left = 1 - (taken - first) / (last - first) if last > first else 0.0
            spare = self.allocator.init_bgt - self.allocator.target_bgt
            self._choose(self.allocator.target_bgt + int(spare * left**3))

    def before_update(self) -> None:
        """Average what each number does to the loss."""
        parameters = dict(self.layers.named_parameters())
        if not all(values.grad is None or bool(torch.isfinite(values.grad).all()) for values in parameters.values()):
            return  # a step in fp16 that overflowed is not taken either
        self._hand_out()
        self.allocator.update_ipt(self.layers)
        for name, moved, varied in self._averages():
            moved.copy_(self.allocator.exp_avg_ipt[name])
            varied.copy_(self.allocator.exp_avg_unc[name])

    @torch.no_grad()
    def after_update(self) -> None:
        """Have nothing come back that was taken: the optimizer still moves by what it saw before."""
        for layer in self.layers:
            layer.get_parameter(f"lora_E.{NAME}").mul_(layer.get_buffer("stays"))

    def settled(self, taken: int, steps: int) -> bool:
        """Say whether the last of the steps taken had the ranks of the end."""
        return taken > self.steps(steps)[1]

    def _choose(self, budget: int) -> None:
        if budget >= self.allocator.init_bgt:
            return
        for layer in self.layers:  # what is gone stays the least, so that as many go as are asked for
            gone_R = ~layer.get_buffer("stays").view(-1)
            layer.get_buffer("moved_lora_A")[gone_R] = 0
            layer.get_buffer("moved_lora_E")[gone_R] = 0
            layer.get_buffer("moved_lora_B")[:, gone_R] = 0
        self._hand_out()
        found = self.allocator.mask_to_budget(self.layers, budget)
        for number, layer in enumerate(self.layers):
            stays = torch.tensor(found[f"{number}.lora_E.{NAME}"]).view(-1, 1)
            layer.get_buffer("stays").logical_and_(stays.to(layer.get_buffer("stays").device))
        self.after_update()

    def _hand_out(self) -> None:
        """Give the allocator the averages that are held here: a checkpoint may have brought them."""
        for name, moved, varied in self._averages():
            self.allocator.ipt[name] = moved  # not looked at before it is replaced
            self.allocator.exp_avg_ipt[name], self.allocator.exp_avg_unc[name] = moved, varied

    def _averages(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for number, layer in enumerate(self.layers):
            for part in PARTS:
                moved, varied = (layer.get_buffer(f"{what}_{part}") for what in ("moved", "varied"))
                yield f"{number}.{part}.{NAME}", moved, varied


@dataclass(frozen=True)
class Orthogonal:
    """Keep the rows of D and the columns of U orthogonal: the mean of |D D^T - 1| and |U^T U - 1| (equation 4)."""

    layers: nn.ModuleList
    needs_teacher: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean distance, Frobenius; zero where nothing learns, since it says nothing of the outputs."""
        if not torch.is_grad_enabled():
            return seen.student.new_zeros(())
        found = []
        for layer in self.layers:
            down_RI, up_OR = (layer.get_parameter(f"{part}.{NAME}") for part in ("lora_A", "lora_B"))
            for products in (down_RI @ down_RI.t(), up_OR.t() @ up_OR):
                found.append(torch.linalg.norm(products - torch.eye(len(products), device=products.device)))
        return torch.stack(found).mean()
