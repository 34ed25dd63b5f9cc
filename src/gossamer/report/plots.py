"""Where the marks of the plots go: pure functions from figures to pixels. The templates draw them as inline SVG.

A page that must open offline, print, and stay small draws its few dozen marks itself: 10 kB of SVG instead of a
plotting library of 4 MB, and nothing in it that could run a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

ECDF_POINTS = 240  # a curve has no more: what the eye can tell apart at the plot's width


@dataclass(frozen=True)
class Axis:
    """Map values from `low` to `high` onto pixels from `start` to `end`; values outside are held at the ends."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value, rounded to a tenth."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        """Return round values on the axis, about that many: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class IntervalPlot:
    """Hold one constraint's plot: the region that is asked for, the bound, and the interval with its point."""

    width: int
    region: tuple[float, float]
    bound: float
    low: float
    high: float
    value: float
    ends: tuple[float, float]  # the values at the two ends of the axis


def interval_plot(value: float, low: float, high: float, bound: float, *, at_least: bool) -> IntervalPlot | None:
    """Place an interval against its bound; None when it is not finite.

    What is bounded from above (bytes, seconds) is drawn from zero; what is bounded from below (quality) is drawn close
    up around bound and interval, where its differences are.
    """
    if not all(map(math.isfinite, (value, low, high, bound))):
        return None
    width = 300
    if at_least:
        reach = max(abs(edge - bound) for edge in (low, high, value)) * 1.25 or abs(bound) * 0.02 or 1.0
        axis = Axis(bound - max(reach, abs(bound) * 0.002), bound + max(reach, abs(bound) * 0.002), 4, width - 4)
        region = (axis.at(bound), axis.end)
    else:
        axis = Axis(min(0.0, low), max(high, bound) * 1.3, 4, width - 4)
        region = (axis.start, axis.at(bound))
    return IntervalPlot(
        width, region, axis.at(bound), axis.at(low), axis.at(high), axis.at(value), (axis.low, axis.high)
    )


@dataclass(frozen=True)
class Mark:
    """Hold one candidate of a scatter plot, in shares of the original: measured point, intervals, prediction."""

    label: str
    title: str
    verdict: str
    x: float
    y: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    predicted: tuple[float, float]
    chosen: bool = False


@dataclass(frozen=True)
class PlacedMark:
    """Hold a mark in pixels; `below` when its quality lies under what the plot shows."""

    label: str
    title: str
    verdict: str
    x: float
    y: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    predicted: tuple[float, float]
    chosen: bool
    below: bool
    quality: str  # written beside a mark that lies below the plot


@dataclass(frozen=True)
class Scatter:
    """Hold a scatter plot in pixels: frame, ticks, region of the goal, marks, the original and other references."""

    width: int
    height: int
    frame: tuple[float, float, float, float]  # left, top, right, bottom
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_title: str
    region: tuple[float, float, float, float] | None
    marks: list[PlacedMark]
    references: list[tuple[float, float, str]] = field(default_factory=list)


def scatter(
    marks: Sequence[Mark],
    references: Sequence[tuple[float, float, str]],
    *,
    x_title: str,
    x_bound: float | None,
    y_bound: float | None,
) -> Scatter:
    """Place candidates by cost (x, share of the original, from 0) and quality (y, share kept).

    The quality axis shows the neighbourhood of the bound; a collapsed candidate far below it sits on the lower edge
    and says so, or it would press all others into one line.
    """
    width, height, left, top, right, bottom = 460, 320, 62.0, 16.0, 446.0, 268.0
    costs = [mark.x_range[1] for mark in marks] + [mark.predicted[0] for mark in marks] + [x for x, _, _ in references]
    x = Axis(0.0, max([*costs, x_bound or 0.0, 1.0]) * 1.08, left, right)
    floor = _quality_floor(marks, y_bound)
    ceiling = max([1.0, *(mark.y_range[1] for mark in marks), y_bound or 1.0])
    room = (ceiling - floor) * 0.08
    y = Axis(floor - room, ceiling + 2 * room, bottom, top)  # twice above: the names of what was not changed
    region = None
    if x_bound is not None or y_bound is not None:
        lower = bottom if y_bound is None else y.at(y_bound)
        region = (left, top, (right if x_bound is None else x.at(x_bound)) - left, lower - top)
    placed = [_place(mark, x, y) for mark in sorted(marks, key=lambda mark: mark.chosen)]
    return Scatter(
        width=width,
        height=height,
        frame=(left, top, right, bottom),
        x_ticks=[(x.at(tick), f"{tick * 100:g} %") for tick in x.ticks()],
        y_ticks=[(y.at(tick), f"{tick * 100:.6g} %") for tick in y.ticks()],
        x_title=x_title,
        region=region,
        marks=placed,
        references=[(x.at(cost), y.at(quality), name) for cost, quality, name in references],
    )


