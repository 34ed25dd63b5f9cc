"""Verdicts: PASS and FAIL need the whole relevant bound on one side; all else is UNDECIDED, and says what it needs.

For `quantity >= bound` (non-inferiority, when the quantity is the share of quality kept):

    PASS       low  >= bound      we are `confidence` sure that the bound is kept
    FAIL       high <  bound      we are `confidence` sure that it is not
    UNDECIDED  otherwise          the interval holds both; more samples shrink it

and mirrored for `<=`. An exact quantity (low = value = high) is never undecided. A point estimate alone decides
nothing.
"""

from __future__ import annotations

from math import ceil, isfinite
from typing import TYPE_CHECKING

from gossamer.goal import Verdict
from gossamer.measure.statistics import needed_samples, paired_quality
from gossamer.measure.types import Frozen, Interval, Op

if TYPE_CHECKING:
    from gossamer.tasks.base import Metric, Scores


class Decision(Frozen):
    """Hold a verdict, what it rests on, and if undecided how many more samples would decide (None: not foreseeable)."""

    verdict: Verdict
    interval: Interval
    op: Op
    bound: float
    needed: int | None = None

    def __str__(self) -> str:
        if self.verdict is not Verdict.UNDECIDED:
            return str(self.verdict)
        if self.needed is None:
            return "UNDECIDED: the estimate lies on the wrong side of the bound, but not surely"
        return f"UNDECIDED: {self.needed} more samples needed"


def judge_interval(low: float, value: float, high: float, op: Op, bound: float) -> Verdict:
    """Judge `quantity op bound` by its interval. Example: `judge_interval(0.985, 0.99, 0.995, ">=", 0.98)` passes.

    `value` must lie within the bounds (ValueError otherwise; NaN counts as outside); it does not influence the verdict.
    """
    if not low <= value <= high:
        raise ValueError(f"cannot judge: {value} does not lie between {low} and {high}")
    if op not in (">=", "<="):
        raise ValueError(f"cannot judge {op!r}: only >= and <=")
    if op == "<=":
        low, high, bound = -high, -low, -bound
    if low >= bound:
        return Verdict.PASS
    return Verdict.FAIL if high < bound else Verdict.UNDECIDED


def judge_exact(value: float, op: Op, bound: float) -> Verdict:
    """Judge a quantity that was counted: bytes, parameters."""
    return judge_interval(value, value, value, op, bound)


def judge_quality(interval: Interval, bound: float, op: Op = ">=") -> Verdict:
    """Judge non-inferiority (or for `<=` its mirror) at the confidence of the interval."""
    return judge_interval(interval.low, interval.value, interval.high, op, bound)


def decide_quality(
    candidate: Scores,
    original: Scores,
    metric: Metric,
    bound: float,
    *,
    op: Op = ">=",
    confidence: float = 0.95,
    seed: int = 0,
) -> Decision:
    """Estimate the share of quality kept, judge it, and say how many samples are missing when that is undecided."""
    interval = paired_quality(candidate, original, metric, confidence=confidence, seed=seed)
    verdict = judge_quality(interval, bound, op)
    needed = None
    if verdict is Verdict.UNDECIDED:
        needed = needed_samples(candidate, original, metric, bound, op=op, confidence=confidence)
    return Decision(verdict=verdict, interval=interval, op=op, bound=bound, needed=needed)


def decide_ratio(interval: Interval, bound: float, op: Op = "<=") -> Decision:
    """Judge an estimated ratio (latency, memory); when undecided, `needed` counts more rounds of the same kind.

    The width of an interval goes with 1 / sqrt(n), so n (width / gap)^2 rounds would decide; None when the estimate is
    on the wrong side of the bound.
    """
    verdict = judge_interval(interval.low, interval.value, interval.high, op, bound)
    needed = None
    if verdict is Verdict.UNDECIDED:
        gap = interval.value - bound if op == ">=" else bound - interval.value
        width = interval.value - interval.low if op == ">=" else interval.high - interval.value
        if gap > 0 and isfinite(width):
            needed = max(1, ceil(interval.n * (width / gap) ** 2) - interval.n)
    return Decision(verdict=verdict, interval=interval, op=op, bound=bound, needed=needed)
