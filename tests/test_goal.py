from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import GoalError, MeasureError
from gossamer.goal import QUANTITIES, STATISTICS, Constraint, Goal, Objective, parse_goal
from gossamer.judgement import Judgement, Verdict, binding, judge, overall, violation


@dataclass(frozen=True)
class Found:
    value: float
    low: float
    high: float


def exact(value: float) -> Found:
    return Found(value, value, value)


@st.composite
def goals(draw: st.DrawFn) -> Goal:
    constraints: dict[tuple[str, bool], Constraint] = {}
    for quantity in draw(st.lists(st.sampled_from(sorted(QUANTITIES)), min_size=1, max_size=6)):
        known = QUANTITIES[quantity]
        units = [*known.units] if quantity == "time" else ["%", *known.units]
        unit = draw(st.sampled_from(units))
        free_direction = quantity == "quality" and unit != "%"
        at_least = draw(st.booleans()) if free_direction else known.higher_is_better
        constraint = Constraint(
            quantity=quantity,
            statistic=draw(st.sampled_from(STATISTICS)) if quantity == "latency" else None,
            op=draw(st.sampled_from((">=", ">") if at_least else ("<=", "<"))),
            amount=draw(st.floats(min_value=1e-12, max_value=1e12)),
            unit=unit,
        )
        constraints.setdefault((constraint.key, constraint.relative), constraint)
    wanted = draw(st.none() | st.sampled_from(sorted(set(QUANTITIES) - {"time"})))
    objective = None
    if wanted is not None:
        verb = "maximize" if QUANTITIES[wanted].higher_is_better else "minimize"
        statistic = draw(st.sampled_from(STATISTICS)) if wanted == "latency" else None
        objective = Objective(verb=verb, quantity=wanted, statistic=statistic)
    return Goal(constraints=tuple(constraints.values()), objective=objective)


@settings(deadline=None)
@given(goals())
def test_a_goal_printed_reads_back_as_itself(goal: Goal) -> None:
    assert parse_goal(str(goal)) == goal
    assert str(parse_goal(str(goal))) == str(goal)
    assert Goal.model_validate_json(goal.model_dump_json()) == goal


@settings(deadline=None)
@given(st.text(alphabet="quality size latency p95 minimize >=<% 0123456789.eMB,and\n≥％"))
def test_any_text_is_a_goal_or_a_goal_error(text: str) -> None:
    try:
        goal = parse_goal(text)
    except GoalError:
        return
    assert parse_goal(str(goal)) == goal


@pytest.mark.parametrize(
    ("text", "bound", "relative"),
    [
        ("quality >= 99%", 0.99, True),
        ("quality >= 0.95", 0.95, False),
        ("size <= 30 MB", 30_000_000, False),
        ("size <= 30mib", 30 * 2**20, False),
        ("memory < 1.5 GiB", 1.5 * 2**30, False),
        ("size <= 12kB", 12_000, False),
        ("size <= 2 KiB", 2048, False),
        ("latency <= 40ms", 0.040, False),
        ("latency <= 250 μs", 0.00025, False),
        ("latency <= 40 %", 0.4, True),
        ("throughput >= 250/s", 250, False),
        ("params <= 22.7M", 22_700_000, False),
        ("params <= 1B", 1_000_000_000, False),
        ("flops <= 2.5G", 2_500_000_000, False),
        ("time <= 90 min", 5400, False),
        ("time <= 2h", 7200, False),
    ],
)
def test_bounds_are_in_base_units(text: str, bound: float, relative: bool) -> None:
    (constraint,) = parse_goal(text).constraints
    assert constraint.bound == pytest.approx(bound, rel=1e-12)
    assert constraint.relative is relative


def test_separators_signs_and_spellings_are_equal() -> None:
    expected = parse_goal("quality >= 99%, size <= 30%, latency p95 <= 40ms, minimize size")
    assert parse_goal("Quality ≥ 99 ％，size ≤ 30%\nlatency  P95<=40 MS and minimise size") == expected
    assert [constraint.key for constraint in expected.constraints] == ["quality", "size", "latency p95"]
    assert parse_goal("latency <= 40%").constraints[0].key == "latency p50"


