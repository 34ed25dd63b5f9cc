from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.goal import Verdict
from gossamer.measure.types import Interval
from gossamer.measure.verdict import decide_quality, decide_ratio, judge_exact, judge_interval, judge_quality
from gossamer.tasks.base import Metric, Scores

ACCURACY = Metric("accuracy", "", True, lambda mean: mean, lambda candidate, original: candidate / original)
finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("low", "high", "op", "verdict"),
    [
        (0.99, 1.01, ">=", Verdict.PASS),
        (0.991, 1.01, ">=", Verdict.PASS),
        (0.98, 1.01, ">=", Verdict.UNDECIDED),
        (0.97, 0.99, ">=", Verdict.UNDECIDED),  # the bound itself is still possible
        (0.97, 0.989, ">=", Verdict.FAIL),
        (0.97, 0.99, "<=", Verdict.PASS),
        (0.97, 1.0, "<=", Verdict.UNDECIDED),
        (0.991, 1.0, "<=", Verdict.FAIL),
        (-inf, inf, ">=", Verdict.UNDECIDED),
    ],
)
def test_the_whole_bound_decides(low: float, high: float, op: str, verdict: Verdict) -> None:
    value = 0.99 if low <= 0.99 <= high else low
    assert judge_interval(low, value, high, op, 0.99) is verdict  # type: ignore[arg-type]


@given(st.tuples(finite, finite, finite).map(sorted), finite)
def test_mirrored_questions_get_equal_answers(ends: list[float], bound: float) -> None:
    low, value, high = ends
    assert judge_interval(low, value, high, ">=", bound) is judge_interval(-high, -value, -low, "<=", -bound)


@given(finite, finite)
def test_a_counted_quantity_is_never_undecided(value: float, bound: float) -> None:
    assert judge_exact(value, "<=", bound) is (Verdict.PASS if value <= bound else Verdict.FAIL)
    assert judge_exact(value, ">=", bound) is (Verdict.PASS if value >= bound else Verdict.FAIL)


@pytest.mark.parametrize("ends", [(nan, 0.5, 1.0), (0.0, nan, 1.0), (0.0, 0.5, nan), (0.6, 0.5, 1.0)])
def test_a_broken_interval_is_not_judged(ends: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="cannot judge"):
        judge_interval(*ends, ">=", 0.5)


def test_quality_says_how_many_samples_are_missing() -> None:
    original = np.ones(100)
    found = decide_quality(Scores(original, original), Scores(original, original), ACCURACY, 0.99)
    assert found.verdict is Verdict.UNDECIDED
    assert found.needed == 199  # 299 in all: the first n with 0.05 ** (1 / n) >= 0.99, about 3 / 0.01
    assert str(found) == f"UNDECIDED: {found.needed} more samples needed"
    more = np.ones(100 + found.needed)
    assert decide_quality(Scores(more, more), Scores(more, more), ACCURACY, 0.99).verdict is Verdict.PASS


def test_a_candidate_that_lost_too_much_fails() -> None:
    original = np.ones(300)
    candidate = np.concatenate([np.ones(240), np.zeros(60)])
    found = decide_quality(Scores(candidate, original), Scores(original, original), ACCURACY, 0.99)
    assert (found.verdict, found.needed, str(found)) == (Verdict.FAIL, None, "FAIL")
    assert judge_quality(found.interval, 0.7) is Verdict.PASS


def test_a_ratio_asks_for_rounds() -> None:
    interval = Interval(value=0.38, low=0.34, high=0.42, n=10)
    assert decide_ratio(interval, 0.43).verdict is Verdict.PASS
    undecided = decide_ratio(interval, 0.40)
    assert (undecided.verdict, undecided.needed) == (Verdict.UNDECIDED, 30)  # twice as narrow: four times the rounds
    assert decide_ratio(interval, 0.36).needed is None
    assert "wrong side" in str(decide_ratio(interval, 0.36))
