"""Cuts that are solved for a goal: what the planner proposes in place of fixed shares, alone and with steps that round.

They are asked for where no recipe that leaves the shapes alone is likely to do. How much has to be saved depends on
what else a recipe does: with int8 less time is left to take off, and fewer bytes. For every recipe that cuts nothing in
the blocks, the sizes are solved for that meet the goal's bounds on what is predicted (on times, where its blocks were
timed in its format, and on bytes), and those that go a little further than asked, since predictions miss. A goal
without a bound (the least latency) gets a few shares of the blocks' time. Once a recipe with such cuts was measured and
took another time than predicted, its sizes are solved again for what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import ceil, exp, inf

import numpy as np
from numpy.typing import NDArray

from gossamer.goal import Constraint, Goal
from gossamer.models.reduced_map import reduced_map
from gossamer.models.roles import Dimension
from gossamer.plan.block_times import BlockTimes, block_format, block_times, formats_of
from gossamer.plan.candidates import Steps, joined
from gossamer.plan.cutting import (
    UNIT_SECONDS,
    Cutting,
    as_steps,
    counted_by_size,
    cutting,
    seconds_by_size,
)
from gossamer.plan.fewer_blocks import FewerBlocks, is_taken, takes_named_blocks
from gossamer.plan.job import Job
from gossamer.plan.predict import Corrections, Tables, format_key, predicted_bytes, predicted_latency
from gossamer.plan.specimens import layers_of
from gossamer.techniques.base import Decision, SearchSpace, Technique, resolved
from gossamer.techniques.prune.prune import LESS_WORK, Prune

TIMED, COUNTED, BYTES = frozenset(("latency", "throughput")), frozenset(("params", "flops")), "bytes"
SOLVED = frozenset(("heads", "ffn"))
MARGINS = (0.94, 0.85)  # of the bound: what is solved for
BYTE_MARGINS = (0.99, 0.94)  # the same, where it is counted but for headers and nodes
SHARES = (0.75, 0.5, 0.35)  # of the blocks' time, where the goal has no bound
AS_PREDICTED = 0.03  # in logarithms: what predictions of a measured kind miss anyway
AS_MANY = 0.005  # of the bytes that a goal leaves: by so many a measured kind may miss
LEAST_ROWS = 4 * Prune.needs.calibration_rows


def tables_of_blocks(job: Job, space: SearchSpace, proposed: Iterable[Steps]) -> tuple[BlockTimes, ...]:
    """Return how long blocks take at each size in the formats of what is proposed; none if no goal asks for it."""
    if not space.wanted & TIMED or space.calibration_rows < LEAST_ROWS:
        return ()
    decided = [step.resolve(job.model) for step in dict.fromkeys(chain(*proposed)) if step.family == "quantize"]
    rounds_inputs = [one for one in decided if any(decision.activation for decision in one)]
    formats = formats_of(job.model, rounds_inputs)
    others = formats_of(job.model, decided)
    return block_times(job, formats, {label: one for label, one in others.items() if label not in formats})


class SolvedCuts:
    """Propose cuts that are solved for a goal; again, where measuring has shown that predicted times are wrong.

    `without` are the recipes that do not cut what can be solved for: they are looked at first, since timing blocks at
    every size takes a minute or two. `shares` gives those that cut by fixed shares, for blocks that are not understood
    (so many that they are not made beforehand). `held` says whether the runtime can hold a recipe.
    """

    def __init__(
        self,
        job: Job,
        goal: Goal,
        tables: Tables,
        space: SearchSpace,
        without: Sequence[Steps],
        shares: Callable[[], Sequence[Steps]] = tuple,
        held: Callable[[Steps], bool] = lambda _: True,
    ) -> None:
        self._held = held
        self._shares = shares
        self.job = job
        self.goal = goal
        self.space = space
        self.tables = tables
        self._waits = self._may_narrow = bool(space.wanted & LESS_WORK) and space.calibration_rows >= LEAST_ROWS
        self.without = without
        self._solver: _Solver | None = None

    def more(self, tables: Tables) -> tuple[Tables, list[Steps]]:
        """Return tables that know how long blocks take, and recipes that cut; nothing more when asked again.

        Those of fixed shares where nothing can be solved: blocks that are not understood.
        """
        if not self._waits:
            return tables, []
        self._waits = False
        self.tables = tables = replace(tables, blocks=tables_of_blocks(self.job, self.space, self.without))
        choices = cutting(self.job)
        if choices is None:
            return tables, self._cut_by_shares()
        self._solver = _Solver(self.goal, tables, choices, FewerBlocks(self.job))
        solved = dict[Steps, None]()
        for steps in ((), *(one for one in self.without if not any(isinstance(step, Prune) for step in one))):
            solved |= dict.fromkeys(self._joined(steps))
        return tables, list(solved) or self._cut_by_shares()

    def _cut_by_shares(self) -> list[Steps]:
        return [steps for steps in self._shares() if any(map(cuts_solved_for, steps)) and self._held(steps)]

    def narrower(self) -> list[Steps]:
        """Return recipes that cut the width of the residual stream, which all blocks share; none when asked again.

        They lose the most for what they save, before training as much as on the way: the last that are looked at.
        """
        if not self._may_narrow:
            return []
        self._may_narrow = False
        found: list[Steps] = []
        for step in Prune.narrowing(self.space):
            for steps in ((), *(one for one in self.without if not any(isinstance(each, Prune) for each in one))):
                narrow = joined((step,), steps, self.space) if steps else (step,)
                if narrow is not None and self._held(narrow):
                    found.append(narrow)
        return found

    def again(self, steps: Steps, corrections: Corrections) -> list[Steps]:
        """Return a measured recipe with its cuts solved for what measuring has shown; none if it is as predicted.

        Where it took longer than predicted, or more bytes, more is cut; where it took less, less.
        """
        solved = [step for step in steps if cuts_solved_for(step) or takes_named_blocks(step)]
        if self._solver is None or not solved:
            return []
        kind = format_key(resolved(self.tables.model, steps)[0])
        slower, larger = corrections.of(kind), corrections.of_bytes(kind)
        if abs(slower) < AS_PREDICTED and abs(larger) < AS_MANY * self._bytes_allowed:
            return []
        rest = tuple(step for step in steps if step not in solved and step.divergence_left == 1)
        return list(dict.fromkeys(self._joined(rest, exp(slower), larger)))

    @property
    def _bytes_allowed(self) -> float:
        """Return the bytes that the goal leaves."""
        whole = self.tables.original.size_bytes
        bounds = (one for one in self.goal.constraints if one.quantity == "size")
        return min((bound.bound * (whole if bound.relative else 1) for bound in bounds), default=inf)

    def _joined(self, steps: Steps, slower: float = 1.0, larger: int = 0) -> list[Steps]:
        assert self._solver is not None
        cuts = self._solver.cuts(steps, slower, larger)
        together = [joined(found, steps, self.space) if steps else found for found in cuts]
        return [one for one in together if one is not None and self._held(one)]


def cuts_solved_for(step: Technique) -> bool:
    """Say whether a step cuts what is solved for."""
    return isinstance(step, Prune) and step.what in SOLVED


class _Solver:
    """Solve for one goal; sizes that several recipes ask for are found once."""

    def __init__(self, goal: Goal, tables: Tables, choices: Cutting, fewer: FewerBlocks) -> None:
        self.goal = goal
        self.tables = tables
        self.choices = choices
        self.fewer = fewer
        # format or count, and the blocks that go -> what each size of each choice saves
        self.saved: dict[tuple[str, Steps], NDArray[np.int64]] = {}
        self.known: dict[tuple[str, Steps, int], tuple[Prune, ...]] = {}  # and hundredths of all that can be saved

    def cuts(self, steps: Steps, slower: float = 1.0, larger: int = 0) -> Iterator[tuple[Prune, ...]]:
        """Yield the cuts that bring a recipe to the goal, alone or together with it.

        `slower` is how many times longer than predicted its kind takes, `larger` how many bytes more.
        """
        for quantity, needed in self._needed(steps, slower, larger):
            fewer = self.fewer.steps(self._left(quantity, needed))
            if fewer:
                before, after = (resolved(self.tables.model, one) for one in (steps, (*fewer, *steps)))
                saving = predicted_latency(self.tables, *before) - predicted_latency(self.tables, *after)
                needed -= saving / UNIT_SECONDS
            found = (*self._narrower(quantity, needed, steps, fewer), *fewer)
            if found and (needed <= 0 or len(found) > len(fewer)):
                yield found

    def _narrower(self, quantity: str, needed: float, steps: Steps, fewer: tuple[Prune, ...]) -> tuple[Prune, ...]:
        """Return the cuts of least predicted loss that save so much in the blocks that stay; none where none can."""
        if (quantity, fewer) not in self.saved:
            self.saved[quantity, fewer] = self.choices.saved(self._by_size(quantity, steps, fewer))
        saved = self.saved[quantity, fewer]
        hundredth = max(1, int(saved.max(axis=1).sum())) / 100
        key = quantity, fewer, ceil(needed / hundredth)  # up: a bound on bytes is met or not
        if key not in self.known:
            sizes = None
            if needed > 0:
                sizes = self.choices.best(saved, key[2] * hundredth) or self.choices.best(saved, needed)
            self.known[key] = as_steps(sizes, self.tables.model) if sizes else ()
        return self.known[key]

    def _left(self, format: str, needed: float) -> float:
        """Return the share of the blocks' time in a format that stays; 1 for what is no format."""
        blocks = sum(len(one.blocks) * one.seconds for one in self.tables.blocks if one.format == format)
        return 1 - needed * UNIT_SECONDS / blocks if blocks else 1.0

    def _by_size(self, quantity: str, steps: Steps, fewer: Sequence[Prune]) -> Callable[[Dimension, int], float]:
        """Return what there is of a quantity (a count, bytes, or a format's time) at each size of a dimension.

        In blocks that go there is nothing to save.
        """
        of = self._of_whole(quantity, steps)
        return lambda one, size: 0.0 if is_taken(one, fewer) else of(one, size)

    def _of_whole(self, quantity: str, steps: Steps) -> Callable[[Dimension, int], float]:
        if quantity in COUNTED:
            return counted_by_size(self.tables.model, quantity)
        if quantity.startswith(BYTES):
            return bytes_by_size(self.tables, steps)
        return seconds_by_size(self.tables.blocks, quantity)

    def _needed(self, steps: Steps, slower: float, larger: int) -> Iterator[tuple[str, float]]:
        """Yield a format or what is counted, and what has to be saved: billionths of a second, bytes, or a count."""
        decisions, after = resolved(self.tables.model, steps)
        label = None if any(one.dtype for one in decisions) else common_format(self.tables, decisions)
        seconds = predicted_latency(self.tables, decisions, after)
        for bound in self.goal.constraints:
            if bound.quantity in TIMED and label is not None:
                allowed = allowed_seconds(bound, self.tables) / slower
                yield from ((label, (seconds - margin * allowed) / UNIT_SECONDS) for margin in MARGINS)
            elif bound.quantity in COUNTED:
                model = self.tables.model
                whole = model.num_parameters if bound.quantity == "params" else 2 * model.macs
                yield bound.quantity, whole - (bound.bound * whole if bound.relative else bound.bound)
            elif bound.quantity == "size":
                allowed = bound.bound * (self.tables.original.size_bytes if bound.relative else 1)
                held = predicted_bytes(self.tables, decisions, after) + larger
                key = f"{BYTES} {self._held(decisions)}"
                yield from ((key, held - margin * allowed) for margin in BYTE_MARGINS)
        bounded = any(one.quantity in TIMED for one in self.goal.constraints)
        objective = self.goal.objective.quantity if self.goal.objective is not None else None
        if objective in TIMED and label is not None and not bounded:
            blocks = sum(len(one.blocks) * one.seconds for one in self.tables.blocks if one.format == label)
            yield from ((label, (1 - share) * blocks / UNIT_SECONDS) for share in SHARES)

    def _held(self, decisions: Sequence[Decision]) -> str:
        """Return how a recipe holds what can be cut: recipes that agree in it save the same bytes."""
        readers = {member.parameter for c in self.choices.choices for one in c.dimensions for member in one.members}
        found = [f"{one.parameter} {one.weight}" for one in decisions if one.parameter in readers and one.weight]
        return f"{' '.join(sorted(found))} {' '.join(one.dtype for one in decisions if one.dtype)}"


