"""Let a narrower model make up for the channels that went: every layer is fitted to what the wide one computes.

Blocks are taken in order. Samples pass each block of the wide model and of the narrow one, which has been fitted up to
there, so that a layer sees what the narrow model really gives it, x', beside what it was meant to see, x. Layer after
layer, in the order in which they are called:

    linear    W' = W_0 + (W C - W_0 S') (S' + lambda I)^-1      C = E x x'^T,  S' = E x' x'^T
    norm      y' = a y + b for each channel                     by least squares to the wide model's y

W are the rows of the wide layer that stay, W_0 those of the narrow one as it was cut: the least squares fit to W x with
a ridge that pulls to W_0. A layer with a bias is fitted around the means, and its bias takes them. It is the refit of
pruning (`units.py`) with another input than that which the target saw, as in Li et al., "GPTAQ", 2025, section 3.
Tied weights stay as they are, and so do experts; the norm in front makes up where it can.

Shape suffixes: O outputs, I inputs of the wide layer, K those of the narrow one, t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models.experts import find_experts
from gossamer.models.quantized import rows_of
from gossamer.models.roles import Dimension, Stack
from gossamer.models.walker import Stream, Walker, block_keys
from gossamer.techniques.prune.width import Forward, linears_of, norms_of
from gossamer.techniques.quantize.rotate import norm_offset

ROUNDING = 1e-5  # of a second moment: less is not told from float32 rounding
Runs = Callable[["Side"], Iterable[object]]  # one step a sample


@dataclass
class Side:
    """Hold one of the two models as samples pass it block by block."""

    module: nn.Module
    walker: Walker
    stream: Stream = field(default_factory=Stream)
    calls: list[Any] = field(default_factory=list)


@dataclass
class Pairs:
    """Hold moments of what a layer was meant to see, x [t, I], beside what it sees, x' [t, K]."""

    cross_IK: Tensor
    second_KK: Tensor
    sum_I: Tensor
    sum_K: Tensor
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, kept: int) -> Pairs:
        """Return moments that have seen nothing."""
        return cls(torch.zeros(inputs, kept), torch.zeros(kept, kept), torch.zeros(inputs), torch.zeros(kept))

    def add(self, wanted_tI: Tensor, seen_tK: Tensor) -> None:
        """Take in tokens."""
        self.cross_IK.addmm_(wanted_tI.t(), seen_tK)
        self.second_KK.addmm_(seen_tK.t(), seen_tK)
        self.sum_I += wanted_tI.sum(0)
        self.sum_K += seen_tK.sum(0)
        self.count += len(seen_tK)


