"""Where a student's blocks are narrower than its teacher's: linear maps from its width to theirs.

    W, b = argmin  sum_n |W h_n + b - t_n|^2 + damping |W|^2        h the student's, t the teacher's output of a block

in closed form over the first rows that are learned, before anything is (the means are taken off, so that b is not
damped). The map then stands still, so that what is learned is the student, or is trained along with it, as in Romero
et al., "FitNets", 2015, section 2.2. It is no part of the student: nothing of it is in what is kept.

A narrower stream holds other values than the wide one it was cut from: norms look at fewer channels, and what stays
makes up for the rest. A fit asks for no more than that the wide one can be read from it.

Shape suffixes: N values of a channel, S student width, D teacher width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError

DAMPING = 1e-3  # of the mean second moment
ENOUGH = 32  # values of each channel that a fit sees


def channel_axis(ours: Tensor, theirs: Tensor) -> int | None:
    """Return the axis in which the outputs of two blocks differ, None where they are alike.

    >>> channel_axis(torch.zeros(1, 5, 3), torch.zeros(1, 5, 4))
    2

    Raises TechniqueError where they differ in more than one.
    """
    differ = [axis for axis, sizes in enumerate(zip(ours.shape, theirs.shape, strict=False)) if len(set(sizes)) > 1]
    if ours.dim() != theirs.dim() or len(differ) > 1 or differ == [0]:
        raise TechniqueError(
            f"a block gives out {list(ours.shape)} where the original's gives {list(theirs.shape)}: no map of channels "
            "leads from one to the other",
            "set hidden: 0",
        )
    return differ[0] if differ else None


@dataclass
class Moments:
    """Add up what a least-squares fit needs, in float64."""

    count: int
    sum_S: Tensor
    sum_D: Tensor
    square_SS: Tensor
    cross_SD: Tensor

    @classmethod
    def empty(cls, student: int, teacher: int) -> Moments:
        """Return nothing seen yet, for these widths."""
        sizes = ((student,), (teacher,), (student, student), (student, teacher))
        return cls(0, *(torch.zeros(size, dtype=torch.float64) for size in sizes))

    def add(self, ours_NS: Tensor, theirs_ND: Tensor) -> None:
        """Add rows."""
        ours_NS, theirs_ND = ours_NS.double(), theirs_ND.double()
        self.count += len(ours_NS)
        self.sum_S += ours_NS.sum(0)
        self.sum_D += theirs_ND.sum(0)
        self.square_SS += ours_NS.T @ ours_NS
        self.cross_SD += ours_NS.T @ theirs_ND

    def solved(self, damping: float = DAMPING) -> nn.Linear:
        """Return the layer that comes nearest."""
        mean_S, mean_D = self.sum_S / self.count, self.sum_D / self.count
        square_SS = self.square_SS / self.count - mean_S[:, None] * mean_S
        cross_SD = self.cross_SD / self.count - mean_S[:, None] * mean_D
        floor = damping * square_SS.diagonal().mean().clamp(min=1e-12)
        weight_SD = torch.linalg.solve(square_SS + floor * torch.eye(len(mean_S), dtype=torch.float64), cross_SD)
        layer = nn.Linear(*weight_SD.shape)
        with torch.no_grad():
            layer.weight.copy_(weight_SD.T)
            layer.bias.copy_(mean_D - mean_S @ weight_SD)
        return layer


def fitted(
    passes: Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]], *, trained: bool
) -> tuple[nn.ModuleList | None, tuple[int | None, ...]]:
    """Return a layer for each block (the identity where widths are alike), None where all are, and the axes to map.

    `passes` gives what the blocks of student and teacher gave out, one row at a time; only one is looked at where all
    widths are alike. `trained` says whether the layers may change.
    """
    axes: tuple[int | None, ...] | None = None
    moments: list[Moments | None] = []
    for ours, theirs in passes:
        if axes is None:
            axes = tuple(channel_axis(one, other) for one, other in zip(ours, theirs, strict=True))
            moments = [
                None if axis is None else Moments.empty(one.shape[axis], other.shape[axis])
                for axis, one, other in zip(axes, ours, theirs, strict=True)
            ]
        if all(axis is None for axis in axes):
            return None, axes
        for moment, axis, one, other in zip(moments, axes, ours, theirs, strict=True):
            if moment is not None and axis is not None:
                moment.add(*(values.movedim(axis, -1).flatten(0, -2) for values in (one, other)))
        if all(moment is None or moment.count >= ENOUGH * len(moment.sum_S) for moment in moments):
            break
    assert axes is not None
    layers = nn.ModuleList(nn.Identity() if moment is None else moment.solved() for moment in moments)
    return layers.requires_grad_(trained), axes
