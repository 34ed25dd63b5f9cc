"""When a training is called diverged: one hard row does not do it, a loss that stays ten times as high does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from transformers import TrainerControl, TrainerState

from gossamer.run.progress import Silent
from gossamer.train.watch import Watch


def stopped_at(losses: Sequence[float], held_back: float) -> int | None:
    """Return the step behind which a training with these losses ends."""
    watch, control = Watch(Silent(), "test"), TrainerControl()
    watch.usual = held_back
    for step, loss in enumerate(losses, start=1):
        watch.on_log(None, TrainerState(global_step=step), control, logs={"loss": loss})
        if control.should_training_stop:
            assert watch.diverged
            return step
    return None


@pytest.mark.parametrize(
    ("losses", "held_back", "step"),
    [
        ([0.009] * 6 + [0.234] + [0.009] * 20, 0.036, None),  # seen on MiniLM: a row that the original has not learned
        ([0.01] * 12 + [0.9] * 20, 0.036, 16),
        ([0.5, 0.4, math.nan], 0.5, 3),
        ([1e-9] * 5 + [5e-9] * 30, 0.0, None),
        ([0.1, 0.2, 0.4, 0.8] + [2.0**n for n in range(20)], 0.1, 11),
    ],
)
def test_what_ends_a_training(losses: list[float], held_back: float, step: int | None) -> None:
    assert stopped_at(losses, held_back) == step
