from __future__ import annotations

import random
from collections.abc import Callable
from math import exp, inf, sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from gossamer.errors import MeasureError
from gossamer.measure.statistics import needed_samples, paired_quality, score_interval
from gossamer.tasks.base import Metric, Scores

ACCURACY = Metric("accuracy", "", True, lambda mean: mean, lambda candidate, original: candidate / original)
PERPLEXITY = Metric(
    "perplexity", "", False, lambda mean: np.exp(-mean), lambda candidate, original: np.exp(candidate - original)
)
DIFFERENCE = Metric("difference", "", True, lambda mean: mean, lambda candidate, original: candidate - original)


def right(*answers: int | float) -> Scores:
    return Scores(np.array(answers, dtype=np.float64), np.ones(len(answers)))


def discordant(n: int, *, lost: int, gained: int, wrong: int) -> tuple[Scores, Scores]:
    """Return (candidate, original): the original has `wrong` wrong, of which the candidate gains `gained`."""
    original = np.ones(n)
    original[:wrong] = 0
    candidate = original.copy()
    candidate[:gained] = 1
    candidate[n - lost :] = 0
    return Scores(candidate, np.ones(n)), Scores(original, np.ones(n))


def documents(n: int, seed: int, loss: float = 0.02) -> tuple[Scores, Scores]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 200, n).astype(np.float64)
    original = rng.normal(-3.0, 0.5, n)
    candidate = original - loss + rng.normal(0, 0.05, n)
    return Scores(candidate * tokens, tokens), Scores(original * tokens, tokens)


def test_agrees_with_a_bootstrap_written_as_a_loop() -> None:
    candidate, original = documents(60, 1)
    found = paired_quality(candidate, original, PERPLEXITY)
    rng, drawn = random.Random(2), []
    for _ in range(3000):
        picks = [rng.randrange(60) for _ in range(60)]
        means = [
            sum(scores.sums[i] for i in picks) / sum(scores.weights[i] for i in picks)
            for scores in (candidate, original)
        ]
        drawn.append(exp(means[0] - means[1]))
    drawn.sort()
    width = found.high - found.low
    assert found.value == pytest.approx(exp(candidate.mean() - original.mean()))
    assert abs(found.low - drawn[150]) < 0.1 * width
    assert abs(found.high - drawn[2850]) < 0.1 * width


def test_a_mean_difference_has_the_width_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    original, change = rng.normal(5, 2, 400), rng.normal(0.1, 1, 400)
    found = paired_quality(right(*(original + change)), right(*original), DIFFERENCE)
    expected = 1.645 * change.std(ddof=1) / sqrt(400)  # pairing removes the spread of 2
    assert found.value - found.low == pytest.approx(expected, rel=0.08)
    assert found.high - found.value == pytest.approx(expected, rel=0.08)


def test_weights_count() -> None:
    candidate = Scores(np.array([1.0, 90.0, 50.0]), np.array([1.0, 100.0, 50.0]))
    original = Scores(np.array([1.0, 100.0, 50.0]), np.array([1.0, 100.0, 50.0]))
    assert paired_quality(candidate, original, ACCURACY).value == pytest.approx(141 / 151)


def test_the_same_input_gives_the_same_interval() -> None:
    candidate, original = documents(50, 3)
    first = paired_quality(candidate, original, PERPLEXITY, resamples=500)
    assert first == paired_quality(candidate, original, PERPLEXITY, resamples=500)
    assert first != paired_quality(candidate, original, PERPLEXITY, resamples=500, seed=1)


