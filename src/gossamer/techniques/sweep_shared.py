"""How processes share a block: each has some of the samples and solves some of the layers, and results do not tell.

A sum of floats depends on its order, so the samples are cut into NUM_CHUNKS runs of neighbours however many processes
there are. One process sums over a chunk, sample after sample, and the sums of chunks are added in their order,

    S = ((S_0 + S_1) + S_2) + ...

by the process that owns the layer. In round k the process of rank r of R observes chunk k R + r and hands its sums to
the owners. A process thus holds the sums of one chunk, of all layers, and the totals of its own: alone twice the
moments, in a larger team less. More than NUM_CHUNKS processes find nothing to do.

What an owner has found is broadcast; everything that follows is the same on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.models.spilled import as_bytes, dtype_name, dtype_named
from gossamer.run.device import CPU
from gossamer.run.team import Team
from gossamer.techniques.base import Decision
from gossamer.techniques.quantize.moments import Moments

NUM_CHUNKS = 8
ROWS_AT_A_TIME = 1024  # of the moments that arrive: no second copy of them is held


@dataclass(frozen=True)
class Share:
    """Say which samples a process has.

    `numbers` are theirs among all samples, rising; `rounds` gives for each round the chunk that this process observes
    and where its samples stand among `numbers` (nowhere, where there are more processes than chunks).
    """

    numbers: tuple[int, ...]
    rounds: tuple[tuple[int, range], ...]

    def first(self, count: int) -> int:
        """Return how many of the first `count` of all samples are here; they come first."""
        return sum(number < count for number in self.numbers)


def share_of(num_samples: int, team: Team) -> Share:
    """Return the share of this process."""
    size = -(-num_samples // NUM_CHUNKS)
    numbers: list[int] = []
    rounds = []
    for first in range(0, NUM_CHUNKS, team.size):
        chunk = first + team.rank
        mine = range(chunk * size, min((chunk + 1) * size, num_samples)) if chunk < NUM_CHUNKS else range(0)
        rounds.append((chunk, range(len(numbers), len(numbers) + len(mine))))
        numbers += mine
    return Share(tuple(numbers), tuple(rounds))


def owners_of(decisions: Iterable[Decision], team: Team, *, split: bool) -> dict[str, int]:
    """Return which process solves each decided parameter, the dearest first; the leader all where not `split`."""
    loads = [0] * (team.size if split else 1)
    owners = {}
    for decision in sorted(decisions, key=_cost, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += _cost(decision)
        owners[decision.parameter] = rank
    return owners


def _cost(decision: Decision) -> int:
    """Return about what a layer takes to solve: factors of its inputs' moments, and passes over its rows."""
    rows, inputs = decision.layer.shape[0], torch.Size(decision.layer.shape[1:]).numel()
    return inputs**2 * (2 * inputs + 4 * rows)


def summed(
    team: Team,
    share: Share,
    observe_part: Callable[[range], dict[str, Moments]],
    owners: Mapping[str, int],
    device: torch.device = CPU,
) -> dict[str, Moments]:
    """Return the moments over all samples of the layers that this process owns.

    `observe_part` gives the moments over some of the samples that are here, layers that read one tensor sharing one;
    like them the result lies on `device`.
    """
    totals: dict[str, Moments] = {}
    for _, places in share.rounds:
        _add(team, totals, observe_part(places) if places else {}, owners, device)
    return totals


def _add(
    team: Team,
    totals: dict[str, Moments],
    part: Mapping[str, Moments],
    owners: Mapping[str, int],
    device: torch.device,
) -> None:
    """Add what every process has observed in one round to the totals of the owners, by rank.

    What is sent goes through main memory, so that it does not matter who has a GPU.
    """
    groups = _groups(part)
    told = team.gathered([[names, seen.num_tokens, len(seen.max_abs_I)] for names, seen in groups])
    for source, theirs in enumerate(told):
        for place, (names, num_tokens, num_inputs) in enumerate(theirs):
            for owner in sorted({owners[name] for name in names}):
                if team.rank == source != owner:
                    for tensor in groups[place][1].sums():
                        for piece in torch.split(tensor, ROWS_AT_A_TIME):
                            team.send(piece.cpu(), owner)
                if team.rank == owner:
                    mine = [name for name in names if owners[name] == owner]
                    takers = _takers(totals, mine, num_inputs, device)
                    if source != owner:
                        _receive(team, source, takers, num_tokens)
                        continue
                    for taker in takers:
                        taker.merge(groups[place][1])