@pytest.mark.parametrize(
    ("text", "part", "hint"),
    [
        ("", "empty", "quality >= 99%"),
        ("minimize size", "sets no bound", "quality >= 99%"),
        ("quality >= 99%, sise <= 30%", "`sise <= 30%`: unknown quantity 'sise'", "did you mean size"),
        ("accuracy >= 99%", "unknown quantity 'accuracy'", "did you mean quality"),
        ("quality >= 99%, size >= 30%", "`size >= 30%` is a bound that nobody wants", "size <= 30%"),
        ("quality <= 99%", "`quality <= 99%`", "quality >= 99%"),
        ("throughput <= 5/s", "`throughput <= 5/s`", "throughput >= 5/s"),
        ("size = 30%", "`=` is not a bound", "size <= 30%"),
        ("quality == 99%", "`==` is not a bound", "quality >= 99%"),
        ("size => 30%", "`=>` is not a bound", "size <= 30%"),
        ("size <= 10%, size <= 20%", "`size <= 20%` repeats `size <= 10%`", "keep one"),
        ("quality >= 0.9, quality <= 30", "`quality <= 30` contradicts `quality >= 0.9`", "keep one"),
        ("size <= 10%, size >= 20%", "`size >= 20%`", "size <= 20%"),
        ("size <= 30", "`size <= 30`: size wants a unit", "MB"),
        ("size <= 30ms", "takes no 'ms'", "MiB"),
        ("latency <= 3 MB", "takes no 'MB'", "ms"),
        ("time <= 30%", "time is the budget", "2h"),
        ("minimize time", "time is the budget", "time <= 2h"),
        ("latency p90 <= 3ms", "unknown statistic 'p90'", "p95"),
        ("size p95 <= 3MB", "takes no statistic", "size"),
        ("size <= 0%", "not a positive number", "above 0"),
        ("size <= -3%", "not a positive number", "above 0"),
        ("size <= 1e400MB", "not a positive number", "above 0"),
        ("size <= 1e305GB", "not a positive number", "above 0"),
        ("size <= 1,000 MB", "`size <= 1`", "MB"),
        ("10% >= size", "cannot read `10% >= size`", "quantity, operator"),
        ("size", "cannot read `size`", "quantity, operator"),
        ("size <= small", "`small` is not a number", "MB"),
        ("size <=", "is not a number", "MB"),
        ("size <= 3%, minimize quality", "`minimize quality`", "maximize quality"),
        ("size <= 3%, minimize size, maximize quality", "follows `minimize size`", "keep one"),
        ("size <= 3%, minimize", "names no quantity", "quality"),
    ],
)
def test_a_bad_goal_names_the_part_and_the_remedy(text: str, part: str, hint: str) -> None:
    with pytest.raises(GoalError) as caught:
        parse_goal(text)
    assert part in caught.value.message
    assert hint in caught.value.hint


def test_plain_words() -> None:
    goal = parse_goal("quality >= 99%, size <= 30%, latency <= 40%, latency p95 <= 40ms, time <= 2h, minimize size")
    assert goal.describe() == [
        "at least 99 % of the original's score, with 95 % confidence",
        "at most 30 % of the original's bytes",
        "at most 40 % of the original's median latency",
        "at most 40 ms of p95 latency",
        "at most 2 h for the run itself",
        "within these bounds, as few bytes as possible",
    ]
    assert "no bound on quality" in parse_goal("size < 30%").describe()[-1]


@pytest.mark.parametrize(
    ("text", "higher_is_better", "original", "accepted"),
    [
        ("quality >= 0.95", True, 0.98, True),
        ("quality <= 32", False, 30.4, True),
        ("quality >= 99", True, 0.98, False),
        ("quality >= 32", False, 30.4, False),
        ("quality <= 0.9", True, 0.98, False),
        ("quality <= 0.99", False, 30.4, False),
        ("quality >= 99%", False, 30.4, True),
    ],
)
def test_an_absolute_quality_must_fit_the_metric(
    text: str, higher_is_better: bool, original: float, accepted: bool
) -> None:
    goal = parse_goal(text)
    if accepted:
        goal.check_metric("metric", higher_is_better, original)
    else:
        with pytest.raises(GoalError, match="metric"):
            goal.check_metric("metric", higher_is_better, original)


