"""Intervals for quality: how sure can we be of a score, and of the share of it that a smaller model keeps?

Two models are scored on the *same* samples, so their scores move together: a hard sample is hard for both. The figure
of interest, the share of quality kept

    q = quality(mean of candidate, mean of original),      mean = sum of sums / sum of weights,

is therefore resampled in pairs: a bootstrap draw takes sample i of both models, sums and weights alike (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, ch. 8 and 10.4). `scipy.stats.bootstrap(paired=True)` draws.

**Which bounds.** Each bound is one-sided at `confidence` (see `gossamer.measure.types`): non-inferiority at 95 % is a
statement about the lower bound alone, so [low, high] read as two-sided is a 90 % interval.

**Which bootstrap.** BCa (bias-corrected and accelerated; Efron 1987, JASA 82) corrects for skew, which few lost samples
among many kept give. It needs more than one distinct value, both among the resampled figures and among the
leave-one-out figures; where that fails (all samples alike), or beyond 5,000 samples, where the correction (of order
1/n) is invisible and its n leave-one-out figures are slow, the percentile bootstrap is used. A resample that has no
figure (all its weights zero, 0 / 0) counts as the worst case on either side, so that it can widen and never narrow.

**Few discordant pairs.** With right/wrong scores only the *discordant* samples tell the models apart: L samples lost
(the original right, the candidate wrong) and G gained. With L = G = 0 every resample is the same and the bootstrap
claims to know everything. But 0 losses in n samples only show a loss rate below 1 - (1 - confidence)^(1/n), about 3/n:
the rule of three, which is the exact binomial (Clopper-Pearson) bound at 0. So the interval is widened to contain the
figures at

    mean_original + G/n - upper(L, n)    and    mean_original + upper(G, n) - L/n,     upper = Clopper-Pearson.

With many discordant samples this lies inside the bootstrap's own interval and changes nothing. For scores on a
continuous scale the same thought holds when no sample at all differs: at most a share upper(0, n) of samples would
differ, and we let those differ by one standard deviation of the original's scores. That magnitude is a convention, not
a theorem.

Invariants: the value lies within the bounds; the same input gives the same interval; two models with equal scores do
not get an interval of width zero. Left out: clustered samples (several rows of one author) are treated as independent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gossamer.errors import MeasureError
from gossamer.measure.types import Interval, Op

if TYPE_CHECKING:
    from gossamer.tasks.base import Metric, Scores

Floats = NDArray[np.float64]
LARGE = 5_000  # samples; beyond, the correction is invisible and its n leave-one-out figures of n cost seconds
ELEMENTS_AT_ONCE = 2_000_000  # 16 MB an array while resampling, whatever the number of samples


def paired_quality(
    candidate: Scores,
    original: Scores,
    metric: Metric,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Estimate the share of quality that a candidate keeps, by paired bootstrap over samples.

    `candidate` and `original` hold sums [N] and weights [N] of the same N samples in the same order. A candidate with a
    score that is not a finite number has collapsed: it keeps 0, exactly. Raises MeasureError when the two do not
    match, when N < 2, or when the original has no score to keep a share of.
    Example: `paired_quality(evaluation.scores, reference.scores, task.metric).low >= 0.99`.
    """
    n = _check_pair(candidate, original)
    value = _quality(metric, candidate.mean(), original.mean())
    if not np.isfinite(candidate.sums).all():
        return Interval(value=0.0, low=0.0, high=0.0, n=n, confidence=confidence)
    if not np.isfinite(value):
        raise MeasureError(
            f"quality is a share of the original's {metric.name}, whose mean over {n} samples is {original.mean():g}",
            "the original does nothing right on these samples: check that labels and model belong together",
        )

    def figure(c: Floats, cw: Floats, o: Floats, ow: Floats, axis: int = -1) -> Any:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            candidate_mean, original_mean = c.sum(axis) / cw.sum(axis), o.sum(axis) / ow.sum(axis)
            return np.asarray(metric.quality(candidate_mean, original_mean), dtype=np.float64)

    data = (candidate.sums, candidate.weights, original.sums, original.weights)
    low, high = _bootstrap_bounds(data, figure, confidence, resamples, seed)
    widened = [_quality(metric, mean, original.mean()) for mean in _worst_means(candidate, original, confidence)]
    return _interval(value, [low, high, *widened], n, confidence)


