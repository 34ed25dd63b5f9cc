"""Numbers in words: the right unit, digits that carry something, and units that agree with the goal's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.plan.records import Figure, Judged, RunResult
from gossamer.recipe import Recipe
from gossamer.report import words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0095, "9.50 ms"), (0.0208, "20.8 ms"), (0.412, "412 ms"), (1.5, "1.50 s"), (31e-6, "31.0 µs"),
     (0.99999, "1.00 s"), (0.0, "0.00 µs")],
)  # fmt: skip
def test_latencies_have_three_digits(seconds: float, text: str) -> None:
    assert words.show_seconds(seconds) == text


@given(st.floats(min_value=1e-6, max_value=1e4))
def test_a_latency_reads_back_within_half_a_percent(seconds: float) -> None:
    number, unit = words.show_seconds(seconds).split()
    assert float(number) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit] == pytest.approx(seconds, rel=6e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2, "4.2 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (math.inf, "–")],
)
def test_durations(seconds: float, text: str) -> None:
    assert words.show_duration(seconds) == text


def test_shares_near_the_whole_keep_two_decimals() -> None:
    assert words.show_share(0.99826) == "99.83 %"
    assert words.show_share(0.2531) == "25.3 %"
    assert words.show_share(math.nan) == words.NONE


def test_counts() -> None:
    assert [words.show_count(n) for n in (860, 22_713_986, 1.38e9)] == ["860", "22.7 M", "1.38 G"]


def test_a_figure_shows_its_interval_unless_it_is_exact() -> None:
    assert words.show_figure(Figure(value=0.02, low=0.019, high=0.021, unit="s")) == "20.0 ms (19.0 ms to 21.0 ms)"
    assert words.show_figure(Figure.exact(23_000_000, "B")) == "23 MB"
    assert words.show_figure(None) == "–"


def test_a_judgement_is_shown_in_the_unit_of_its_bound() -> None:
    judged = Judged(
        constraint="latency p95 <= 40ms", verdict="PASS", value=0.038, low=0.037, high=0.039, bound=0.04,
        margin=0.02, why="",
    )  # fmt: skip
    assert words.show_judged(judged, judged.value) == "38 ms"
    unknown = judged.model_copy(update={"constraint": "carbon <= 3 kg"})
    assert words.show_judged(unknown, 2.5) == "2.5"


def test_a_recipe_is_shown_as_the_yaml_that_apply_reads(make_run: Callable[..., RunResult]) -> None:
    for one in make_run().tried:
        shown = words.show_recipe(one.recipe)
        read = Recipe.from_yaml(shown)
        assert [step.technique for step in read.steps] == [name for step in one.recipe for name in step]


def test_latency_share_prefers_the_paired_ratio(make_run: Callable[..., RunResult]) -> None:
    chosen = make_run().tried[3]
    assert chosen.measured is not None
    paired = words.latency_share(chosen)
    assert paired is not None
    assert (paired.low, paired.high) == (0.272, 0.286)
    p95 = words.latency_share(chosen, "p95")
    assert p95 is not None
    assert p95.value == pytest.approx(chosen.measured.latency.p95 / chosen.measured.original_latency.p95)
