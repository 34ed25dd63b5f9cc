"""Numbers in words, one way for the page, the model card and the command line: `9.5 ms`, `23.0 MB`, `27.1 %`."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

from gossamer.errors import GoalError
from gossamer.goal import Constraint, parse_goal
from gossamer.measure.size import human_size
from gossamer.plan.records import Figure, Judged, Original, Tried

NONE = "–"


def show(value: float, unit: str = "") -> str:
    """Write a value in base units for people: `show(0.0095, "s")` is `9.50 ms`; a share has the unit `share`."""
    if not math.isfinite(value):
        return f"{value:g}"
    if unit == "B":
        return human_size(value)
    if unit == "s":
        return show_seconds(value)
    if unit == "share":
        return show_share(value)
    return f"{value:.4g} {unit}".rstrip()


def show_seconds(seconds: float) -> str:
    """Write a latency: three digits, in the unit that suits it."""
    if math.isnan(seconds):
        return NONE
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(seconds) * scale >= 0.99995 or unit == "µs":
            return f"{_three_digits(seconds * scale)} {unit}"
    raise AssertionError("the last unit takes everything")


def show_duration(seconds: float) -> str:
    """Write how long work takes: `4 s`, `3 min 20 s`, `2 h 5 min`."""
    if not math.isfinite(seconds):
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def show_share(share: float) -> str:
    """Write a share of the original: `27.1 %`; more digits close to 100 %, where quality lives."""
    percent = share * 100
    if math.isnan(percent):
        return NONE
    if not math.isfinite(percent):
        return f"{percent:g}"
    digits = 2 if 90 <= percent < 110 else 1
    return f"{percent:.{digits}f} %"


def show_count(count: float) -> str:
    """Write a count: `22.7 M`, `860`."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale:
            return f"{_three_digits(count / scale)} {unit}"
    return f"{count:.0f}"


def show_figure(figure: Figure | None, *, unit: str | None = None) -> str:
    """Write a figure with its interval: `99.83 % (99.20 % to 100.33 %)`; `unit` overrides the figure's own."""
    if figure is None:
        return NONE
    own = figure.unit if unit is None else unit
    value = show(figure.value, own)
    return value if figure.low == figure.high else f"{value} ({show(figure.low, own)} to {show(figure.high, own)})"


def show_recipe(recipe: list[dict[str, Any]]) -> str:
    """Write the steps of a recipe as the YAML that `gossamer apply` reads."""
    plain = json.loads(json.dumps(recipe))  # tuples become lists, which YAML has too
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip()


def read_constraint(judged: Judged) -> Constraint | None:
    """Return the constraint that a judgement names; None when a later version wrote words that this one cannot read."""
    try:
        return parse_goal(judged.constraint).constraints[0]
    except GoalError:
        return None


def show_judged(judged: Judged, value: float) -> str:
    """Write a value of a judgement in the unit of its constraint."""
    constraint = read_constraint(judged)
    if constraint is None or not math.isfinite(value):
        return f"{value:.5g}"
    return show_share(value) if constraint.relative else constraint.show(value)


def size_share(tried: Tried, original: Original) -> float:
    """Return the measured size, or the predicted one where nothing was measured, as a share of the original."""
    size = tried.measured.figures.get("size") if tried.measured else None
    return (size.value if size else tried.predicted.size_bytes) / original.size_bytes


def latency_share(tried: Tried, statistic: str = "p50") -> Figure | None:
    """Return a latency as a share of the original's, timed in turns with it; None when it was not measured."""
    if tried.measured is None:
        return None
    ratio = tried.measured.figures.get(f"latency {statistic} ratio")
    if ratio is not None:
        return ratio
    if not tried.measured.latency.known:
        return None
    own, original = getattr(tried.measured.latency, statistic), getattr(tried.measured.original_latency, statistic)
    return Figure.exact(own / original, "")


def quality_share(tried: Tried) -> Figure | None:
    """Return the share of quality kept, paired with the original; None when it was not measured."""
    if tried.measured is None:
        return None
    return tried.measured.figures.get("quality") or tried.measured.figures.get("quality ratio")


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"
