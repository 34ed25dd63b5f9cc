"""How a forecast is printed: memory and time of each stage, disk, and what becomes of the modules."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.cli.console import Screen
from gossamer.plan.records import Covered, Forecast, Stage, Tried
from gossamer.report.words import NONE, show, show_count, show_duration, show_share

MOST_SHAPES = 3


def show_forecast(screen: Screen, planned: Tried) -> None:
    """Print what carrying out a recipe takes, before anything is spent."""
    found = planned.forecast
    if found is None:
        return
    screen.heading(f"what {planned.name} takes")
    columns = (
        ("stage", "memory", "time") if found.device == "cpu" else ("stage", "memory", f"on {found.device}", "time")
    )
    screen.table(columns, [_row(stage, found) for stage in found.stages], right=columns[1:])
    screen.pairs(totals(found))
    if planned.rejected:
        screen.line(f"cannot be carried out: {planned.rejected}", style="bold red")
    if found.coverage:
        screen.heading("what becomes of the modules")
        show_coverage(screen, found.coverage)


def _row(stage: Stage, found: Forecast) -> tuple[str, ...]:
    there = [show(stage.device_bytes, "B") if stage.device_bytes else NONE] if found.device != "cpu" else []
    return stage.name, show(stage.memory_bytes, "B"), *there, show_duration(stage.seconds)


def totals(found: Forecast) -> list[tuple[str, str]]:
    """Return a forecast's totals beside what there is."""
    parts = ", ".join(f"{part.what} {show(part.bytes, 'B')}" for part in found.disk)
    how = "read piece by piece" if found.streamed else "opened whole"
    there = (f"memory of {found.device}", f"{show(found.device_bytes, 'B')} of {show(found.device_limit, 'B')}")
    return [
        ("memory", f"{show(found.memory_bytes, 'B')} of {show(found.memory_limit, 'B')}; the model is {how}"),
        *([there] if found.device != "cpu" else []),
        ("disk", f"{show(found.disk_bytes, 'B')} of {show(found.disk_free, 'B')} that are free: {parts}"),
        ("time", show_duration(found.seconds)),
    ]


def show_coverage(screen: Screen, coverage: Sequence[Covered]) -> None:
    """Print modules that fare alike in one row."""
    total = max(1, sum(row.num_parameters for row in coverage))
    alike: dict[tuple[str, str, str], list[Covered]] = {}
    for row in coverage:
        alike.setdefault((row.role, row.done, row.why), []).append(row)
    columns = ("role", "modules", "parameters", "what is done", "why not", "for example")
    rows = [
        (
            role,
            str(len(members)),
            show_share(sum(row.num_parameters for row in members) / total),
            done or NONE,
            why,
            members[0].module,
        )
        for (role, done, why), members in alike.items()
    ]
    screen.table(columns, rows, right=columns[1:3], fold=columns[3:])
    touched = sum(row.num_parameters for row in coverage if row.done)
    screen.line(f"{show_count(touched)} of {show_count(total)} parameters are touched ({show_share(touched / total)})")
