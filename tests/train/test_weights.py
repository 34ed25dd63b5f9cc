"""Which weights move: all but frozen layers', and the zeros of sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gossamer.run.progress import Silent
from gossamer.train.lesson import Lesson, Plan
from gossamer.train.loop import train
from gossamer.train.weights import nonzeros


@pytest.mark.parametrize(("zeros", "stay"), [(0, False), (1, False), (19, False), (20, True), (500, True)])
def test_a_weight_is_sparse_from_a_fiftieth_of_zeros_on(zeros: int, stay: bool) -> None:
    values = torch.ones(10, 100)
    values.flatten()[:zeros] = 0
    found = nonzeros(values)
    assert (found is not None) == stay
    assert found is None or int(found.count_nonzero()) == 1000 - zeros


def test_zeros_of_sparse_weights_stay_and_others_move(
    make_lesson: Callable[[], Lesson], plan: Plan, tmp_path: Path
) -> None:
    lesson = make_lesson()
    sparse, whole = (lesson.student.get_parameter(f"bert.encoder.layer.{i}.output.dense.weight") for i in (0, 1))
    with torch.no_grad():
        sparse[:, ::2] = 0
        whole[0, 0] = 0
    outcome = train(lesson, replace(plan, epochs=1), tmp_path / "run", Silent(), label="test")
    assert outcome.better
    assert int((sparse == 0).sum()) == sparse.numel() // 2
    assert int((whole == 0).sum()) == 0