def fitted(
    weight_OI: Tensor, start_OK: Tensor, pairs: Pairs, *, centred: bool, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Return (W' [O, K], what a bias changes by [O]), float32: the layer on x' that is nearest to W x.

    >>> pairs = Pairs.empty(1, 1); pairs.add(torch.ones(4, 1), torch.full((4, 1), 2.0))
    >>> fitted(torch.ones(1, 1), torch.ones(1, 1), pairs, centred=False, damping=1e-9)[0].tolist()
    [[0.5]]
    """
    cross_IK, second_KK = pairs.cross_IK.double() / pairs.count, pairs.second_KK.double() / pairs.count
    mean_I, mean_K = pairs.sum_I.double() / pairs.count, pairs.sum_K.double() / pairs.count
    least = ROUNDING * float(
        second_KK.diagonal().mean()
    )  # what hardly varies has the noise of float32 sums as variance
    if centred:
        cross_IK = cross_IK - torch.outer(mean_I, mean_K)
        second_KK = second_KK - torch.outer(mean_K, mean_K)
    weight_OI, start_OK = weight_OI.double(), start_OK.double()
    extra = max(damping * float(second_KK.diagonal().mean()), least) or 1.0
    missing_OK = weight_OI @ cross_IK - start_OK @ second_KK
    damped_KK = second_KK + extra * torch.eye(len(second_KK), dtype=torch.float64)
    found_OK = start_OK + torch.linalg.solve(damped_KK, missing_OK, left=False)
    return found_OK.float(), (weight_OI @ mean_I - found_OK @ mean_K).float()


def fit_narrower(
    before: nn.Module,
    smaller: nn.Module,
    kept: Mapping[Dimension, Sequence[int]],
    stacks: Sequence[Stack],
    forward: Forward,
    samples: Sequence[dict[str, Tensor]],
    *,
    damping: float,
    advance: Callable[[int], None],
) -> None:
    """Fit the layers of a narrower model, in place, to those of the one that it was cut from, block after block.

    `advance` is called once for each block, and once more at the end.
    """
    with torch.no_grad():
        fit = _Fit(before, smaller, kept, damping)
        sides = [Side(module, Walker(module, forward, samples)) for module in (before, smaller)]
        for stack in stacks:
            keys = block_keys(before.get_submodule(stack.name))
            for index, key in enumerate(keys):
                if index == 0:
                    fit.layers_of(sides, "", partial(_in_front, stack=stack))
                for side in sides:
                    side.calls = list(side.walker.calls(stack, index, side.stream))
                name = f"{stack.name}.{key}"
                fit.layers_of(sides, name, partial(_through, name=name))
                for side in sides:
                    side.stream.outputs = list(_through(side, name))
                advance(1)
            for side in sides:
                side.stream.finish(stack.name)
        positions = range(len(samples))
        fit.layers_of(sides, "", lambda side: (side.walker.replay(side.stream, position) for position in positions))
        advance(1)


def _in_front(side: Side, stack: Stack) -> Iterator[Any]:
    """Run what stands in front of a stack."""
    return side.walker.calls(stack, 0, side.stream)


def _through(side: Side, name: str) -> Iterator[Any]:
    block = side.module.get_submodule(name)
    return (call(block) for call in side.calls)


class _Fit:
    """Fit layers in the order in which they are called, each once."""

    def __init__(
        self, before: nn.Module, smaller: nn.Module, kept: Mapping[Dimension, Sequence[int]], damping: float
    ) -> None:
        self.before, self.smaller, self.damping = before, smaller, damping
        self.turned: dict[str, bool] = {}
        self.rows: dict[str, Tensor] = {}  # outputs that stay
        self.norms: dict[str, Tensor] = {}
        uses: dict[int, int] = {}
        for _, parameter in smaller.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        for one, units in kept.items():
            self.norms |= dict.fromkeys(norms_of(before, one), torch.tensor(units))
            self.turned |= linears_of(before, one, reading=True) | linears_of(before, one, reading=False)
            self.rows |= dict.fromkeys(linears_of(before, one, reading=False), torch.tensor(units))
        inside = tuple(f"{experts.name}." for experts in find_experts(smaller))
        for name in list(self.turned):
            if uses[id(smaller.get_submodule(name).weight)] > 1 or name.startswith(inside):
                del self.turned[name]
        self.done: set[str] = set()

    def layers_of(self, sides: Sequence[Side], block: str, runs: Runs) -> None:
        """Fit what is called while samples pass a block (or, without a name, outside of blocks)."""
        for names in self._order(sides[1], block, runs):
            if names[0] in self.norms:
                self._fit_norm(names[0], self._seen(sides, names, runs, of_norm=True))
            else:
                self._fit_linears(names, self._seen(sides, names, runs, of_norm=False))
            self.done |= set(names)

    def _order(self, side: Side, block: str, runs: Runs) -> list[list[str]]:
        """Return the layers that the first sample calls, those that read one tensor together."""
        groups: list[tuple[int, list[str]]] = []
        alive: list[Tensor] = []

        def note(module: nn.Module, inputs: Any, name: str) -> None:
            alive.append(inputs[0])
            key = 0 if name in self.norms else id(inputs[0])
            known = {each for _, names in groups for each in names}
            if name in known or name in self.done:
                return
            if key and groups and groups[-1][0] == key:
                groups[-1][1].append(name)
            else:
                groups.append((key, [name]))

        with ExitStack() as hooks:
            for name in (*self.turned, *self.norms):
                if name.startswith(f"{block}.") or not block:
                    layer = side.module.get_submodule(name)
                    handle = layer.register_forward_pre_hook(lambda m, i, name=name: note(m, i, name))
                    hooks.callback(handle.remove)
            next(iter(runs(side)), None)
        return [names for _, names in groups]

    def _seen(
        self, sides: Sequence[Side], names: Sequence[str], runs: Runs, *, of_norm: bool
    ) -> Iterator[list[Tensor]]:
        """Yield for each sample what the first of some layers is given in each model (what a norm gives), [t, C]."""
        caught: list[list[Tensor]] = [[], []]
        with ExitStack() as hooks:
            for side, into in zip(sides, caught, strict=True):
                layer = side.module.get_submodule(names[0])
                if of_norm:
                    handle = layer.register_forward_hook(lambda m, i, output, into=into: into.append(output))
                else:
                    handle = layer.register_forward_pre_hook(lambda m, inputs, into=into: into.append(inputs[0]))
                hooks.callback(handle.remove)
            for _ in zip(*(runs(side) for side in sides), strict=True):
                yield [torch.cat([part.float().flatten(0, -2) for part in into]) for into in caught]
                for into in caught:
                    into.clear()

    def _fit_linears(self, names: Sequence[str], seen: Iterable[list[Tensor]]) -> None:
        pairs: Pairs | None = None
        for wanted_tI, seen_tK in seen:
            pairs = pairs or Pairs.empty(wanted_tI.shape[1], seen_tK.shape[1])
            pairs.add(wanted_tI, seen_tK)
        assert pairs is not None
        for name in names:
            wide, narrow = self.before.get_submodule(name), self.smaller.get_submodule(name)
            weight, bias, turned = narrow.get_parameter("weight"), narrow._parameters.get("bias"), self.turned[name]
            weight_OI = rows_of(wide.get_parameter("weight").float(), turned)
            rows = self.rows.get(name)
            weight_OI = weight_OI if rows is None else weight_OI[rows]
            start_OK = rows_of(weight.float(), turned)
            found_OK, shift_O = fitted(weight_OI, start_OK, pairs, centred=bias is not None, damping=self.damping)
            weight.copy_(found_OK.t() if turned else found_OK)
            if bias is not None:
                wanted = wide.get_parameter("bias")
                bias.copy_((wanted if rows is None else wanted[rows]) + shift_O)

    def _fit_norm(self, name: str, seen: Iterable[list[Tensor]]) -> None:
        norm, kept = self.smaller.get_submodule(name), self.norms[name]
        sums = torch.zeros(5, len(kept), dtype=torch.float64)
        for wanted_tI, seen_tK in seen:
            wanted_tK = wanted_tI[:, kept]
            products = (wanted_tK * seen_tK, seen_tK.square(), wanted_tK, seen_tK, torch.ones_like(seen_tK))
            sums += torch.stack([part.double().sum(0) for part in products])
        cross_K, square_K, wanted_K, seen_K, _ = sums / sums[4]
        bias, least_K = norm._parameters.get("bias"), ROUNDING * square_K
        if bias is not None:
            cross_K, square_K = cross_K - wanted_K * seen_K, square_K - seen_K.square()
        usable = square_K > least_K
        factor_K = torch.where(usable, cross_K / square_K.clamp(min=1e-30), 1.0).float()
        weight, offset = norm.get_parameter("weight"), norm_offset(norm)
        weight.copy_(factor_K * (weight + offset) - offset)
        if bias is not None:
            bias.copy_(factor_K * bias + wanted_K.float() - factor_K * seen_K.float())