def test_judging_by_intervals() -> None:
    goal = parse_goal("quality >= 99%, size <= 30%, latency p95 <= 40ms, throughput > 200%")
    measured = {
        "quality ratio": Found(0.995, 0.985, 1.002),
        "size": exact(27.0),
        "latency p95": Found(0.050, 0.045, 0.056),
        "throughput": Found(25.0, 24.0, 26.0),
    }
    quality, size, latency, throughput = judge(goal, measured, {"size": 100.0, "throughput": 10.0})
    assert [quality.verdict, size.verdict, latency.verdict, throughput.verdict] == [
        Verdict.UNDECIDED,
        Verdict.PASS,
        Verdict.FAIL,
        Verdict.PASS,
    ]
    assert (size.value, size.bound) == (0.27, 0.30)
    assert size.margin == pytest.approx(0.1)
    assert quality.margin == pytest.approx(0.985 / 0.99 - 1)
    assert latency.margin == pytest.approx(1 - 56 / 40)
    assert throughput.margin == pytest.approx(0.2)
    assert latency.why == "latency p95 is 50 ms (45 ms to 56 ms), but asked was at most 40 ms of p95 latency"
    assert "both sides" in quality.why
    judgements = [quality, size, latency, throughput]
    assert overall(judgements) is Verdict.FAIL
    assert binding(judgements) == goal.constraints[2]
    assert violation(judgements) == pytest.approx(0.4 + 1 - 0.985 / 0.99)


def test_a_paired_ratio_is_preferred_over_dividing() -> None:
    measured = {"latency p50": exact(0.050), "latency p50 ratio": Found(0.39, 0.38, 0.395)}
    (judgement,) = judge(parse_goal("latency <= 40%"), measured, {"latency p50": 0.1})
    assert judgement.verdict is Verdict.PASS
    assert judgement.value == 0.39


def test_quality_is_never_divided() -> None:
    # perplexity 60 over 30 would read 200 % and pass
    with pytest.raises(MeasureError, match="quality ratio"):
        judge(parse_goal("quality >= 99%"), {"quality": exact(60.0)}, {"quality": 30.0})


def test_what_was_not_measured_is_an_error() -> None:
    with pytest.raises(MeasureError, match="latency p99"):
        judge(parse_goal("latency p99 <= 4ms"), {"latency p50": exact(0.001)}, {})
    with pytest.raises(MeasureError, match="original's size"):
        judge(parse_goal("size <= 30%"), {"size": exact(1.0)}, {"size": 0.0})


def test_a_collapse_fails_and_ranks_last() -> None:
    goal = parse_goal("quality >= 99%")
    collapsed = judge(goal, {"quality ratio": exact(float("nan"))}, {})
    poor = judge(goal, {"quality ratio": exact(0.0)}, {})
    assert overall(collapsed) is Verdict.FAIL
    assert violation(collapsed) > violation(poor) > 0
    assert "collapsed" in collapsed[0].why


def test_nothing_judged_never_passes() -> None:
    assert overall([]) is Verdict.UNDECIDED


def test_a_strict_bound_is_not_met_by_equality() -> None:
    for text, verdict in (("size <= 30%", Verdict.PASS), ("size < 30%", Verdict.FAIL)):
        (judgement,) = judge(parse_goal(text), {"size": exact(300.0)}, {"size": 1000.0})
        assert judgement.verdict is verdict


@settings(deadline=None)
@given(st.sampled_from([">=", ">", "<=", "<"]), st.lists(st.floats(0.01, 3.0), min_size=3, max_size=3))
def test_verdict_agrees_with_trying_every_value_of_the_interval(op: str, points: list[float]) -> None:
    low, value, high = sorted(points)
    (judgement,) = judge(parse_goal(f"quality {op} 1"), {"quality": Found(value, low, high)}, {})
    compare = {">=": float.__ge__, ">": float.__gt__, "<=": float.__le__, "<": float.__lt__}[op]
    met = {compare(low + (high - low) * step / 16, 1.0) for step in range(17)} | {compare(high, 1.0)}
    expected = Verdict.UNDECIDED if len(met) == 2 else Verdict.PASS if True in met else Verdict.FAIL
    assert judgement.verdict is expected
    assert (judgement.margin >= 0) or judgement.verdict is not Verdict.PASS
    if judgement.verdict is Verdict.PASS:
        assert violation([judgement]) == 0


def test_overall_is_the_worst_of_all() -> None:
    (template,) = judge(parse_goal("size <= 30%"), {"size": exact(1.0)}, {"size": 10.0})

    def with_verdict(verdict: Verdict) -> Judgement:
        return Judgement(**{**vars(template), "verdict": verdict})

    rank = [Verdict.PASS, Verdict.UNDECIDED, Verdict.FAIL]
    for verdicts in itertools.product(rank, repeat=3):
        assert overall([with_verdict(verdict) for verdict in verdicts]) is max(verdicts, key=rank.index)
