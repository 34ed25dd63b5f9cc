"""How a run and its candidates are printed: the verdict first, then the evidence, then what to do with the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gossamer.cli.console import Screen, verdict
from gossamer.plan.records import Figure, Judged, Original, RunResult, Tried
from gossamer.report.words import (
    NONE,
    latency_share,
    quality_share,
    show,
    show_count,
    show_duration,
    show_figure,
    show_judged,
    show_seconds,
    show_share,
    size_share,
)

NOT_MET = 2
NOT_MEASURED = "not measured: the model was read piece by piece"


def status_of(verdict_name: str) -> int:
    """Return the exit status of a verdict: 0 when the goal is met, else 2."""
    return 0 if verdict_name == "PASS" else NOT_MET


def show_run(screen: Screen, result: RunResult, report: Path | None) -> None:
    """Print what a run found: verdict, reason, goal beside measured, candidates, and where things are."""
    screen.verdict(result.verdict, result.reason)
    chosen = result.tried[result.chosen] if result.chosen is not None else None
    if chosen is not None and chosen.judgements:
        screen.heading(f"goal, and what {chosen.name} reaches")
        show_judgements(screen, chosen.judgements)
    if result.kind == "optimize":
        screen.heading(f"tried {len(result.tried)}, left out {len(result.not_tried)}")
        show_tried(screen, result.tried, result.original)
    screen.heading("result")
    rows: list[tuple[str, str]] = [("artifact", result.artifact or "none: no candidate was built")]
    if report is not None:
        rows.append(("report", str(report)))
    rows.append(("proved on", ", ".join(f"{count} rows for {use}" for use, count in result.rows.items())))
    rows.append(("took", show_duration(result.seconds)))
    if chosen is not None and chosen.forecast is not None:
        rows.append(("predicted", show_duration(chosen.forecast.seconds)))
    rows += [("note", note) for note in result.notes]
    screen.pairs(rows)
    if result.load_snippet and result.artifact:
        screen.heading("load it")
        screen.line(result.load_snippet.strip("\n"))


def show_judgements(screen: Screen, judgements: Sequence[Judged]) -> None:
    """Print each constraint with what was measured, its interval at 95 % confidence, and its verdict."""
    rows = [
        (
            judged.constraint,
            show_judged(judged, judged.value),
            NONE
            if judged.low == judged.high
            else f"{show_judged(judged, judged.low)} to {show_judged(judged, judged.high)}",
            verdict(judged.verdict),
        )
        for judged in judgements
    ]
    screen.table(("goal", "measured", "interval", "verdict"), rows, right=("measured",))


def show_tried(screen: Screen, tried: Sequence[Tried], original: Original) -> None:
    """Print each candidate: predicted, an arrow, measured."""
    columns = ("#", "candidate", "size", "latency", "quality", "verdict")
    rows, reasons = [], []
    for index, one in enumerate(tried, 1):
        latency, quality = latency_share(one), quality_share(one)
        measured_size = size_share(one, original) if one.measured else None
        rows.append(
            (
                str(index),
                one.name,
                _beside(one.predicted.size_bytes / original.size_bytes, measured_size),
                _beside(one.predicted.latency_share, latency.value if latency else None),
                _beside(one.predicted.quality_share, quality.value if quality else None),
                verdict(one.verdict) if one.verdict else "rejected",
            )
        )
        if why := one.rejected or "; ".join(judged.why for judged in one.judgements if judged.verdict != "PASS"):
            reasons.append((str(index), why))
    screen.table(columns, rows, fold=("candidate",))
    screen.line("shares of the original: predicted > measured", style="dim")
    screen.pairs(reasons)


def show_original(screen: Screen, original: Original) -> None:
    """Print what was measured of the original."""
    rows = [
        ("quality", show_figure(original.metric)),
        ("size", f"{show(original.size_bytes, 'B')}, {show_count(original.num_parameters)} parameters"),
        ("latency", _latency_words(original)),
        ("memory", f"{show(original.memory_bytes, 'B')} at the peak" if original.memory_bytes else NOT_MEASURED),
        ("work", f"{show_count(original.macs)} multiply-adds a request"),
    ]
    screen.pairs(rows)


def _latency_words(original: Original) -> str:
    if not original.latency.known:
        return NOT_MEASURED
    return f"median {show_seconds(original.latency.p50)}, p95 {show_seconds(original.latency.p95)}"


def show_predictions(screen: Screen, candidates: Sequence[Tried], original: Original) -> None:
    """Print what the planner expects of each candidate, most promising first."""
    columns = ("#", "candidate", "size", "", "latency", " ", "quality", "memory", "time", "why not")
    rows = [
        (
            str(index),
            one.name,
            show(one.predicted.size_bytes, "B"),
            show_share(one.predicted.size_bytes / original.size_bytes),
            show_seconds(one.predicted.latency_seconds),
            show_share(one.predicted.latency_share),
            show_share(one.predicted.quality_share),
            show(one.predicted.memory_bytes, "B"),
            show_duration(one.predicted.seconds),
            one.rejected,
        )
        for index, one in enumerate(candidates, 1)
    ]
    if not any(one.rejected for one in candidates):
        columns, rows = columns[:-1], [row[:-1] for row in rows]  # type: ignore[assignment,misc]
    screen.table(columns, rows, right=columns[2:9], fold=("candidate", "why not"))


def with_interval(figure: Figure | None) -> str:
    """Write a share with its interval."""
    return show_figure(figure, unit="share")


def _beside(predicted: float, measured: float | None) -> str:
    return f"{show_share(predicted)} > {NONE if measured is None else show_share(measured)}"