def score_interval(
    scores: Scores,
    figure: Callable[[Any], Any] = lambda mean: mean,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Estimate a figure of one model's scores: accuracy, perplexity, mean divergence.

    Right/wrong scores get Wilson's interval (Wilson 1927), all others a bootstrap over samples (documents). `figure`
    turns the weighted mean into what people read, such as `task.metric.figure`. Raises MeasureError for fewer than
    2 samples, or when no sample has weight. A figure that is not finite gets an interval without bounds.
    """
    n = len(scores.sums)
    _check_scores(scores, "scores")
    value = float(figure(scores.mean()))
    if not np.isfinite(value):
        value = value if np.isinf(value) else float("inf")  # NaN: nothing is known
        return Interval(value=value, low=float("-inf"), high=float("inf"), n=n, confidence=confidence)
    if _right_or_wrong(scores):
        test = stats.binomtest(int(scores.sums.sum()), n)
        bounds = test.proportion_ci(confidence_level=2 * confidence - 1, method="wilson")
        return _interval(value, [float(figure(bounds.low)), float(figure(bounds.high))], n, confidence)

    def of_samples(sums: Floats, weights: Floats, axis: int = -1) -> Any:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray(figure(sums.sum(axis) / weights.sum(axis)), dtype=np.float64)

    bounds = _bootstrap_bounds((scores.sums, scores.weights), of_samples, confidence, resamples, seed)
    return _interval(value, list(bounds), n, confidence)


def needed_samples(
    candidate: Scores,
    original: Scores,
    metric: Metric,
    bound: float,
    *,
    op: Op = ">=",
    confidence: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Estimate how many more samples would let the verdict `quality op bound` be PASS, if they are like those seen.

    The quality is linearised: its per-sample influence has standard deviation s, and n samples decide with
    probability `power` when (z_confidence + z_power) s / sqrt(n) <= distance to the bound; for right/wrong scores the
    exact binomial bound of the projected losses must clear the bound too. None when the point estimate lies on the
    wrong side of the bound, or exactly on it: then more samples are not expected to help.
    """
    n = _check_pair(candidate, original)
    value = _quality(metric, candidate.mean(), original.mean())
    gap = value - bound if op == ">=" else bound - value
    if not np.isfinite(gap) or gap <= 0:
        return None
    spread = float(stats.norm.ppf(confidence) + stats.norm.ppf(power)) * _influence_std(candidate, original, metric)
    if _exact_gap(candidate, original, metric, op, bound, confidence, n) is None:
        # not right/wrong: when nothing differs at all, the convention of the lecture shrinks with 1/n
        worst = [
            abs(_quality(metric, m, original.mean()) - value) for m in _worst_means(candidate, original, confidence)
        ]
        return max(1, ceil(max((spread / gap) ** 2, n * max(worst, default=0.0) / gap)) - n)

    def clears(total: int) -> bool:
        exact = _exact_gap(candidate, original, metric, op, bound, confidence, total)
        return exact is not None and exact >= 0

    below = total = max(n, ceil((spread / gap) ** 2) - 1)
    while not clears(total):
        below, total = total, 2 * total
        if total > 10**9:
            return None
    while total - below > 1:  # the exact gap grows with the number of samples
        middle = (below + total) // 2
        below, total = (below, middle) if clears(middle) else (middle, total)
    return max(1, total - n)


def _quality(metric: Metric, candidate_mean: float, original_mean: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return float(metric.quality(np.float64(candidate_mean), np.float64(original_mean)))


def _check_scores(scores: Scores, name: str) -> None:
    if scores.sums.shape != scores.weights.shape or scores.sums.ndim != 1:
        raise MeasureError(
            f"{name}: {scores.sums.shape} sums beside {scores.weights.shape} weights", "both must be [N]"
        )
    if len(scores.sums) < 2:
        raise MeasureError(
            f"{name}: an interval needs at least 2 samples, not {len(scores.sums)}", "give more evaluation rows"
        )
    if not scores.weights.sum() > 0:
        raise MeasureError(f"{name}: the {len(scores.sums)} samples have no weight", "are all rows empty?")


def _check_pair(candidate: Scores, original: Scores) -> int:
    _check_scores(candidate, "candidate")
    _check_scores(original, "original")
    if len(candidate.sums) != len(original.sums):
        raise MeasureError(
            f"{len(candidate.sums)} samples of the candidate cannot be paired with the original's {len(original.sums)}",
            "score both on the same rows",
        )
    if not np.isfinite(original.sums).all():
        bad = int((~np.isfinite(original.sums)).sum())
        raise MeasureError(
            f"the original's score is not a number for {bad} of {len(original.sums)} samples",
            "the original model is damaged, or its labels are: nothing can be compared with it",
        )
    return len(original.sums)


def _bootstrap_bounds(
    data: tuple[Floats, ...], statistic: Callable[..., Any], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Return the two one-sided bounds: BCa where it is defined, else percentile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # resamples without a figure: looked at below
        drawn = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, ELEMENTS_AT_ONCE // len(data[0])),
            confidence_level=2 * confidence - 1,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    figures = drawn.bootstrap_distribution
    if len(data[0]) <= LARGE and np.isfinite(figures).all() and np.ptp(figures) > 0:
        corrected = _bca(data, statistic, drawn, confidence)
        if np.isfinite(corrected).all():
            return corrected
    low = np.quantile(np.where(np.isnan(figures), -np.inf, figures), 1 - confidence, method="lower")
    high = np.quantile(np.where(np.isnan(figures), np.inf, figures), confidence, method="higher")
    return float(low), float(high)


def _bca(data: tuple[Floats, ...], statistic: Callable[..., Any], drawn: Any, confidence: float) -> tuple[float, float]:
    """Correct an existing bootstrap distribution; NaN where all leave-one-out figures are alike."""
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # reported as NaN, which the caller handles
        interval = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=0,
            bootstrap_result=drawn,
            batch=max(1, ELEMENTS_AT_ONCE // len(data[0])),
            confidence_level=2 * confidence - 1,
            method="BCa",
        ).confidence_interval
    return float(interval.low), float(interval.high)


def _right_or_wrong(scores: Scores) -> bool:
    return bool(np.isin(scores.sums, (0.0, 1.0)).all() and (scores.weights == 1.0).all())


def _upper(count: float, n: float, confidence: float) -> float:
    """Return the exact one-sided upper bound of a rate after `count` of `n` (Clopper & Pearson 1934)."""
    return 1.0 if count >= n else float(stats.beta.ppf(confidence, count + 1, n - count))


def _worst_means(candidate: Scores, original: Scores, confidence: float) -> list[float]:
    """Return the candidate's mean at the exact bounds of the lecture: one below, one above; or none."""
    n, mean = len(original.sums), original.mean()
    if _right_or_wrong(candidate) and _right_or_wrong(original):
        lost = int(((original.sums == 1) & (candidate.sums == 0)).sum())
        gained = int(((original.sums == 0) & (candidate.sums == 1)).sum())
        below = mean + gained / n - _upper(lost, n, confidence)
        above = mean + _upper(gained, n, confidence) - lost / n
        return [max(below, 0.0), min(above, 1.0)]
    if np.array_equal(candidate.sums, original.sums):
        weighty = original.weights > 0
        spread = float(np.std(original.sums[weighty] / original.weights[weighty]))
        shift = _upper(0, n, confidence) * spread
        return [mean - shift, mean + shift]
    return []


def _influence_std(candidate: Scores, original: Scores, metric: Metric) -> float:
    """Return the standard deviation of one sample's influence on the quality (delta method, finite difference)."""
    c, o = candidate.mean(), original.mean()
    step_c, step_o = (1e-6 * max(abs(mean), 1e-3) for mean in (c, o))
    by_c = (metric.quality(c + step_c, o) - metric.quality(c - step_c, o)) / (2 * step_c)
    by_o = (metric.quality(c, o + step_o) - metric.quality(c, o - step_o)) / (2 * step_o)
    influence = by_c * (candidate.sums - c * candidate.weights) / candidate.weights.mean()
    influence += by_o * (original.sums - o * original.weights) / original.weights.mean()
    return float(np.std(influence, ddof=1))


def _exact_gap(
    candidate: Scores, original: Scores, metric: Metric, op: Op, bound: float, confidence: float, total: int
) -> float | None:
    """Return by how much the exact bound clears `bound` with `total` samples like these; None if not right/wrong."""
    if not (_right_or_wrong(candidate) and _right_or_wrong(original)):
        return None
    n, mean = len(original.sums), original.mean()
    lost = float(((original.sums == 1) & (candidate.sums == 0)).sum()) * total / n
    gained = float(((original.sums == 0) & (candidate.sums == 1)).sum()) * total / n
    below = mean + gained / total - _upper(lost, total, confidence)
    above = mean + _upper(gained, total, confidence) - lost / total
    figures = [_quality(metric, max(below, 0.0), mean), _quality(metric, min(above, 1.0), mean)]
    return min(figures) - bound if op == ">=" else bound - max(figures)


def _interval(value: float, bounds: list[float], n: int, confidence: float) -> Interval:
    return Interval(value=value, low=min(value, *bounds), high=max(value, *bounds), n=n, confidence=confidence)
