"""How promising a recipe is: its prediction judged by the goal, and recipes in the order in which they are worth a try.

A prediction is compared with each bound in units of how far predictions of that quantity usually miss; the worst of
these is a recipe's promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gossamer.goal import Goal
from gossamer.judgement import Judgement, judge
from gossamer.plan.candidates import Steps
from gossamer.plan.predict import Corrections, Tables, as_figures, format_key, predict
from gossamer.plan.records import Figure, Measured, Original, Prediction, Tried
from gossamer.techniques.base import resolved

# how far predictions miss, as a share of the bound: quality adds half of the predicted loss to its own
USUAL_MISS = {"quality": 0.003, "size": 0.003, "latency": 0.12, "throughput": 0.12, "memory": 0.15}
MEASURED_KIND_MISS = {"latency": 0.04, "throughput": 0.04}  # once a like one was measured
MEASURED_SIZE_MISS = 1e-4
LIKELY, HOPELESS = 1.0, -2.5
LESS_IS_BETTER = ("size", "memory", "latency", "throughput")  # of bytes and of seconds
WORTH = 0.99  # of what passed: what takes more is no better
COUNTED = ("size", "params", "flops")  # known exactly before anything is measured


@dataclass(frozen=True)
class Ranked:
    """Hold a recipe with its prediction and how likely it is to meet the goal."""

    steps: Steps
    prediction: Prediction
    promise: float


def rank(goal: Goal, tables: Tables, recipes: Sequence[Steps], corrections: Corrections) -> list[Ranked]:
    """Return recipes with predictions, most promising first."""
    ranked = []
    for steps in recipes:
        prediction = predict(tables, steps, corrections)
        decisions = resolved(tables.model, steps)[0]
        kind = format_key(decisions)
        misses = MEASURED_KIND_MISS if kind in corrections.latency else {}
        if corrections.beside:  # headers and nodes are much the same in all kinds, as far as was seen
            unsure = corrections.unsure_bytes(kind) / prediction.size_bytes
            misses = {**misses, "size": MEASURED_SIZE_MISS + unsure}
        found = promise(goal, prediction, tables.original, misses)
        ranked.append(Ranked(steps, prediction, found))
    return in_order(goal, ranked)


def in_order(goal: Goal, ranked: Sequence[Ranked]) -> list[Ranked]:
    """Return ranked recipes, most promising first."""
    return sorted(ranked, key=lambda item: _order(goal, item))


def _order(goal: Goal, item: Ranked) -> tuple[float, ...]:
    """Return the sort key: likely ones first, by the objective if there is one, else by promise; then by bytes."""
    likely = item.promise >= LIKELY
    prediction = item.prediction
    if goal.objective is not None and likely:
        return (0.0, _wanted(goal, prediction), -item.promise)
    return (0.0 if likely else 1.0, -item.promise, prediction.kl, float(prediction.size_bytes))


def _wanted(goal: Goal, prediction: Prediction) -> float:
    """Return what a goal's objective wants as little as possible of."""
    found = {
        "size": float(prediction.size_bytes),
        "quality": -prediction.quality_share,
        "latency": prediction.latency_seconds,
        "throughput": prediction.latency_seconds,
        "memory": float(prediction.memory_bytes),
    }
    return found.get(goal.objective.quantity, 0.0) if goal.objective is not None else 0.0


def can_improve(goal: Goal) -> bool:
    """Say whether something else may be better than what passed: not without an objective.

    Nor with quality as the objective, by which what passed was the best that was predicted.
    """
    return goal.objective is not None and goal.objective.quantity in LESS_IS_BETTER


def is_better(goal: Goal, prediction: Prediction, known: Prediction) -> bool:
    """Say whether a prediction is better by the goal's objective than what is known, by so much that it is tried."""
    return _wanted(goal, prediction) < WORTH * _wanted(goal, known)


