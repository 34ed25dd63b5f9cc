"""Where marks go: axes invert, intervals lie on the right side of their bound, nothing leaves the frame."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gossamer.report.plots import Axis, Mark, curve_plot, interval_plot, quantile, scatter

reals = st.floats(min_value=-1e6, max_value=1e6)


@given(reals, reals, st.floats(min_value=0, max_value=1))
def test_an_axis_is_linear_and_holds_its_ends(low: float, high: float, share: float) -> None:
    assume(high - low > 1e-3)
    axis = Axis(low, high, 10, 510)
    assert axis.at(low + share * (high - low)) == pytest.approx(10 + 500 * share, abs=0.2)
    assert (axis.at(low - 1), axis.at(high + 1)) == (10, 510)


@given(reals, st.floats(min_value=1e-6, max_value=1e6))
def test_ticks_are_on_the_axis_and_evenly_spaced(low: float, length: float) -> None:
    assume(length > 1e-6 * abs(low))
    ticks = Axis(low, low + length, 0, 1).ticks()
    assert 1 <= len(ticks) <= 7
    assert all(low - length * 1e-6 <= tick <= low + length * (1 + 1e-6) for tick in ticks)


@pytest.mark.parametrize("at_least", [True, False])
@given(st.floats(0.01, 2), st.floats(0, 0.2), st.floats(0, 0.2), st.floats(0.01, 2))
def test_an_interval_stands_on_its_own_side_of_the_bound(
    at_least: bool, value: float, below: float, above: float, bound: float
) -> None:
    plot = interval_plot(value, value - below, value + above, bound, at_least=at_least)
    assert plot is not None
    assert 0 <= plot.low <= plot.value <= plot.high <= plot.width
    edges = plot.region
    assert (edges[0] if at_least else edges[1]) == plot.bound
    assert (plot.low >= plot.bound) == (value - below >= bound) or abs(value - below - bound) < 0.02


def test_what_is_not_a_number_has_no_interval_plot() -> None:
    assert interval_plot(float("nan"), 0, 1, 0.5, at_least=True) is None


def a_mark(label: str, x: float, y: float) -> Mark:
    return Mark(label, "", "PASS", x, y, (x, x), (y - 0.004, y + 0.004), (x, y), chosen=label == "1")


def test_a_collapsed_candidate_does_not_flatten_the_others() -> None:
    both = scatter([a_mark("1", 0.25, 0.998), a_mark("2", 0.1, 0.4)], [(1.0, 1.0, "original")],
                   x_title="size", x_bound=0.3, y_bound=0.99)  # fmt: skip
    alone = scatter([a_mark("1", 0.25, 0.998)], [(1.0, 1.0, "original")], x_title="size", x_bound=0.3, y_bound=0.99)
    assert both.marks[-1] == alone.marks[0]  # the chosen one is drawn last, over the others
    collapsed = both.marks[0]
    assert collapsed.below
    assert "40.0 %" in collapsed.quality
    assert collapsed.y == both.frame[3]


def test_the_region_of_the_goal_holds_exactly_the_marks_that_meet_it() -> None:
    marks = [a_mark("1", 0.25, 0.998), a_mark("2", 0.35, 0.998), a_mark("3", 0.25, 0.985)]
    plot = scatter(marks, [], x_title="size", x_bound=0.3, y_bound=0.99)
    assert plot.region is not None
    x, y, width, height = plot.region
    inside = {m.label for m in plot.marks if x <= m.x <= x + width and y <= m.y <= y + height}
    assert inside == {"1"}


def test_without_a_bound_on_quality_the_region_spans_the_height() -> None:
    plot = scatter([a_mark("1", 0.25, 0.998)], [], x_title="size", x_bound=0.3, y_bound=None)
    assert plot.region is not None
    assert plot.region[3] == plot.frame[3] - plot.frame[1]
    assert scatter([a_mark("1", 0.2, 1.0)], [], x_title="size", x_bound=None, y_bound=None).region is None


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_numpys(samples: list[float], share: float) -> None:
    assert quantile(sorted(samples), share) == pytest.approx(float(np.quantile(samples, share)))


def test_the_curve_crosses_half_at_the_median() -> None:
    samples = np.random.default_rng(0).lognormal(-4, 0.1, 801)
    plot = curve_plot([("original", "original", samples.tolist(), "18 ms")])
    corners = [(float(x), float(y)) for x, y in re.findall(r"H([\d.]+)V([\d.]+)", plot.curves[0].path)]
    assert len(corners) <= 402
    median_x, half_y = plot.curves[0].median
    crossing = next(x for x, y in corners if y <= half_y)  # pixels grow downwards
    assert crossing == pytest.approx(median_x, abs=3)
    heights = [y for _, y in corners]
    assert heights == sorted(heights, reverse=True)


def test_one_stray_request_does_not_shrink_the_rest() -> None:
    calm = [0.01] * 99 + [0.011]
    plot = curve_plot([("a", "original", [*calm * 10, 5.0], "10 ms")])
    assert plot.curves[0].median[0] > plot.frame[2] / 2
