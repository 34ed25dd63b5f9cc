"""What the page's plots and tiles show, read out of a run: which numbers, in which words, under which goal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gossamer.goal import Constraint, parse_goal
from gossamer.plan.records import Figure, Judged, LatencyRecord, RunResult, Tried
from gossamer.report.plots import CurvePlot, IntervalPlot, Mark, Scatter, curve_plot, interval_plot, scatter
from gossamer.report.words import (
    latency_share,
    quality_share,
    read_constraint,
    show,
    show_judged,
    show_seconds,
    show_share,
    size_share,
)

STATISTIC_IN_WORDS = {"p50": "median", "p95": "95th percentile", "p99": "99th percentile", "mean": "mean"}


@dataclass(frozen=True)
class Tile:
    """Hold one headline number: its name, the share of the original, before and after, and the interval in words."""

    name: str
    value: str
    detail: str
    interval: str


@dataclass(frozen=True)
class GoalRow:
    """Hold one constraint's judgement as the page shows it."""

    judged: Judged
    words: str
    value: str
    interval: str
    bound: str
    ends: tuple[str, str]
    plot: IntervalPlot | None


@dataclass(frozen=True)
class LatencyRow:
    """Hold one line of the latency table, with its median as a share of the original's."""

    name: str
    kind: str
    record: LatencyRecord
    share: float


def headline(result: RunResult) -> list[Tile]:
    """Return the chosen candidate's numbers beside the original's: quality, size, latency, memory."""
    if result.chosen is None or (measured := result.tried[result.chosen].measured) is None:
        return []
    chosen, original, figures = result.tried[result.chosen], result.original, measured.figures
    tiles = []
    if (quality := quality_share(chosen)) is not None:
        metric = figures.get("metric")
        scores = ""
        if metric is not None and original.metric is not None:
            scores = f"{original.metric.value:.4g} → {metric.value:.4g} {result.metric_name}"
        tiles.append(Tile("quality kept", show_share(quality.value), scores, _range(quality)))
    if (size := figures.get("size")) is not None:
        change = f"{show(original.size_bytes, 'B')} → {show(size.value, 'B')}"
        tiles.append(Tile("size, of the original", show_share(size.value / original.size_bytes), change, "exact"))
    if (latency := latency_share(chosen)) is not None:
        change = f"{show_seconds(measured.original_latency.p50)} → {show_seconds(measured.latency.p50)} median"
        tiles.append(Tile("latency, of the original", show_share(latency.value), change, _range(latency)))
    if (memory := figures.get("memory")) is not None:
        change = f"{show(original.memory_bytes, 'B')} → {show(memory.value, 'B')}"
        tiles.append(Tile("peak memory, of the original", show_share(memory.value / original.memory_bytes), change, ""))
    return tiles


def goal_rows(chosen: Tried) -> list[GoalRow]:
    """Return each constraint with its words, its numbers and its interval plot."""
    rows = []
    for judged in chosen.judgements:
        constraint = read_constraint(judged)
        at_least = constraint.at_least if constraint is not None else judged.margin * (judged.value - judged.bound) > 0
        plot = interval_plot(judged.value, judged.low, judged.high, judged.bound, at_least=at_least)
        exact = judged.low == judged.high
        rows.append(
            GoalRow(
                judged=judged,
                words=constraint.describe() if constraint is not None else judged.constraint,
                value=show_judged(judged, judged.value),
                interval="exact"
                if exact
                else f"{show_judged(judged, judged.low)} to {show_judged(judged, judged.high)}",
                bound=show_judged(judged, judged.bound),
                ends=(show_judged(judged, plot.ends[0]), show_judged(judged, plot.ends[1])) if plot else ("", ""),
                plot=plot,
            )
        )
    return rows


