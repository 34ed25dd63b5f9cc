"""Cuts that are solved for a goal: what the planner proposes in place of fixed shares, alone and with steps that round.

How much has to be saved depends on what else a recipe does: with int8 less time is left to take off. For every recipe
that cuts nothing and whose blocks were timed in its format, the sizes are solved for that meet the goal's bound on what
is predicted, and those that are a little faster than asked, since predictions miss. A goal without a bound (the least
latency) gets a few shares of the blocks' time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gossamer.goal import Constraint, Goal
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
from gossamer.plan.job import Job
from gossamer.plan.predict import Tables, predicted_latency
from gossamer.plan.specimens import layers_of
from gossamer.techniques.base import Decision, SearchSpace, resolved
from gossamer.techniques.prune.prune import LESS_WORK, Prune
from gossamer.techniques.quantize.quantize import Quantize

TIMED = frozenset(("latency", "throughput"))
MARGINS = (0.94, 0.85)  # of the bound: what is solved for
SHARES = (0.75, 0.5, 0.35)  # of the blocks' time, where the goal has no bound
LEAST_ROWS = 4 * Prune.needs.calibration_rows
Saved = tuple[str, int]  # format or quantity, hundredths of all that can be saved


def tables_of_blocks(job: Job, space: SearchSpace) -> tuple[BlockTimes, ...]:
    """Return how long blocks take at each size in the formats that computing in integers has; none if not asked for."""
    if not space.wanted & TIMED or space.calibration_rows < LEAST_ROWS:
        return ()
    runs = [run[0] for run in Quantize.candidates(space) if run[0].activations != "none"]
    return block_times(job, formats_of(job.model, [step.resolve(job.model) for step in runs]))


def with_solved_cuts(job: Job, goal: Goal, tables: Tables, space: SearchSpace, found: Sequence[Steps]) -> list[Steps]:
    """Return recipes with cuts that are solved for the goal in place of those of fixed shares.

    As they are where nothing can be solved: no bound on less work, too few rows, blocks that are not understood.
    """
    if not space.wanted & LESS_WORK or space.calibration_rows < LEAST_ROWS:
        return list(found)
    choices = cutting(job)
    uncut = [steps for steps in found if not any(isinstance(step, Prune) for step in steps)]
    solved = list(dict.fromkeys(_solved(goal, tables, space, uncut, choices))) if choices is not None else []
    if not solved or choices is None:
        return list(found)
    kinds = {one.kind for choice in choices.choices for one in choice.dimensions}
    fixed = [steps for steps in found if not any(isinstance(step, Prune) and step.what in kinds for step in steps)]
    return [*fixed, *solved]


def _solved(
    goal: Goal, tables: Tables, space: SearchSpace, uncut: Sequence[Steps], choices: Cutting
) -> Iterator[Steps]:
    known: dict[Saved, tuple[Prune, ...] | None] = {}
    for steps in ((), *uncut):
        for cuts in _cuts(goal, tables, steps, choices, known):
            together = joined(cuts, steps, space) if steps else cuts
            if together is not None:
                yield together


def _cuts(
    goal: Goal, tables: Tables, steps: Steps, choices: Cutting, known: dict[Saved, tuple[Prune, ...] | None]
) -> Iterator[tuple[Prune, ...]]:
    """Yield the cuts that bring one recipe to the goal; `known` keeps those that others asked for."""
    decisions, after = resolved(tables.model, steps)
    label = None if any(one.dtype for one in decisions) else common_format(tables.blocks, tables, decisions)
    for quantity, needed in _needed(goal, tables, predicted_latency(tables, decisions, after), label):
        of = (
            seconds_by_size(tables.blocks, label or "")
            if quantity in TIMED
            else counted_by_size(tables.model, quantity)
        )
        saved = choices.saved(of)
        total = max(1, int(saved.max(axis=1).sum()))
        key = (f"{label}" if quantity in TIMED else quantity, round(100 * needed / total))
        if key not in known:
            sizes = choices.best(saved, needed) if needed > 0 else {}
            known[key] = as_steps(sizes, tables.model) if sizes else None
        if (cuts := known[key]) is not None:
            yield cuts


def _needed(goal: Goal, tables: Tables, seconds: float, label: str | None) -> Iterator[tuple[str, float]]:
    """Yield what is bounded, and how much has to be saved of it, in billionths of a second or as a count."""
    for bound in goal.constraints:
        if bound.quantity in TIMED and label is not None:
            allowed = allowed_seconds(bound, tables)
            yield from ((bound.quantity, (seconds - margin * allowed) / UNIT_SECONDS) for margin in MARGINS)
        elif bound.quantity in ("params", "flops"):
            whole = tables.model.num_parameters if bound.quantity == "params" else 2 * tables.model.macs
            yield bound.quantity, whole - (bound.bound * whole if bound.relative else bound.bound)
    objective = goal.objective.quantity if goal.objective is not None else None
    if objective in TIMED and label is not None and not any(one.quantity in TIMED for one in goal.constraints):
        blocks = sum(len(one.blocks) * one.seconds for one in tables.blocks if one.format == label)
        yield from ((str(objective), (1 - share) * blocks / UNIT_SECONDS) for share in SHARES)


def allowed_seconds(bound: Constraint, tables: Tables) -> float:
    """Return the median latency that a bound on latency or throughput leaves, by the original's own distribution."""
    original = tables.original.latency
    if bound.quantity == "throughput":
        return 1 / (bound.bound * original.throughput if bound.relative else bound.bound)
    statistic = getattr(bound, "statistic", None) or "p50"
    share = bound.bound if bound.relative else bound.bound / float(getattr(original, statistic))
    return share * original.p50


def common_format(blocks: Sequence[BlockTimes], tables: Tables, decisions: Sequence[Decision]) -> str | None:
    """Return the format that all blocks get, None where they differ or it was not timed."""
    by_layer: Mapping[str, Decision] = {one.layer.name: one for one in decisions if one.weight is not None}
    places = {(one.stack, block): one.format for one in blocks for block in one.blocks}
    labels = {block_format(layers_of(tables.model, *place), by_layer) for place in places}
    return labels.pop() if len(labels) == 1 and labels <= {one.format for one in blocks} else None


def in_words(sizes: Mapping[Dimension, int]) -> str:
    """Return sizes in a few words: `heads 12 to 3-9, ffn 1536 to 480-1152`."""
    words = []
    for kind in dict.fromkeys(one.kind for one in sizes):
        here = {one: size for one, size in sizes.items() if one.kind == kind}
        left, whole = sorted(set(here.values())), sorted({one.size for one in here})
        words.append(f"{kind} {'-'.join(map(str, whole))} to {'-'.join(map(str, dict.fromkeys((left[0], left[-1]))))}")
    return ", ".join(words)