def bytes_by_size(tables: Tables, steps: Steps) -> Callable[[Dimension, int], float]:
    """Return what the files of a recipe take when one dimension is cut besides."""
    decisions, model = resolved(tables.model, steps)
    whole = predicted_bytes(tables, decisions, model)

    def of(one: Dimension, size: int) -> float:
        if size == one.size:
            return whole
        return predicted_bytes(tables, decisions, reduced_map(model, {one: size}))

    return of


def allowed_seconds(bound: Constraint, tables: Tables) -> float:
    """Return the median latency that a bound on latency or throughput leaves, by the original's own distribution."""
    original = tables.original.latency
    if bound.quantity == "throughput":
        return 1 / (bound.bound * original.throughput if bound.relative else bound.bound)
    statistic = getattr(bound, "statistic", None) or "p50"
    share = bound.bound if bound.relative else bound.bound / float(getattr(original, statistic))
    return share * original.p50


def common_format(tables: Tables, decisions: Sequence[Decision]) -> str | None:
    """Return the format that all blocks get, None where they differ or it was not timed."""
    by_layer: Mapping[str, Decision] = {one.layer.name: one for one in decisions if one.weight is not None}
    places = {(one.stack, block) for one in tables.blocks for block in one.blocks}
    labels = {block_format(layers_of(tables.model, *place), by_layer) for place in places}
    return labels.pop() if len(labels) == 1 and labels <= {one.format for one in tables.blocks} else None


def in_words(sizes: Mapping[Dimension, int]) -> str:
    """Return sizes in a few words: `heads 12 to 3-9, ffn 1536 to 480-1152`."""
    words = []
    for kind in dict.fromkeys(one.kind for one in sizes):
        here = {one: size for one, size in sizes.items() if one.kind == kind}
        left, whole = sorted(set(here.values())), sorted({one.size for one in here})
        words.append(f"{kind} {'-'.join(map(str, whole))} to {'-'.join(map(str, dict.fromkeys((left[0], left[-1]))))}")
    return ", ".join(words)
