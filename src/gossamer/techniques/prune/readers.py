"""How weights read the units of dimensions: which columns of their rows are a unit's.

A weight usually reads one dimension, and all of its columns are that dimension's units in order. One that reads a
concatenation reads several, each from an offset on: such a weight is looked at by its own input channels, each a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.models.candidate import Candidate
from gossamer.models.roles import Dimension, LayerInfo, Member
from gossamer.techniques.prune.units import joint_obs_order


@dataclass(frozen=True)
class Reader:
    """Say how a weight is looked at: `unit` columns are a unit of it, `count` of its units go.

    `whole`: all of its units are those of one dimension.
    """

    unit: int
    count: int
    whole: bool = True


def readers_of(sizes: Mapping[Dimension, int], layers: Mapping[str, LayerInfo]) -> dict[str, Reader]:
    """Return how each weight that reads dimensions is looked at, by its name; `layers` by the names of their weights.

    >>> readers_of({dimension: 32}, layers)["down.weight"]  # doctest: +SKIP
    Reader(unit=1, count=32, whole=True)
    """
    found: dict[str, Reader] = {}
    for one, size in sizes.items():
        for member in reading(one):
            before = found.get(member.parameter)
            if one.size * member.unit == layers[member.parameter].shape[1]:
                found[member.parameter] = Reader(member.unit * member.width, one.size - size)
            else:
                count = (one.size - size) * member.unit + (before.count if before else 0)
                found[member.parameter] = Reader(member.width, count, whole=False)
    return found


def reading(one: Dimension) -> list[Member]:
    """Return the axes along which weights read a dimension; a convolution may write the channels that it reads."""
    return [
        member
        for member in one.members
        if member.parameter in one.readers and (one.kind != "channels" or member.axis == 1)
    ]


def units_of(one: Dimension, chosen: Iterable[int], member: Member, reader: Reader) -> list[int]:
    """Return which units of a weight are some units of a dimension that it reads."""
    if reader.whole:
        return list(chosen)
    return [member.offset + unit * member.unit + index for unit in chosen for index in range(member.unit)]


def scores_of(one: Dimension, scores_U: Tensor, member: Member, reader: Reader) -> Tensor:
    """Return the scores of a dimension's units from those of all units of a weight that reads it."""
    if reader.whole:
        return scores_U
    return scores_U[member.offset : member.offset + one.size * member.unit].view(-1, member.unit).sum(1)


def joint_scores(
    sizes: Mapping[Dimension, int],
    rows: Mapping[str, Tensor],
    seconds: Mapping[str, Tensor],
    readers: Mapping[str, Reader],
    damping: float,
) -> dict[str, Tensor]:
    """Return scores by weight that order units as `obs` takes them from all weights that read them, [U].

    `rows` are weights [O, I], `seconds` the second moments of their inputs, where they are known; the first weight of a
    dimension that has them holds its units' scores.
    """
    found: dict[str, Tensor] = {}
    for one, size in sizes.items():
        read = [member for member in reading(one) if member.parameter in seconds]
        if not read:
            continue
        parts = []
        for member in read:
            width = member.unit * member.width
            columns_Ub = member.offset * member.width + torch.arange(one.size * width).view(-1, width)
            parts.append((rows[member.parameter], seconds[member.parameter], columns_Ub))
        order = joint_obs_order(parts, one.size - size, damping)
        first, reader = read[0], readers[read[0].parameter]
        scores_U = found.setdefault(first.parameter, torch.zeros(rows[first.parameter].shape[1] // reader.unit))
        ranks_U = torch.full((one.size,), float(one.size))
        ranks_U[order] = torch.arange(float(len(order)))
        at = torch.tensor([units_of(one, [unit], first, reader)[0] for unit in range(one.size)])
        scores_U[at] = ranks_U
    return found


def used_units(one: Dimension, values: Mapping[str, Tensor]) -> Tensor:
    """Return which units some weight has columns for that are not all zero, bool [U]; `values` by parameter."""
    used_U = torch.zeros(one.size, dtype=torch.bool)
    for member in reading(one):
        columns = values[member.parameter].movedim(member.axis, 0)
        columns = columns[member.offset : member.offset + one.size * member.unit]
        used_U |= (columns.flatten(1) != 0).any(1).view(-1, member.unit).any(1)
    return used_U


def kept_units(candidate: Candidate, one: Dimension, size: int) -> list[int]:
    """Return the units that stay: those that a reader has columns for that are not all zero, and others to fill up."""
    left_U = used_units(one, {reader: candidate.values(reader) for reader in one.readers})
    kept = left_U.nonzero().flatten().tolist()
    assert len(kept) <= size, f"{len(kept)} units of {one.name} are not zero, {size} may stay"
    spare = (~left_U).nonzero().flatten().tolist()  # they did nothing before either
    return sorted([*kept, *spare[: size - len(kept)]])


def known_beforehand(one: Dimension, readers: Mapping[str, Reader]) -> bool:
    """Say whether the units of a dimension are chosen before the sweep, not by the one weight that reads it."""
    return len(one.readers) > 1 or not readers[one.readers[0]].whole


def merged(chosen: Sequence[tuple[str, list[int]]]) -> dict[str, tuple[int, ...]]:
    """Return the units that go by weight, from what each dimension says of it."""
    found: dict[str, list[int]] = {}
    for name, units in chosen:
        found.setdefault(name, []).extend(units)
    return {name: tuple(sorted(units)) for name, units in found.items()}
