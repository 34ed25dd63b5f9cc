"""Try dimensions of channels out: a network with some units of each cut must compute what the masked one does.

Masked means that the columns of the weights that read a unit are zero. If the two agree to rounding, no other layer,
operation or number inside the network's code depends on what goes. What float32 leaves open float64 decides: many
layers may round more than a small dependence shows. All dimensions are tried at once, halves of them where that fails,
so that n good and k bad ones take about k log n trials, and MAX_TRIALS at most.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gossamer.models.dataflow import evaluating
from gossamer.models.reduction import Kept, shrink_in_place
from gossamer.models.roles import Dimension

MAX_TRIALS = 64
DRAWS = 2  # of the units that go: with some of them what comes later may hide a difference
GONE = 0.25
CLEAR = 1e-5  # of the largest output: nearer than that they agree
WIDE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
}  # in float64 (the code may round to float32), or where it is not taken
Run = Callable[[nn.Module], list[Tensor]]


def proven(
    module: nn.Module, dimensions: Sequence[Dimension], run: Run
) -> tuple[list[Dimension], Mapping[str, list[str]]]:
    """Return the dimensions that can be cut, and the names of the others by the reason why not.

    >>> proven(network, dimensions, lambda network: [network(x)])[1]  # doctest: +SKIP
    {}
    """
    good: list[Dimension] = []
    failed: dict[str, list[str]] = defaultdict(list)
    waiting, trials = [list(dimensions)] if dimensions else [], 0
    while waiting:
        some = waiting.pop()
        if trials == MAX_TRIALS:
            failed[f"{MAX_TRIALS} trials did not suffice to tell them from others that cannot go"] += _names(some)
            continue
        trials += 1
        reason = _refusal(module, some, run)
        if reason is None:
            good += some
        elif len(some) == 1:
            failed[reason] += _names(some)
        else:
            waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
    if good and failed and (reason := _refusal(module, good, run)) is not None:
        failed[f"together {reason}"] += _names(good)
        good = []
    return [one for one in dimensions if one in good], failed


def _names(dimensions: Sequence[Dimension]) -> list[str]:
    return [one.name for one in dimensions]


def _widened(module: nn.Module, run: Run) -> nn.Module:
    """Return a copy in float64; the network itself where its code does not run so."""
    wide = copy.deepcopy(module).double()
    try:
        with evaluating(wide):
            run(wide)
    except RuntimeError:
        return module
    return wide


def _refusal(module: nn.Module, dimensions: Sequence[Dimension], run: Run) -> str | None:
    """Return why these cannot be cut together, or None when they can."""
    for seed in range(DRAWS):
        draw = torch.Generator().manual_seed(seed)
        kept: dict[Dimension, list[int]] = {}
        for one in dimensions:
            order = torch.randperm(one.size, generator=draw).tolist()
            kept[one] = sorted(order[max(1, round(GONE * one.size)) :])
        if _difference(module, kept, run, CLEAR) is None:
            continue
        wide = _widened(module, run)
        reason = _difference(wide, kept, run, WIDE[next(wide.parameters()).dtype])
        if reason is not None:
            return reason
    return None


def _difference(module: nn.Module, kept: Kept, run: Run, rounding: float) -> str | None:
    """Return how a network with some units cut differs from the masked one, or None where it does not."""
    tried = copy.deepcopy(module)
    try:
        with evaluating(tried):
            mask(tried, kept)
            expected = run(tried)
            shrink_in_place(tried, kept)
            found = run(tried)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
        return f"the smaller network does not run ({str(error).strip().partition(chr(10))[0]})"
    for wanted, got in zip(expected, found, strict=True):
        if wanted.shape != got.shape:
            return f"the network gives out {list(got.shape)} in place of {list(wanted.shape)}"
        if not bool((got - wanted).abs().max() <= rounding * wanted.abs().max()):
            return "the smaller network does not compute what the masked one does"
    return None


def mask(module: nn.Module, kept: Kept) -> None:
    """Set the columns of weights to zero that read units which do not stay."""
    with torch.no_grad():
        for one, units in kept.items():
            gone = torch.tensor(sorted(set(range(one.size)) - set(units)), dtype=torch.long)
            for member in one.members:
                # channels of a depthwise convolution lie along both axes; heads along one, the first in GPT-2
                if member.parameter in one.readers and (member.axis == 1 or one.kind == "heads"):
                    at = (member.offset + gone[:, None] * member.unit + torch.arange(member.unit)).flatten()
                    module.get_parameter(member.parameter).index_fill_(member.axis, at, 0.0)