def reached(goal: Goal, tried: Tried) -> float:
    """Return what a measured candidate has of what the goal's objective wants as little as possible of."""
    if tried.measured is None or goal.objective is None or not can_improve(goal):
        return 0.0
    quantity = goal.objective.quantity
    name = quantity if quantity in ("size", "memory") else f"latency {goal.objective.statistic or 'p50'} ratio"
    return tried.measured.figures[name].value


def promise(goal: Goal, prediction: Prediction, original: Original, misses: Mapping[str, float] | None = None) -> float:
    """Return the worst distance of a prediction to a bound, in usual misses; positive when every bound is met.

    `misses` say how far those of some quantities miss, where it is known: recipes like this one were measured.
    """
    worst = 4.0
    for judgement in judge_prediction(goal, prediction, original):
        quantity = judgement.constraint.quantity
        miss = (misses or {}).get(quantity, USUAL_MISS.get(quantity, 0.01))
        if quantity == "quality":
            miss += 0.5 * (1 - prediction.quality_share)
        worst = min(worst, judgement.margin / miss)
    return worst


def judge_prediction(goal: Goal, prediction: Prediction, original: Original) -> list[Judgement]:
    """Judge a prediction as if it had been measured exactly; the run's own time is not judged here."""
    figures = {name: Figure.exact(value, "") for name, value in as_figures(prediction, original).items()}
    unchanged = original.same_runtime_latency or original.latency
    for statistic in ("p95", "p99", "mean"):
        stretch = getattr(unchanged, statistic) / unchanged.p50
        seconds = prediction.latency_seconds * stretch
        figures[f"latency {statistic}"] = Figure.exact(seconds, "s")
        figures[f"latency {statistic} ratio"] = Figure.exact(seconds / getattr(original.latency, statistic), "")
    if original.metric is not None:
        metric, share = original.metric.value, prediction.quality_share
        figures["quality"] = Figure.exact(metric * share if original.metric.higher_is_better else metric / share, "")
    judged = _without_time(goal)
    return judge(judged, figures, original_values(original)) if judged is not None else []


def judge_measured(goal: Goal, measured: Measured, original: Original) -> list[Judgement]:
    """Judge a measured artifact; paired ratios are used where they were measured."""
    figures: dict[str, Figure] = dict(measured.figures)
    if "quality" in figures:  # the record's `quality` is the paired share, the goal's own one the metric itself
        figures["quality ratio"], figures["quality"] = figures["quality"], figures["metric"]
    judged = _without_time(goal)
    return judge(judged, figures, original_values(original)) if judged is not None else []


def original_values(original: Original) -> Mapping[str, float]:
    """Return the original's figures by the names that goals use, in base units."""
    return {
        "quality": original.metric.value if original.metric is not None else 0.0,
        "size": original.size_bytes,
        "latency p50": original.latency.p50,
        "latency p95": original.latency.p95,
        "latency p99": original.latency.p99,
        "latency mean": original.latency.mean,
        "throughput": original.latency.throughput,
        "memory": original.memory_bytes,
        "params": original.num_parameters,
        "flops": 2 * original.macs,
    }


def upper_bounds(goal: Goal, original: Original) -> dict[str, float]:
    """Return the tightest of a goal's bounds on what can be counted, by quantity, as shares of the original's."""
    values, found = original_values(original), dict[str, float]()
    for part in goal.constraints:
        if part.quantity in COUNTED:
            share = part.bound if part.relative else part.bound / values[part.quantity]
            found[part.quantity] = min(share, found.get(part.quantity, share))
    return found


def _without_time(goal: Goal) -> Goal | None:
    """Return the goal's bounds on the artifact: `time` bounds the run. None when nothing is left."""
    kept = tuple(constraint for constraint in goal.constraints if constraint.quantity != "time")
    return goal.model_copy(update={"constraints": kept}) if kept else None


def time_budget(goal: Goal) -> float | None:
    """Return the seconds that the goal allows the run, or None."""
    return next((constraint.bound for constraint in goal.constraints if constraint.quantity == "time"), None)
