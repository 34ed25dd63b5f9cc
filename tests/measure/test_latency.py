from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from gossamer.errors import MeasureError
from gossamer.measure.latency import Distribution, LatencyPair, ratio_interval, time_in_turns
from gossamer.tasks.base import Arrays


@dataclass
class Machine:
    """A machine whose clock moves only while something runs on it, and whose speed drifts."""

    drift: float = 0.0
    now: float = 0.0
    awake: set[str] = field(default_factory=set)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def clock(self) -> float:
        return self.now


@dataclass
class Program:
    """A program that takes `seconds` a run on an idle machine, and refuses to be timed beside another."""

    machine: Machine
    name: str
    seconds: float
    seen: list[int] = field(default_factory=list)

    def time(self, inputs: Arrays, repeats: int) -> list[float]:
        assert self.machine.awake == {self.name}
        self.seen.append(repeats)
        taken = []
        for _ in range(repeats):
            noise = float(self.machine.rng.lognormal(0, 0.1))
            taken.append(self.seconds * noise * (1 + self.machine.drift * self.machine.now))
            self.machine.now += taken[-1]
        return taken

    def pause(self) -> None:
        self.machine.awake.discard(self.name)

    def resume(self) -> None:
        self.machine.awake.add(self.name)


def programs(machine: Machine, *seconds: float) -> list[Program]:
    made = [Program(machine, f"program {index}", each) for index, each in enumerate(seconds)]
    machine.awake = {program.name for program in made}  # both children have just been opened
    return made


def test_a_drifting_machine_does_not_change_the_ratio() -> None:
    machine = Machine(drift=0.2)  # more than twice as slow after eight seconds
    candidate, original = programs(machine, 0.004, 0.010)
    pair = time_in_turns(candidate, original, {}, {}, clock=machine.clock)
    assert pair.ratio is not None
    assert pair.ratio.low <= 0.4 <= pair.ratio.high
    assert pair.ratio.value == pytest.approx(0.4, rel=0.03)
    assert pair.ratio.high - pair.ratio.low < 0.05
    assert pair.a.p95 / pair.a.min > 2  # what was taken alone would say anything
    assert machine.awake == {"program 0", "program 1"}


def test_rounds_follow_the_budget() -> None:
    machine = Machine()
    candidate, original = programs(machine, 0.004, 0.010)
    pair = time_in_turns(candidate, original, {}, {}, budget_seconds=4, round_seconds=0.1, clock=machine.clock)
    assert pair.b is not None
    assert len(pair.a.rounds) == len(pair.b.rounds)
    assert 15 <= len(pair.a.rounds) <= 22
    assert pair.a.round_size == pytest.approx(25, abs=5)
    assert pair.b.round_size == pytest.approx(10, abs=3)
    assert machine.now == pytest.approx(4, abs=0.5)


def test_a_slow_model_still_gets_its_rounds() -> None:
    machine = Machine()
    (slow,) = programs(machine, 5.0)
    alone = time_in_turns(slow, None, {}, None, budget_seconds=1, min_rounds=4, clock=machine.clock)
    assert (alone.b, alone.ratio) == (None, None)
    assert (alone.a.n, alone.a.round_size) == (4, 1)
    assert slow.seen[0] == 2  # the warm-up is not kept
    with pytest.raises(MeasureError, match="timed alone"):
        alone.ratio_of("p95")


def test_a_fast_model_stops_at_enough_rounds() -> None:
    machine = Machine()
    (fast,) = programs(machine, 1e-6)
    found = time_in_turns(fast, None, {}, None, max_rounds=5, min_rounds=5, items=8, clock=machine.clock)
    assert len(found.a.rounds) == 5
    assert found.a.throughput == pytest.approx(8 / found.a.mean)


def test_figures_are_numpys_and_survive_json() -> None:
    samples = np.random.default_rng(0).gamma(3, 0.01, 200)
    found = Distribution(samples=tuple(samples), round_size=20)
    assert (found.p50, found.p95, found.p99) == pytest.approx(tuple(np.percentile(samples, [50, 95, 99])))
    assert (found.mean, found.min, found.n) == (pytest.approx(samples.mean()), samples.min(), 200)
    again = LatencyPair.model_validate_json(LatencyPair(a=found).model_dump_json())
    assert again.a == found
    measured = found.measurement("p95")
    assert measured.low < measured.value < measured.high
    assert (measured.n, measured.unit) == (10, "s")


def test_p95_agrees_with_a_bootstrap_written_as_a_loop() -> None:
    rng = np.random.default_rng(3)
    rounds_a, rounds_b = rng.gamma(9, 0.001, (12, 30)), rng.gamma(9, 0.002, (12, 15))
    a, b = (Distribution(samples=tuple(r.ravel()), round_size=r.shape[1]) for r in (rounds_a, rounds_b))
    found = ratio_interval(a, b, "p95")
    loop, drawn = random.Random(4), []
    for _ in range(1500):
        picks = [loop.randrange(12) for _ in range(12)]
        drawn.append(np.percentile(rounds_a[picks], 95) / np.percentile(rounds_b[picks], 95))
    width = found.high - found.low
    assert found.value == pytest.approx(np.percentile(rounds_a, 95) / np.percentile(rounds_b, 95))
    assert abs(found.low - np.percentile(drawn, 5)) < 0.1 * width
    assert abs(found.high - np.percentile(drawn, 95)) < 0.1 * width


def test_each_bound_covers_the_true_ratio_about_95_times_in_100() -> None:
    rng, below, above = np.random.default_rng(5), 0, 0
    for _ in range(100):
        speed = rng.lognormal(0, 0.3, (15, 1))  # another speed in each round, shared by both sides
        a, b = (
            Distribution(samples=tuple((speed * each * rng.lognormal(0, 0.2, (15, 10))).ravel()), round_size=10)
            for each in (0.3, 1.0)
        )
        found = ratio_interval(a, b)
        below += found.low <= 0.3
        above += found.high >= 0.3
    assert 86 <= below <= 100
    assert 86 <= above <= 100


def test_what_was_not_taken_in_turns_is_refused() -> None:
    one, other = Distribution(samples=(1.0,) * 6, round_size=2), Distribution(samples=(1.0,) * 8, round_size=2)
    with pytest.raises(MeasureError, match="3 rounds cannot be compared with 4"):
        ratio_interval(one, other)
    with pytest.raises(MeasureError, match="unknown latency statistic 'p42'"):
        one.of("p42")  # type: ignore[arg-type]
