"""Latency: distributions after warm-up, and two artifacts compared in turns.

The speed of a shared machine drifts by tens of percent within minutes: only what ran side by side compares. A *round*
times a few runs of one artifact (about 0.2 s), then of the other; whoever is not timed is stopped. The next round goes
the other way about, so that a steady drift favours neither. With a_r and b_r the runs of round r:

    ratio of medians    median over rounds of  median(a_r) / median(b_r)       the drift between rounds cancels
    ratio of others     percentile of all a / percentile of all b              a round holds too few runs for a p95

Rounds are the unit that is resampled (a bootstrap of blocks: the runs within a round are not independent of each
other), both sides of a round together. The percentile bootstrap, not BCa: quantiles are not smooth, and the
leave-one-out figures of a median take two values. Bounds are one-sided at `confidence` (see `gossamer.measure.types`).
What the rounds do not show (another day, another machine) the interval does not hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, computed_field
from scipy import stats

from gossamer.errors import MeasureError
from gossamer.measure.types import Frozen, Interval, Measurement

if TYPE_CHECKING:
    from gossamer.tasks.base import Arrays

Floats = NDArray[np.float64]
Statistic = Literal["p50", "p95", "p99", "mean", "min"]
STATISTICS: dict[str, Callable[[Floats], Floats]] = {
    "p50": lambda seconds: np.quantile(seconds, 0.50, axis=-1),
    "p95": lambda seconds: np.quantile(seconds, 0.95, axis=-1),
    "p99": lambda seconds: np.quantile(seconds, 0.99, axis=-1),
    "mean": lambda seconds: np.mean(seconds, axis=-1),
    "min": lambda seconds: np.min(seconds, axis=-1),
}
RESAMPLES = 2_000
ELEMENTS_AT_ONCE = 4_000_000  # seconds held while resampling
MAX_RUNS_A_ROUND = 500


class Timed(Protocol):
    """Be an artifact that can be timed and put to sleep: `gossamer.runtimes.process.Served` is one."""

    def time(self, inputs: Arrays, repeats: int) -> list[float]:
        """Return the seconds of `repeats` runs."""

    def pause(self) -> None:
        """Take no processor until `resume`."""

    def resume(self) -> None:
        """Go on."""


class Distribution(Frozen):
    """Hold the seconds of every timed run, in the order they were taken: rounds of `round_size` runs.

    `items` is how many samples (or tokens) one run handles; throughput counts these per second.
    """

    samples: tuple[float, ...]
    round_size: int
    items: int = 1

    model_config = ConfigDict(extra="ignore")  # the figures below are written to JSON too, and computed anew on reading

    @property
    def rounds(self) -> Floats:
        """Return the seconds as [rounds, round_size]."""
        return np.array(self.samples).reshape(-1, self.round_size)

    def of(self, statistic: Statistic) -> float:
        """Return one statistic in seconds."""
        return float(STATISTICS[_known(statistic)](np.array(self.samples)))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def n(self) -> int:
        """Return the number of timed runs."""
        return len(self.samples)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p50(self) -> float:
        """Return the median, in seconds."""
        return self.of("p50")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p95(self) -> float:
        """Return the 95th percentile, in seconds."""
        return self.of("p95")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def p99(self) -> float:
        """Return the 99th percentile, in seconds."""
        return self.of("p99")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean(self) -> float:
        """Return the mean, in seconds."""
        return self.of("mean")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def min(self) -> float:
        """Return the fastest run, in seconds."""
        return self.of("min")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def throughput(self) -> float:
        """Return items per second, one run after the other."""
        return self.items / self.mean

    def interval(self, statistic: Statistic = "p50", *, confidence: float = 0.95, seed: int = 0) -> Interval:
        """Estimate a statistic with its bounds, in seconds, by a bootstrap over rounds."""
        rounds, of = self.rounds, STATISTICS[_known(statistic)]
        return _over_rounds(len(rounds), self.round_size, lambda picks: of(_pooled(rounds, picks)), confidence, seed)

    def measurement(self, statistic: Statistic = "p50", *, confidence: float = 0.95) -> Measurement:
        """Return a statistic as a measurement; its `n` counts rounds, the unit that was resampled."""
        return Measurement.from_interval(
            self.interval(statistic, confidence=confidence), unit="s", higher_is_better=False
        )


class LatencyPair(Frozen):
    """Hold two distributions taken in turns (`b` is None when one artifact was timed alone) and the ratio a / b.

    `a` is the candidate and `b` the original; `ratio` is of the statistic that was asked for, `ratio_of` gives others.
    """

    a: Distribution
    b: Distribution | None = None
    ratio: Interval | None = None

    def ratio_of(self, statistic: Statistic = "p50", *, confidence: float = 0.95, seed: int = 0) -> Interval:
        """Estimate the ratio a / b of a statistic. Raises MeasureError when one artifact was timed alone."""
        if self.b is None:
            raise MeasureError("one artifact was timed alone: there is no ratio", "time it in turns with another")
        return ratio_interval(self.a, self.b, statistic, confidence=confidence, seed=seed)


def time_in_turns(
    a: Timed,
    b: Timed | None,
    inputs_a: Arrays,
    inputs_b: Arrays | None,
    *,
    budget_seconds: float = 8.0,
    round_seconds: float = 0.2,
    min_rounds: int = 6,
    max_rounds: int = 60,
    items: int = 1,
    statistic: Statistic = "p50",
    confidence: float = 0.95,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> LatencyPair:
    """Time two artifacts in alternating rounds, or one alone (`b` None), each warmed up first and the idle one paused.

    A round lasts about `round_seconds` a side. Rounds go on until `budget_seconds` are spent (warm-up included), but at
    least `min_rounds` and at most `max_rounds` are taken. Raises MeasureError when an artifact fails.
    Example: `time_in_turns(candidate, original, inputs, inputs).ratio.high <= 0.40`.
    """
    _known(statistic)
    if min_rounds < 2 or max_rounds < min_rounds:
        raise ValueError(f"rounds must be at least 2 and ordered, not {min_rounds} to {max_rounds}")
    end = clock() + budget_seconds
    sides = [(a, inputs_a)]
    if b is not None:
        sides.append((b, inputs_a if inputs_b is None else inputs_b))
        b.pause()
    sizes = []
    for side, inputs in sides:
        with _awake(side):
            sizes.append(_warm_up(side, inputs, round_seconds))
    taken: list[list[float]] = [[] for _ in sides]
    num_rounds = 0
    while num_rounds < min_rounds or (num_rounds < max_rounds and clock() < end):
        turns = list(zip(sides, sizes, taken, strict=True))
        for (side, inputs), size, seconds in turns if num_rounds % 2 == 0 else reversed(turns):
            with _awake(side):
                seconds.extend(side.time(inputs, size))
        num_rounds += 1
    for side, _ in sides:
        side.resume()
    first, *others = (
        Distribution(samples=tuple(seconds), round_size=size, items=items)
        for seconds, size in zip(taken, sizes, strict=True)
    )
    if not others:
        return LatencyPair(a=first)
    ratio = ratio_interval(first, others[0], statistic, confidence=confidence, seed=seed)
    return LatencyPair(a=first, b=others[0], ratio=ratio)


def ratio_interval(
    a: Distribution, b: Distribution, statistic: Statistic = "p50", *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate the ratio a / b of a statistic of two distributions that were taken in turns; `n` counts rounds.

    Raises MeasureError when the two do not have the same number of rounds.
    """
    rounds_a, rounds_b, of = a.rounds, b.rounds, STATISTICS[_known(statistic)]
    n = len(rounds_a)
    if n != len(rounds_b):
        raise MeasureError(f"{n} rounds cannot be compared with {len(rounds_b)}", "time both with one time_in_turns")
    if statistic == "p50":
        ratios = of(rounds_a) / of(rounds_b)
        return _over_rounds(n, 1, lambda picks: np.median(ratios[picks], axis=-1), confidence, seed)
    width = a.round_size + b.round_size

    def pooled_ratio(picks: NDArray[np.int64]) -> Any:
        return of(_pooled(rounds_a, picks)) / of(_pooled(rounds_b, picks))

    return _over_rounds(n, width, pooled_ratio, confidence, seed)