@pytest.mark.parametrize("n", [30, 300])
def test_no_discordant_pair_leaves_the_rule_of_three(n: int) -> None:
    candidate, original = discordant(n, lost=0, gained=0, wrong=n // 10)
    found = paired_quality(candidate, original, ACCURACY, resamples=200)
    loss = 1 - 0.05 ** (1 / n)
    assert found.value == 1.0
    assert found.low == pytest.approx(1 - loss / 0.9)
    assert loss == pytest.approx(3 / n, rel=0.06)
    assert found.high > 1.0


@pytest.mark.parametrize("lost", [1, 2, 5])
def test_few_lost_samples_give_at_least_the_exact_binomial_bound(lost: int) -> None:
    candidate, original = discordant(200, lost=lost, gained=0, wrong=0)
    found = paired_quality(candidate, original, ACCURACY, resamples=500)
    exact = binomtest(lost, 200).proportion_ci(0.90, method="exact")
    assert found.low <= 1 - exact.high + 1e-12
    assert found.low > 1 - 1.2 * exact.high
    assert found.high >= 1 - exact.low - 1e-12 or found.high >= found.value


def test_equal_scores_on_a_scale_do_not_claim_certainty() -> None:
    _, original = documents(40, 5)
    found = paired_quality(original, original, PERPLEXITY, resamples=200)
    assert found.value == 1.0
    assert 0.9 < found.low < 1.0 < found.high < 1.1


@pytest.mark.parametrize("bad", [np.nan, -inf])
def test_a_collapsed_candidate_keeps_nothing(bad: float) -> None:
    candidate, original = documents(40, 6)
    candidate.sums[3] = bad
    found = paired_quality(candidate, original, PERPLEXITY)
    assert (found.low, found.value, found.high) == (0.0, 0.0, 0.0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MeasureError, match="3 samples of the candidate cannot be paired with the original's 2"):
        paired_quality(right(1, 1, 0), right(1, 0), ACCURACY)
    with pytest.raises(MeasureError, match="at least 2 samples, not 1"):
        paired_quality(right(1), right(1), ACCURACY)
    with pytest.raises(MeasureError, match="mean over 3 samples is 0"):
        paired_quality(right(1, 1, 0), right(0, 0, 0), ACCURACY)
    with pytest.raises(MeasureError, match="not a number for 1 of 3"):
        paired_quality(right(1, 1, 0), right(0, np.nan, 0), ACCURACY)
    with pytest.raises(MeasureError, match="no weight"):
        score_interval(Scores(np.zeros(3), np.zeros(3)))


def test_a_resample_without_a_figure_widens() -> None:
    found = paired_quality(right(1, 0, 1), right(1, 0, 0), ACCURACY, resamples=500)  # 8/27 of draws never see the 1
    assert found.low == -inf
    assert found.high == inf


def right_answers(rng: np.random.Generator) -> tuple[Scores, Scores, float]:
    kinds = rng.choice(4, size=200, p=[0.92, 0.04, 0.01, 0.03])  # both, lost, gained, neither
    return right(*np.isin(kinds, (0, 2))), right(*np.isin(kinds, (0, 1))), 0.93 / 0.96


def few_discordant(rng: np.random.Generator) -> tuple[Scores, Scores, float]:
    kinds = rng.choice(4, size=150, p=[0.95, 0.01, 0.005, 0.035])
    return right(*np.isin(kinds, (0, 2))), right(*np.isin(kinds, (0, 1))), 0.955 / 0.96


def log_likelihoods(rng: np.random.Generator) -> tuple[Scores, Scores, float]:
    candidate, original = documents(80, int(rng.integers(2**31)))
    return candidate, original, exp(-0.02)


@pytest.mark.parametrize(
    ("draw", "metric", "at_most"),
    [(right_answers, ACCURACY, 199), (few_discordant, ACCURACY, 200), (log_likelihoods, PERPLEXITY, 199)],
)
def test_each_bound_covers_the_truth_about_95_times_in_100(
    draw: Callable[[np.random.Generator], tuple[Scores, Scores, float]], metric: Metric, at_most: int
) -> None:
    rng, below, above = np.random.default_rng(11), 0, 0
    for _ in range(200):
        candidate, original, truth = draw(rng)
        found = paired_quality(candidate, original, metric, resamples=300)
        below += found.low <= truth
        above += found.high >= truth
    assert 180 <= below <= at_most  # 190 expected, standard deviation 3; exact binomial bounds are conservative
    assert 180 <= above <= at_most


def test_accuracy_gets_wilsons_interval() -> None:
    found = score_interval(right(*([1] * 95 + [0] * 5)))
    z, n, p = 1.6448536, 100, 0.95
    centre, half = (p + z**2 / (2 * n)), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found.low == pytest.approx((centre - half) / (1 + z**2 / n))
    assert found.high == pytest.approx((centre + half) / (1 + z**2 / n))
    assert score_interval(right(*([1] * 50))).low < 1.0


def test_perplexity_is_resampled_over_documents() -> None:
    scores, _ = documents(100, 8)
    found = score_interval(scores, PERPLEXITY.figure)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(exp(-scores.mean()))
    means: NDArray[np.float64] = scores.sums / scores.weights
    rough = found.value * 1.645 * means.std() * sqrt((scores.weights**2).sum()) / scores.weights.sum()
    assert found.high - found.low == pytest.approx(2 * rough, rel=0.25)


def test_an_infinite_perplexity_has_no_bounds() -> None:
    found = score_interval(Scores(np.array([-inf, -1.0]), np.ones(2)), PERPLEXITY.figure)
    assert (found.value, found.low, found.high) == (inf, -inf, inf)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 2)])
def test_as_many_samples_as_needed_decide(lost: int, gained: int) -> None:
    n, bound = 200, 0.995 if lost + gained == 0 else 0.985
    candidate, original = discordant(n, lost=lost, gained=gained, wrong=10)
    assert paired_quality(candidate, original, ACCURACY, resamples=500).low < bound
    more = needed_samples(candidate, original, ACCURACY, bound)
    assert more is not None
    assert more > 0
    factor = -(-(n + more) // n)
    grown = discordant(n * factor, lost=lost * factor, gained=gained * factor, wrong=10 * factor)
    assert paired_quality(*grown, ACCURACY, resamples=500).low >= bound


def test_needed_samples_follow_the_paired_variance() -> None:
    candidate, original = documents(50, 9)
    value = paired_quality(candidate, original, PERPLEXITY, resamples=100).value
    near, far = (needed_samples(candidate, original, PERPLEXITY, value - gap) for gap in (0.001, 0.002))
    assert near is not None
    assert far is not None
    assert (near + 50) / (far + 50) == pytest.approx(4, rel=0.02)


def test_no_number_of_samples_helps_on_the_wrong_side() -> None:
    candidate, original = discordant(200, lost=10, gained=0, wrong=0)
    assert needed_samples(candidate, original, ACCURACY, 0.96) is None
    assert needed_samples(candidate, original, ACCURACY, 0.95) is None
    assert needed_samples(candidate, original, ACCURACY, 0.96, op="<=") is not None
