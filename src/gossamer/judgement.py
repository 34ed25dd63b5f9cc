"""What became of a goal: each bound compared with what was measured, and the verdict of all of them.

Judging compares the whole interval with the bound, never the point alone: PASS when every value in the interval meets
the bound, FAIL when none does, UNDECIDED otherwise. The margin is taken at the interval's worst end, so it is not
negative exactly where the bound is proven to be met (a strict `<` or `>` also wants it not to be zero).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gossamer.errors import MeasureError
from gossamer.goal import Constraint, Goal

NOT_FINITE_MARGIN = -100.0  # a score that is not a number ranks behind every real one, and stays valid JSON


class Verdict(StrEnum):
    """Say whether a bound is met: proven, disproven, or not yet known."""

    PASS = "PASS"
    FAIL = "FAIL"
    UNDECIDED = "UNDECIDED"


class Measured(Protocol):
    """Stand for any measurement: a value with its interval, in base units (bytes, seconds, counts) or a share."""

    @property
    def value(self) -> float:
        """Return the point estimate."""

    @property
    def low(self) -> float:
        """Return the interval's lower end; `value` itself when it is exact."""

    @property
    def high(self) -> float:
        """Return the interval's upper end; `value` itself when it is exact."""


@dataclass(frozen=True)
class Judgement:
    """Hold what became of one constraint; `value low high bound` are shares of the original or base units.

    `margin` is the distance of the interval's worst end to the bound as a share of the bound, positive when met: -0.17
    for 35.2 % where 30 % was asked.
    """

    constraint: Constraint
    verdict: Verdict
    value: float
    low: float
    high: float
    bound: float
    margin: float
    why: str


def judge(goal: Goal, measured: Mapping[str, Measured], original: Mapping[str, float]) -> list[Judgement]:
    """Compare measurements with each constraint of a goal.

    `measured` maps `Constraint.key` ("size", "latency p95") to values in base units. A relative constraint takes the
    paired ratio under key + " ratio" ("quality ratio", 1.0 = equal) when it is there, and else divides by
    `original[key]`. Relative quality always needs "quality ratio": only the task knows which way its metric points.
    Raises MeasureError naming what was not measured.
    """
    return [_judge_one(constraint, *_as_compared(constraint, measured, original)) for constraint in goal.constraints]


def _as_compared(
    constraint: Constraint, measured: Mapping[str, Measured], original: Mapping[str, float]
) -> tuple[float, float, float]:
    key, ratio = constraint.key, f"{constraint.key} ratio"
    if constraint.relative and ratio in measured:
        found = measured[ratio]
        return found.value, found.low, found.high
    wanted = ratio if constraint.relative and constraint.quantity == "quality" else key
    if wanted not in measured:
        raise MeasureError(f"`{constraint}` needs {wanted!r}, which was not measured", f"measured: {sorted(measured)}")
    found = measured[wanted]
    if not constraint.relative:
        return found.value, found.low, found.high
    if not original.get(key, 0.0) > 0:
        raise MeasureError(f"`{constraint}` needs the original's {key}, found {original.get(key)}", "measure it first")
    return found.value / original[key], found.low / original[key], found.high / original[key]


def _judge_one(constraint: Constraint, value: float, low: float, high: float) -> Judgement:
    bound = constraint.bound
    asked = constraint.describe().partition(", with")[0]
    if not all(map(math.isfinite, (value, low, high))):
        why = f"{constraint.key} is not a finite number ({value:g}, {low:g} to {high:g}): the model has collapsed"
        return Judgement(constraint, Verdict.FAIL, value, low, high, bound, NOT_FINITE_MARGIN, why)
    worst, best = (low, high) if constraint.at_least else (high, low)
    margin = (worst - bound) / bound if constraint.at_least else (bound - worst) / bound
    hope = (best - bound) / bound if constraint.at_least else (bound - best) / bound
    met, possible = (margin > 0, hope > 0) if constraint.strict else (margin >= 0, hope >= 0)
    verdict = Verdict.PASS if met else Verdict.UNDECIDED if possible else Verdict.FAIL
    interval = "" if low == high else f" ({constraint.show(low)} to {constraint.show(high)})"
    found = f"{constraint.key} is {constraint.show(value)}{interval}"
    why = {
        Verdict.PASS: f"{found}: {asked}, as asked",
        Verdict.FAIL: f"{found}, but asked was {asked}",
        Verdict.UNDECIDED: f"{found}: the interval holds values on both sides of what was asked, {asked}",
    }[verdict]
    return Judgement(constraint, verdict, value, low, high, bound, margin, why)


def overall(judgements: Sequence[Judgement]) -> Verdict:
    """Return FAIL when any bound is not met, PASS when every bound is, else UNDECIDED; nothing judged never passes."""
    verdicts = {judgement.verdict for judgement in judgements}
    if Verdict.FAIL in verdicts:
        return Verdict.FAIL
    return Verdict.PASS if verdicts == {Verdict.PASS} else Verdict.UNDECIDED


def violation(judgements: Sequence[Judgement]) -> float:
    """Return by how much bounds are missed in total, each as a share of its bound; 0.0 when all are proven."""
    return sum(max(0.0, -judgement.margin) for judgement in judgements)


def binding(judgements: Sequence[Judgement]) -> Constraint:
    """Return the constraint that stands in the way most: the one with the worst margin, the first of equals."""
    return min(judgements, key=lambda judgement: judgement.margin).constraint