def _groups(part: Mapping[str, Moments]) -> list[tuple[list[str], Moments]]:
    """Return the distinct moments with the layers that share them."""
    found: dict[int, tuple[list[str], Moments]] = {}
    for name, seen in part.items():
        found.setdefault(id(seen), ([], seen))[0].append(name)
    return list(found.values())


def _takers(totals: dict[str, Moments], names: Sequence[str], num_inputs: int, device: torch.device) -> list[Moments]:
    """Return the totals that belong to layers which share one sum: one, unless other chunks told them apart."""
    known = {id(totals[name]) for name in names if name in totals}
    if not known:
        totals.update(dict.fromkeys(names, Moments.empty(num_inputs, device)))
        return [totals[names[0]]]
    sharing = [name for name, seen in totals.items() if id(seen) in known]
    if len(known) == 1 and sorted(sharing) == sorted(names):
        return [totals[names[0]]]
    for name in names:
        alone = Moments.empty(num_inputs, device)
        if name in totals:
            alone.merge(totals[name])
        totals[name] = alone
    return [totals[name] for name in names]


def _receive(team: Team, source: int, takers: Sequence[Moments], num_tokens: int) -> None:
    """Add the moments that another process sends to some totals, a few rows at a time."""
    for wholes, largest in zip(
        zip(*(taker.sums() for taker in takers), strict=True), (False, False, False, True), strict=True
    ):
        for pieces in zip(*(torch.split(whole, ROWS_AT_A_TIME) for whole in wholes), strict=True):
            arrived = torch.empty(pieces[0].shape, dtype=pieces[0].dtype)
            team.receive(arrived, source)
            arrived = arrived.to(pieces[0].device)
            for piece in pieces:
                if largest:
                    torch.maximum(piece, arrived, out=piece)
                else:
                    piece += arrived
    for taker in takers:
        taker.num_tokens += num_tokens


def shared_tensors(team: Team, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of all processes, by name; no two give the same name."""
    if team.size == 1:
        return dict(tensors)
    told = team.gathered({name: [dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()})
    found = {}
    for source, theirs in enumerate(told):
        for name, (dtype, shape) in theirs.items():
            if source == team.rank:
                found[name] = tensors[name]
                values = as_bytes(tensors[name])
            else:
                found[name] = torch.empty(shape, dtype=dtype_named(dtype))
                values = as_bytes(found[name])
            if values.numel():  # codes of GGUF blocks have no scales beside them
                team.broadcast(values, source)
    return found


def shared_codes(team: Team, codes: Mapping[str, Quantized]) -> dict[str, Quantized]:
    """Return the codes of all processes, by parameter; no two give the same one."""
    if team.size == 1:
        return dict(codes)
    told: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for parameter, found in codes.items():
        told[parameter] = {}
        for field in fields(found):
            value = getattr(found, field.name)
            if isinstance(value, Tensor):
                tensors[f"{parameter}/{field.name}"] = value
            else:
                told[parameter][field.name] = value.model_dump(mode="json") if isinstance(value, QuantSpec) else value
    arrived = shared_tensors(team, tensors)
    whole: dict[str, Quantized] = {}
    for theirs in team.gathered(told):
        for parameter, rest in theirs.items():
            rest |= {"spec": QuantSpec.model_validate(rest["spec"]), "shape": tuple(rest["shape"])}
            rest |= {n.rpartition("/")[2]: t for n, t in arrived.items() if n.rpartition("/")[0] == parameter}
            whole[parameter] = Quantized(**rest)
    return whole