def _quality_floor(marks: Sequence[Mark], y_bound: float | None) -> float:
    """Return the least quality shown: that of the worst candidate, at most eight times the slack below 100 %."""
    bound = 0.99 if y_bound is None else y_bound
    least = min(1.0, bound) - 8 * max(1.0 - bound, 0.005)
    shown = [mark.y_range[0] for mark in marks if mark.y_range[0] >= least]
    return min([bound, 0.998, *shown]) if shown or not marks else least


def _place(mark: Mark, x: Axis, y: Axis) -> PlacedMark:
    return PlacedMark(
        label=mark.label,
        title=mark.title,
        verdict=mark.verdict,
        x=x.at(mark.x),
        y=y.at(mark.y),
        x_range=(x.at(mark.x_range[0]), x.at(mark.x_range[1])),
        y_range=(y.at(mark.y_range[0]), y.at(mark.y_range[1])),
        predicted=(x.at(mark.predicted[0]), y.at(mark.predicted[1])),
        chosen=mark.chosen,
        below=mark.y < y.low,
        quality=f"{mark.y * 100:.1f} %, off the scale",
    )


@dataclass(frozen=True)
class Curve:
    """Hold the share of requests answered within a time, as the `d` of an SVG path, with its median's place."""

    name: str
    kind: str
    path: str
    median: tuple[float, float]
    label: str


@dataclass(frozen=True)
class CurvePlot:
    """Hold the latency plot in pixels."""

    width: int
    height: int
    frame: tuple[float, float, float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_title: str
    curves: list[Curve]


def curve_plot(series: Sequence[tuple[str, str, Sequence[float], str]]) -> CurvePlot:
    """Draw the distribution function of each (name, kind, seconds, its median in words), on an axis from zero.

    The axis ends past the slowest 99th percentile: a single stray request must not shrink the rest.
    """
    width, height, left, top, right, bottom = 940, 280, 62.0, 14.0, 926.0, 228.0
    ordered = [(name, kind, sorted(samples), median) for name, kind, samples, median in series]
    longest = max(quantile(samples, 0.99) for _, _, samples, _ in ordered) * 1.12
    scale, unit = (1.0, "s") if longest >= 2 else (1e3, "ms") if longest >= 2e-3 else (1e6, "µs")
    x, y = Axis(0.0, longest * scale, left, right), Axis(0.0, 1.0, bottom, top)
    curves = []
    for name, kind, samples, median in ordered:
        path = _steps([value * scale for value in samples], x, y)
        curves.append(Curve(name, kind, path, (x.at(quantile(samples, 0.5) * scale), y.at(0.5)), median))
    return CurvePlot(
        width=width,
        height=height,
        frame=(left, top, right, bottom),
        x_ticks=[(x.at(tick), f"{tick:g}") for tick in x.ticks(8)],
        y_ticks=[(y.at(tick), f"{tick * 100:g} %") for tick in (0.0, 0.25, 0.5, 0.75, 1.0)],
        x_title=f"{unit} a request",
        curves=curves,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of sorted samples, interpolated between neighbours as numpy does."""
    place = (len(ordered) - 1) * share
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _steps(ordered: Sequence[float], x: Axis, y: Axis) -> str:
    """Return the path of the distribution function: at each sample it rises by one part in n."""
    count = len(ordered)
    stride = max(1, count // ECDF_POINTS)
    parts = [f"M{x.at(ordered[0])} {y.at(0.0)}"]
    for index in [*range(0, count - 1, stride), count - 1]:
        if ordered[index] > x.high:
            parts.append(f"H{x.end}")
            break
        parts.append(f"H{x.at(ordered[index])}V{y.at((index + 1) / count)}")
    else:
        parts.append(f"H{x.end}")
    return "".join(parts)
