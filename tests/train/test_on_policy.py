"""Rows that a student writes itself: how they begin, where they end, that they are drawn the same again."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.errors import TechniqueError
from gossamer.tasks.base import Batch
from gossamer.train.on_policy import OnPolicy, check_writes

TINY = runpy.run_path(str(Path(__file__).parents[1] / "techniques" / "tiny_candidates.py"))


def rows(*lengths: int) -> list[Batch]:
    draw = np.random.default_rng(0)
    return [
        Batch({"input_ids": draw.integers(3, 64, (1, length)), "attention_mask": np.ones((1, length), np.int64)},
              np.array([index]))
        for index, length in enumerate(lengths)
    ]  # fmt: skip


def written(writes: OnPolicy, given: list[Batch], draw: int = 0) -> list[Any]:
    return [row.inputs["input_ids"] for row in writes.written(TINY["llama"](), given, draw)]


def test_rows_begin_as_the_data_s_and_go_on_as_the_student_writes() -> None:
    given, writes = rows(10, 14), OnPolicy(1.0, 6)
    found = written(writes, given)
    for row, ids in zip(given, found, strict=True):
        prompt = row.inputs["input_ids"][:, : row.inputs["input_ids"].shape[1] // 2][:, -5:]
        assert np.array_equal(ids[:, :5], prompt)
        assert ids.dtype == np.int64
        assert ids.shape[1] <= 11


def test_what_is_drawn_is_drawn_again() -> None:
    writes = OnPolicy(1.0, 6)
    first, again, other = (written(writes, rows(10, 14), draw) for draw in (7, 7, 8))
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(first, other, strict=True))


def test_a_row_ends_behind_the_token_that_ends_a_text() -> None:
    student = TINY["llama"]()
    student.generation_config.eos_token_id = [5, 9]
    with torch.no_grad():  # the end is likelier than anything else
        student.lm_head.weight[5] = student.model.norm.weight * 50
    found = OnPolicy(1.0, 12).written(student, rows(8, 8, 8, 8), 1)
    for row in found:
        ids = row.inputs["input_ids"][0, 4:]
        assert row.inputs["attention_mask"].shape == row.inputs["input_ids"].shape
        assert not np.isin(ids[:-1], [5, 9]).any()
        assert len(ids) == 12 or ids[-1] in (5, 9)


def test_about_the_share_of_the_steps_is_written() -> None:
    writes = OnPolicy(0.25, 4, seed=3)
    assert 0.2 < sum(writes.writes(step) for step in range(2000)) / 2000 < 0.3


def test_models_that_do_not_write_are_refused() -> None:
    with pytest.raises(TechniqueError, match="Linear does not"):
        check_writes(torch.nn.Linear(2, 2), rows(4), "distill")
    pictures = [Batch({"input_ids": np.ones((1, 4), np.int64), "pixel_values": np.ones((1, 3))}, np.array([0]))]
    with pytest.raises(TechniqueError, match="rows hold pixel_values too"):
        check_writes(TINY["llama"](), pictures, "distill")
