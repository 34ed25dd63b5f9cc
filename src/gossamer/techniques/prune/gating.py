"""Gates in front of units that are drawn at random while a network is trained, and close: the schedule of `gates`.

A gate z multiplies what reads one unit (columns of down, of o). It is drawn from a hard concrete distribution (Louizos,
Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", 2018, section 2.2): u being uniform
between 0 and 1, a a number that is learned for each unit, b = 2/3, and the ends 0 and 1 within reach since l = -0.1,
r = 1.1,

    s = sigmoid((log u - log(1 - u) + a) / b)        z = min(1, max(0, s (r - l) + l))
    P(z > 0) = sigmoid(a - b log(-l / r))

so that it is exactly zero often, and yet has gradients. How many units of a place are open, the mean of P(z > 0), falls
from nearly all to the share that stays. It is held exactly: a = score - c, c being the one number for a place with
which the mean is what it may be, so that scores say in which order units close, and nothing else. (Louizos and others
add a price to the loss, Xia, Zhong, Chen, "Structured Pruning Learns Compact and Accurate Models", 2022, learn that
price uphill: tried here, it swung to and fro over hundreds of steps, more than a short training has, and shut gates for
good whose units were worth as much as others.)

One draw holds for a whole step, however many parts and processes it has, and comes from the step's number: a run that
goes on draws the same. Gradients of gates are those of the weights behind them, times the weights. Scores follow their
running mean, on the scale of the place's, so that what is worth more rises faster (Adam's scale of their own would
move all alike). They are buffers of the network, so that checkpoints hold them.

When gates have closed, the units of the highest scores stay, as many as are asked for; what their gates are by then
(without a draw: sigmoid(a) stretched, section 2.2 there) goes into the weights, and the last steps train what is left.

Left out: gates of whole blocks and of the stream's width, one bound for all places together (sizes are given, or found
by measuring before), and the distillation to moving pairs of blocks of Xia and others.

Shape suffixes: U units of a place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from gossamer.models.parametrized import parametrized
from gossamer.models.roles import Dimension, Member
from gossamer.models.straight_through import straight_through
from gossamer.techniques.prune.growth import smallest
from gossamer.techniques.prune.readers import reading

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
OPEN = 0.98  # of P(z > 0) where gates begin: wholly open in seven of ten draws
RATE = 0.1  # of scores, in a step that is as large as usual
RECENT, USUAL = 0.9, 0.99  # how much of the steps before stays in the running means of gradients, of their squares
FAR = 30.0  # from all scores: there every gate is open, or shut
CLOSING = 0.6  # share of the steps with gates in which what may be open falls; in the others it stands
LEAST = 0.05  # of what a unit that stays is multiplied with: at zero it would learn no more


def drawn(position_U: Tensor, uniform_U: Tensor) -> Tensor:
    """Return gates [U] for what was drawn uniformly between 0 and 1.

    >>> drawn(torch.tensor([9.0, 0.0, -9.0]), torch.full((3,), 0.5)).tolist()
    [1.0, 0.5, 0.0]
    """
    score_U = torch.sigmoid((torch.logit(uniform_U) + position_U) / TEMPERATURE)
    return (score_U * (HIGH - LOW) + LOW).clamp(0, 1)


def openness(position_U: Tensor) -> Tensor:
    """Return how likely each gate is not zero, [U].

    >>> openness(torch.zeros(1)).item() > 0.8
    True
    """
    return torch.sigmoid(position_U - TEMPERATURE * math.log(-LOW / HIGH))


def at_rest(position_U: Tensor) -> Tensor:
    """Return what each gate is without a draw, [U]."""
    return (torch.sigmoid(position_U) * (HIGH - LOW) + LOW).clamp(0, 1)


def closed_to(score_U: Tensor, share: float) -> Tensor:
    """Return positions [U] that differ as scores do, and are open with that share in the mean.

    >>> openness(closed_to(torch.tensor([1.0, 5.0, 2.0]), 0.5)).mean().item()  # doctest: +ELLIPSIS
    0.5...
    """
    score_U = score_U.double()
    low, high = float(score_U.min()) - FAR, float(score_U.max()) + FAR
    for _ in range(60):
        middle = (low + high) / 2
        if float(openness(score_U - middle).mean()) > share:
            low = middle
        else:
            high = middle
    return (score_U - low).float()


class Gate(nn.Module):
    """Hold what is known of the units of one place; `size` of them stay."""

    score: Tensor
    recent: Tensor
    usual: Tensor
    steps: Tensor
    position: Tensor
    uniform: Tensor
    value: Tensor

    def __init__(self, num_units: int, size: int) -> None:
        super().__init__()
        self.size = size
        for name in ("score", "recent", "position"):
            self.register_buffer(name, torch.zeros(num_units))
        self.register_buffer("usual", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("uniform", torch.full((num_units,), 0.5))  # this step's draw
        self.register_buffer("value", torch.ones(num_units))  # and what gates are in it

    def draw(self, may_be_open: float, draw: torch.Generator) -> None:
        """Take other gates, that share of them open in the mean."""
        least = torch.finfo(torch.float32).eps
        self.uniform.copy_(torch.rand(len(self.uniform), generator=draw).clamp(least, 1 - least))
        self.position.copy_(closed_to(self.score, min(OPEN, may_be_open)))
        self.value.copy_(drawn(self.position, self.uniform))

    def learn(self, gradient_U: Tensor) -> None:
        """Move scores by what the loss says of each gate's value."""
        position = self.position.detach().clone().requires_grad_()
        with torch.enable_grad():
            (found_U,) = torch.autograd.grad((gradient_U * drawn(position, self.uniform)).sum(), position)
        self.steps += 1
        self.recent.lerp_(found_U, 1 - RECENT)
        self.usual.lerp_(found_U.square().mean(), 1 - USUAL)
        mean_U, scale = self.recent / (1 - RECENT**self.steps), (self.usual / (1 - USUAL**self.steps)).sqrt()
        self.score -= RATE * mean_U / scale.clamp(min=torch.finfo(torch.float32).tiny)

    def settle(self, score_U: Tensor) -> None:
        """Open the gates of the `size` units of the highest scores, and shut the others."""
        gone = 1 - self.size / len(score_U)
        self.value.copy_(~smallest(score_U, gone, torch.arange(float(len(score_U)), device=score_U.device)))


