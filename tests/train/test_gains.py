"""A gain counts where it is one for certain, by the rows in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.run.progress import Silent
from gossamer.train import loop
from gossamer.train.gains import Judged, Patience
from gossamer.train.lesson import Lesson, Plan
from gossamer.train.loop import train
from gossamer.train.rows import collate


def judged(values: object) -> Judged:
    rows = tuple(np.asarray(values, dtype=float).tolist())
    return Judged(float(np.mean(rows)), rows)


HARD = np.random.default_rng(0).exponential(1.0, 64)  # rows differ far more than a training changes them
NOISE = np.random.default_rng(1).normal(0.0, 0.02, 64)


def test_a_small_gain_of_all_rows_is_seen_through_what_rows_differ_by() -> None:
    assert judged(HARD - 0.01).gained_on(judged(HARD))
    assert not judged(HARD + 0.01).gained_on(judged(HARD))
    assert not judged(HARD).gained_on(judged(HARD))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_lower_mean_that_may_be_luck_is_no_gain(sign: int) -> None:
    changed = judged(HARD + sign * (NOISE - NOISE.mean()) - 1e-4)
    assert changed.loss < judged(HARD).loss
    assert not changed.gained_on(judged(HARD))


def test_other_rows_are_compared_by_their_means_and_no_number_gains_nothing() -> None:
    assert judged([0.5, 0.7]).gained_on(judged([0.7, 0.8, 0.9]))
    assert not judged([0.5]).gained_on(judged([0.4]))
    assert not Judged(math.nan, (math.nan, 1.0)).gained_on(judged([2.0, 2.0]))


def test_looks_in_vain_are_counted_from_the_last_gain(tmp_path: Path) -> None:
    patience = Patience(2)
    assert not patience.is_over(judged(HARD))
    assert not patience.is_over(judged(HARD + NOISE - NOISE.mean()))
    assert not patience.is_over(judged(HARD - 0.05))
    assert not patience.is_over(judged(HARD - 0.05))
    patience.write(tmp_path)
    again = Patience(2)
    again.read(tmp_path)
    assert again == patience
    assert again.is_over(judged(HARD))
    again.read(tmp_path / "nothing")
    assert again.without == 2


def test_slow_progress_is_measured_from_the_last_gain_and_not_from_the_last_look() -> None:
    patience, drift = Patience(4), np.random.default_rng(2).normal(0.0, 0.1, (40, 64))
    assert not any(patience.is_over(judged(HARD - 0.01 * look + drift[look])) for look in range(40))


@pytest.mark.parametrize(("epochs", "steps"), [(2, 10), (8, 22)])
def test_half_of_a_long_schedule_may_pass_without_a_gain(
    make_lesson: Callable[[], Lesson], plan: Plan, tmp_path: Path, epochs: int, steps: int
) -> None:
    """Five steps an epoch, a look behind every second one; the first look is what the others have to gain on."""
    plan = replace(plan, epochs=epochs, rate=1e-12)
    outcome = train(make_lesson(), plan, tmp_path / "run", Silent(), label="test")
    assert (outcome.steps, outcome.better) == (steps, False)


def test_rows_are_judged_together_and_told_one_by_one(make_lesson: Callable[[], Lesson], plan: Plan) -> None:
    lesson = make_lesson()
    with lesson.ready(), torch.no_grad():
        alone = [float(lesson.loss(collate([row]))) for row in lesson.judged]
    for at_once in (1, 4):
        found = loop.judged(lesson, replace(plan, micro_batch=at_once))
        assert found.rows == pytest.approx(alone, rel=1e-4)
        assert found.loss == pytest.approx(np.mean(alone), rel=1e-4)