def cost_plots(result: RunResult) -> list[Scatter]:
    """Return the plots of size against quality and of latency against quality; none when nothing was measured."""
    goal = (
        {constraint.quantity: constraint for constraint in parse_goal(result.goal).constraints} if result.goal else {}
    )
    statistic = (goal["latency"].statistic if "latency" in goal else None) or "p50"
    original, y_bound = result.original, _quality_bound(goal.get("quality"), result)
    sizes, latencies = [], []
    for index, one in enumerate(result.tried):
        latency, quality = latency_share(one, statistic), quality_share(one)
        if quality is None or not math.isfinite(quality.value):
            continue  # nothing to place: not measured, or collapsed into what is not a number; the table says so
        size = Figure.exact(size_share(one, original), "")
        chosen = index == result.chosen
        predicted = one.predicted
        sizes.append(_mark(index, one, size, quality, predicted.size_bytes / original.size_bytes, chosen))
        if latency is not None:
            latencies.append(_mark(index, one, latency, quality, predicted.latency_share, chosen))
    if not sizes:
        return []
    name = result.provenance.runtime
    unchanged_size, unchanged_latency = [(1.0, 1.0, "the original")], [(1.0, 1.0, "the original")]
    if original.same_runtime_bytes and abs(original.same_runtime_bytes / original.size_bytes - 1) > 0.05:
        unchanged_size.append((original.same_runtime_bytes / original.size_bytes, 1.0, f"unchanged in {name}"))
    if original.same_runtime_latency is not None:
        ratio = _statistic(original.same_runtime_latency, statistic) / _statistic(original.latency, statistic)
        unchanged_latency.append((ratio, 1.0, f"unchanged in {name}"))
    size_bound = _share_bound(goal.get("size"), original.size_bytes)
    latency_bound = _share_bound(goal.get("latency"), _statistic(original.latency, statistic))
    latency_title = f"{STATISTIC_IN_WORDS[statistic]} latency, share of the original's"
    of_sizes = scatter(
        sizes, unchanged_size, x_title="size, share of the original's bytes", x_bound=size_bound, y_bound=y_bound
    )
    if not latencies:  # a model that is read piece by piece is not timed
        return [of_sizes]
    return [
        of_sizes,
        scatter(latencies, unchanged_latency, x_title=latency_title, x_bound=latency_bound, y_bound=y_bound),
    ]


def latency_rows(result: RunResult) -> list[LatencyRow]:
    """Return the latencies of the original, of the unchanged model in the same runtime, and of the chosen candidate.

    The original's are those that were timed in turns with the candidate.
    """
    if result.chosen is None or (measured := result.tried[result.chosen].measured) is None:
        return []
    base = measured.original_latency
    if not base.known:
        return []
    rows = [LatencyRow("original in PyTorch", "original", base, 1.0)]
    same = result.original.same_runtime_latency
    if same is not None:
        # it was timed beside the original at another moment: that ratio holds where absolute times have moved
        share = same.p50 / result.original.latency.p50
        rows.append(LatencyRow(f"unchanged in {result.provenance.runtime}", "unchanged", same, share))
    ratio = latency_share(result.tried[result.chosen])
    share = ratio.value if ratio is not None else measured.latency.p50 / base.p50
    rows.append(LatencyRow(result.tried[result.chosen].name, "candidate", measured.latency, share))
    return rows


def latency_plot(result: RunResult) -> CurvePlot | None:
    """Return the distribution functions of the same latencies; None when nothing was timed."""
    rows = [row for row in latency_rows(result) if row.record.samples]
    return (
        curve_plot([(row.name, row.kind, row.record.samples, show_seconds(row.record.p50)) for row in rows])
        if rows
        else None
    )


def _mark(index: int, one: Tried, cost: Figure, quality: Figure, predicted_cost: float, chosen: bool) -> Mark:
    return Mark(
        label=str(index + 1),
        title=f"{one.name}: {show_share(cost.value)} of the cost, {show_share(quality.value)} of the quality",
        verdict=one.verdict or "UNDECIDED",
        x=cost.value,
        y=quality.value,
        x_range=(cost.low, cost.high),
        y_range=(quality.low, quality.high),
        predicted=(predicted_cost, one.predicted.quality_share),
        chosen=chosen,
    )


def _share_bound(constraint: Constraint | None, original: float) -> float | None:
    if constraint is None:
        return None
    return constraint.bound if constraint.relative else constraint.bound / original


def _quality_bound(constraint: Constraint | None, result: RunResult) -> float | None:
    if constraint is None or constraint.relative:
        return None if constraint is None else constraint.bound
    metric = result.original.metric
    if metric is None:
        return None
    return constraint.bound / metric.value if metric.higher_is_better else metric.value / constraint.bound


def _statistic(record: LatencyRecord, statistic: str) -> float:
    return float(getattr(record, statistic))


def _range(figure: Figure) -> str:
    return "" if figure.low == figure.high else f"{show_share(figure.low)} to {show_share(figure.high)}"