def _known(statistic: str) -> str:
    if statistic not in STATISTICS:
        raise MeasureError(f"unknown latency statistic {statistic!r}", f"known are {', '.join(STATISTICS)}")
    return statistic


@contextmanager
def _awake(side: Timed) -> Iterator[None]:
    side.resume()
    try:
        yield
    finally:
        side.pause()


def _warm_up(side: Timed, inputs: Arrays, round_seconds: float) -> int:
    """Run for at least half a round's time, and return how many runs make a round."""
    spent, seconds = 0.0, side.time(inputs, 2)
    while (spent := spent + sum(seconds)) < round_seconds / 2:
        seconds = side.time(inputs, min(2 * len(seconds), MAX_RUNS_A_ROUND))
    typical = max(float(np.median(seconds)), 1e-7)
    return int(np.clip(round(round_seconds / typical), 1, MAX_RUNS_A_ROUND))


def _pooled(rounds: Floats, picks: NDArray[np.int64]) -> Floats:
    """Return the runs of the picked rounds, side by side: [..., n] picks of [n, k] give [..., n k]."""
    return rounds[picks].reshape(*picks.shape[:-1], -1)


def _over_rounds(
    n: int, width: int, figure: Callable[[NDArray[np.int64]], Any], confidence: float, seed: int
) -> Interval:
    """Bootstrap a figure of picked rounds [..., n]; `width` is how many seconds a pick brings along."""
    value = float(figure(np.arange(n)))
    if n < 2:
        return Interval(value=value, low=0.0, high=float("inf"), n=n, confidence=confidence)
    bounds = stats.bootstrap(
        (np.arange(n),),
        lambda picks, axis=-1: figure(picks),
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, ELEMENTS_AT_ONCE // (n * width)),
        confidence_level=2 * confidence - 1,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = min(value, float(bounds.low)), max(value, float(bounds.high))
    return Interval(value=value, low=low, high=high, n=n, confidence=confidence)
