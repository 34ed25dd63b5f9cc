"""Learned rounding: move codes up or down so that a whole block's output, not one layer's, is kept.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023 (AutoRound),
section 3; AdaRound (Nagel et al. 2020) and BRECQ (Li et al. 2021) are its ancestors. For every weight w of a block with
scale s and zero point z of its group, learn an offset v in [-1/2, 1/2], and for each group a factor f of the scale:

    q = clamp(round(w / (s f) + d + v) + z, low, high)          w' = (q - z) s f

by descending the mean squared difference between the block's output and the reference's with the sign of the gradient:

    v -= rate_t sign(dL/dv)          f -= rate_t sign(dL/df) / 2^(b-1)          rate_t = rate (1 - t / steps)

Rounding passes gradients straight through. The step of f is divided by the largest code, so that both move the
outermost values by at most about one step of the grid in all.

Different from the paper: the start may be any codes (GPTQ's). d is then the smallest shift that brings w / s to within
INSIDE of its start code where that is not the nearest one, so that v = 0, f = 1 gives the start; for round-to-nearest
d = 0 and the formula is the paper's. The samples come in an order drawn once, all of them before any comes twice. And
the paper keeps the step with the lowest loss of its own batch, a noisy choice; here the last step stands, and start and
end are compared on the same samples by the caller.

Shape suffixes: O rows, I inputs, G groups, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.models.quantized import Quantized, rows_of
from gossamer.techniques.quantize.grid import storable

# How far from its code a start may lie. At 0.5, on the border, the first steps toss the start's choices about: on
# SmolLM2's second block the loss jumped from 0.002 to 0.06 and ended above GPTQ's; from 0.25 it fell by 30 %.
INSIDE = 0.25
BORDER = 0.5 - 1e-3  # on the border itself the first rounding could go either way
SMALLEST_FACTOR, LARGEST_FACTOR = 0.5, 1.5  # of the scale

BlockLoss = Callable[[Mapping[str, Tensor], int], Tensor]


@dataclass
class _Learned:
    """Hold what is learned of one weight: `offset_OI` (v), `factor_OG` (f); the rest is fixed."""

    position_OI: Tensor  # w / s
    shift_OI: Tensor  # d
    offset_OI: Tensor
    factor_OG: Tensor
    start: Quantized
    free_OI: Tensor  # False where the weight is exactly zero: a mask outlives the learning

    @classmethod
    def of(cls, weight: Tensor, start: Quantized) -> _Learned:
        rows_OI = rows_of(weight.float(), start.transposed)
        scale_OI = start.scale.float().repeat_interleave(start.group_size, 1)
        steps_OI = start.codes.float()
        if start.zero_point is not None:
            steps_OI = steps_OI - start.zero_point.float().repeat_interleave(start.group_size, 1)
        position_OI = rows_OI / scale_OI
        inside_OI = torch.maximum(torch.minimum(position_OI, steps_OI + INSIDE), steps_OI - INSIDE)
        nearest = (position_OI - steps_OI).abs() < BORDER
        inside_OI = torch.where(nearest, position_OI, inside_OI)
        # beyond the grid's ends every position gives the last code: there is nothing to shift
        outermost = (start.codes == start.spec.high) & (position_OI > steps_OI)
        outermost |= (start.codes == start.spec.low) & (position_OI < steps_OI)
        shift_OI = torch.where(outermost, torch.zeros_like(position_OI), inside_OI - position_OI)
        return cls(
            position_OI=position_OI,
            shift_OI=shift_OI,
            offset_OI=torch.zeros_like(position_OI).requires_grad_(),
            factor_OG=torch.ones_like(start.scale, dtype=torch.float32).requires_grad_(),
            start=start,
            free_OI=rows_OI != 0,
        )

    def codes_OI(self) -> Tensor:
        """Return the codes as floats, with gradients that pass through the rounding."""
        num_groups, size = self.start.num_groups, self.start.group_size
        wide = self.factor_OG.unsqueeze(-1).expand(-1, num_groups, size).reshape(self.position_OI.shape)
        free_OI = self.position_OI / wide + self.shift_OI + self.offset_OI
        rounded_OI = free_OI + (free_OI.round() - free_OI).detach()
        return torch.clamp(rounded_OI + self._zero_OI(), self.start.spec.low, self.start.spec.high)

    def weight(self) -> Tensor:
        """Return the dequantized weight in the parameter's own shape, differentiable in what is learned."""
        steps_OGg = (self.codes_OI() - self._zero_OI()).reshape(-1, self.start.num_groups, self.start.group_size)
        values_OI = (steps_OGg * (self.start.scale * self.factor_OG).unsqueeze(-1)).flatten(1)
        return (values_OI.t() if self.start.transposed else values_OI).reshape(self.start.shape)

    def step(self, rate: float) -> None:
        """Descend by the sign of the gradients, and drop them."""
        assert self.offset_OI.grad is not None
        assert self.factor_OG.grad is not None
        with torch.no_grad():
            self.offset_OI.add_(self.offset_OI.grad.sign() * self.free_OI, alpha=-rate).clamp_(-0.5, 0.5)
            self.factor_OG.add_(self.factor_OG.grad.sign(), alpha=-rate / (self.start.spec.high + 1))
            self.factor_OG.clamp_(SMALLEST_FACTOR, LARGEST_FACTOR)
        self.offset_OI.grad = self.factor_OG.grad = None

    def quantized(self) -> Quantized:
        """Return the codes and scales that were learned."""
        with torch.no_grad():
            codes = self.codes_OI().round().to(torch.int8)
            return replace(self.start, codes=codes, scale=storable(self.start.scale * self.factor_OG).half())

    def _zero_OI(self) -> Tensor:
        if self.start.zero_point is None:
            return torch.zeros(())
        return self.start.zero_point.float().repeat_interleave(self.start.group_size, 1)