class Gated(nn.Module):
    """Compute a weight whose columns are multiplied with the gates of the units that they read."""

    def __init__(self, gates: Sequence[tuple[Gate, Member]]) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gate for gate, _ in gates)
        self.members = [member for _, member in gates]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight; gradients pass as if all gates were open."""
        return straight_through(weight, weight.detach() * self.along(weight))

    def along(self, weight: Tensor) -> Tensor:
        """Return what each column of a weight is multiplied with, in a shape that broadcasts."""
        return self._along(weight, [gate.value for gate in self])

    def resting(self, weight: Tensor) -> Tensor:
        """Return the same of the gates as they are without a draw."""
        return self._along(weight, [at_rest(gate.position).clamp(min=LEAST) for gate in self])

    def felt(self, weight: Tensor) -> Iterator[tuple[Gate, Tensor]]:
        """Yield each gate with d loss / d value [U], from the gradient that a weight has."""
        assert weight.grad is not None
        product = (weight.detach() * weight.grad).float()
        for gate, member in zip(self, self.members, strict=True):
            by_index = product.movedim(member.axis, 0).flatten(1).sum(1)
            units = len(gate.value)
            yield gate, by_index[member.offset : member.offset + units * member.unit].view(units, member.unit).sum(1)

    def __iter__(self) -> Iterator[Gate]:
        return iter(cast("Sequence[Gate]", self.gates))

    def _along(self, weight: Tensor, values: Sequence[Tensor]) -> Tensor:
        found = torch.ones(weight.shape[self.members[0].axis], device=weight.device, dtype=weight.dtype)
        for value_U, member in zip(values, self.members, strict=True):
            here = value_U.to(weight.dtype).repeat_interleave(member.unit)
            found[member.offset : member.offset + len(here)] = here
        return found.view([-1 if axis == self.members[0].axis else 1 for axis in range(weight.ndim)])


class ClosingGates:
    """Draw gates before steps, have them learn, and shut those of what goes: the `Schedule` of a lesson."""

    def __init__(
        self, held: Sequence[tuple[nn.Parameter, Gated]], gates: Sequence[Gate], *, rest: float, seed: int
    ) -> None:
        self.held, self.gates, self.rest, self.seed = held, gates, rest, seed
        self.taken, self.steps = 0, 1

    def last(self, steps: int) -> int:
        """Return the first step that has all units gone."""
        return min(steps - 1, math.ceil((1 - self.rest) * steps))

    @torch.no_grad()
    def at_once(self) -> None:
        """Shut as many gates as at the end, of the units whose columns are smallest: what training has to beat."""
        sizes = {gate: torch.zeros_like(gate.value) for gate in self.gates}
        for weight, gated in self.held:
            for gate, member in zip(gated, gated.members, strict=True):
                by_index = weight.detach().float().square().movedim(member.axis, 0).flatten(1).sum(1)
                units = len(gate.value)
                here = by_index[member.offset : member.offset + units * member.unit]
                sizes[gate] += here.view(units, member.unit).sum(1)
        for gate, size_U in sizes.items():
            gate.settle(size_U)

    @torch.no_grad()
    def before_step(self, taken: int, steps: int) -> None:
        """Draw, or shut what goes where it is time: then what stays takes in what its gates are."""
        self.taken, self.steps = taken, steps
        last = self.last(steps)
        if taken < last:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + taken)
            closed = min(1.0, taken / max(1.0, CLOSING * last))
            for gate in self.gates:
                gate.draw(1 - closed * (1 - gate.size / len(gate.value)), draw)
        elif taken == last:
            for weight, gated in self.held:
                weight.mul_(gated.resting(weight))
            for gate in self.gates:
                gate.settle(gate.score)

    @torch.no_grad()
    def before_update(self) -> None:
        """Have gates learn from the gradients of weights; weights get those that came through gates."""
        last = self.last(self.steps)
        felt = {gate: torch.zeros_like(gate.value) for gate in self.gates}
        for weight, gated in self.held:
            if weight.grad is None:
                continue
            for gate, gradient_U in gated.felt(weight):
                felt[gate] += gradient_U
            weight.grad *= gated.along(weight)
        if self.taken >= last:
            return
        for gate, gradient_U in felt.items():
            if bool(torch.isfinite(gradient_U).all()):  # a step in fp16 that overflowed is not taken either
                gate.learn(gradient_U)

    def after_update(self) -> None:
        """Leave the weights: gates stand in front of them."""

    def settled(self, taken: int, steps: int) -> bool:
        """Say whether the last of the steps taken had all units gone."""
        return taken > self.last(steps)


@contextmanager
def closing_gates(
    network: nn.Module, sizes: Mapping[Dimension, int], *, rest: float, seed: int
) -> Iterator[ClosingGates]:
    """Put gates in front of what reads some units while the `with` lasts; what is shut at its end is zero then."""
    gates = {one: Gate(one.size, size) for one, size in sizes.items()}
    read: dict[str, list[tuple[Gate, Member]]] = {}
    for one, gate in gates.items():
        for member in reading(one):
            read.setdefault(member.parameter, []).append((gate, member))
    parts = {name: Gated(here) for name, here in read.items()}
    try:
        with parametrized(network, parts) as held:
            pairs = [(held[name], part) for name, part in parts.items()]
            yield ClosingGates(pairs, list(gates.values()), rest=rest, seed=seed)
    finally:
        with torch.no_grad():
            for name, part in parts.items():
                weight = network.get_parameter(name)
                weight.mul_(part.along(weight) != 0)