def learn_rounding(
    loss: BlockLoss,
    weights: Mapping[str, Tensor],
    start: Mapping[str, Quantized],
    num_samples: int,
    *,
    steps: int = 200,
    batch_size: int = 8,
    rate: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, Quantized], list[float]]:
    """Return codes learned from `start`, and the mean loss of each step's samples.

    `loss(weights, i)` is the mean squared difference of the block's output on sample i with these weights in place;
    `weights` are the float originals by name, in their own shapes. `rate` is 1 / steps by default, as in the paper.

    >>> learn_rounding(loss, {"weight": w}, {"weight": codes}, num_samples=128)  # doctest: +SKIP
    """
    learned = {name: _Learned.of(weights[name], codes) for name, codes in start.items()}
    draw = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    losses = []
    first_rate = 1 / steps if rate is None else rate
    for number in range(steps):
        while len(waiting) < batch_size:
            waiting += torch.randperm(num_samples, generator=draw).tolist()
        picked, waiting = waiting[:batch_size], waiting[batch_size:]
        losses.append(_descend(learned, loss, picked, first_rate * (1 - number / steps)))
    return {name: part.quantized() for name, part in learned.items()}, losses


def _descend(learned: Mapping[str, _Learned], loss: BlockLoss, picked: Sequence[int], rate: float) -> float:
    """Take one step on some samples, one after another so that memory holds the graph of a single one."""
    with torch.enable_grad():
        made = {name: part.weight() for name, part in learned.items()}
        # the block's graph ends at these copies: the rounding is gone through once a step, not once a sample
        leaves = {name: weight.detach().requires_grad_() for name, weight in made.items()}
        total = 0.0
        for sample in picked:
            found = loss(leaves, sample) / len(picked)
            found.backward()  # type: ignore[no-untyped-call]
            total += float(found.detach())
        names = [name for name in made if leaves[name].grad is not None]
        torch.autograd.backward([made[name] for name in names], [leaves[name].grad for name in names])
    for name in names:
        learned[name].step(rate)
    return total
