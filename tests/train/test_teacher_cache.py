"""What a teacher predicted, read from disk: the same loss as with the teacher beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.run.progress import Silent
from gossamer.tasks.base import Batch
from gossamer.train.objectives import Logits, Seen
from gossamer.train.teacher_cache import ROWS_OF_A_FILE, CachedLogits, TeacherCache, write

CLASSES = 11
TABLE = torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


def rows(count: int) -> list[Batch]:
    """Return rows of 3 to 7 tokens with their masks."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 8, count)
    tokens = [draw.integers(1, 20, (1, length)) for length in lengths]
    return [Batch({"input_ids": one, "attention_mask": np.ones_like(one)}, np.array([0])) for one in tokens]


def of_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """Predict by a table, token by token."""
    return TABLE[inputs["input_ids"]]


def of_rows(inputs: dict[str, Tensor]) -> Tensor:
    """Predict by a table, one class for each row."""
    return TABLE[inputs["input_ids"][:, 0]]


def written(folder: Path, all_rows: list[Batch], predict: object, top_k: int | None, temperature: float) -> None:
    write(folder, all_rows, predict, top_k=top_k, temperature=temperature, progress=Silent(), label="test")  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [None, 4, CLASSES])
@pytest.mark.parametrize("predict", [of_tokens, of_rows])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_of_the_teacher_beside(
    tmp_path: Path, top_k: int | None, predict: object, temperature: float
) -> None:
    every = rows(ROWS_OF_A_FILE + 20)
    written(tmp_path, every, predict, top_k, temperature)
    some = [every[index] for index in (ROWS_OF_A_FILE + 3, 5, 17)]  # of both files, in another order
    width = max(row.inputs["input_ids"].shape[1] for row in some)
    ids = torch.zeros(3, width, dtype=torch.long)
    for index, row in enumerate(some):
        ids[index, : row.inputs["input_ids"].shape[1]] = torch.from_numpy(row.inputs["input_ids"][0])
    teacher: Tensor = predict({"input_ids": ids})  # type: ignore[operator]
    student = torch.randn_like(teacher)
    seen = Seen(student, teacher, [], [], some)
    for kind in ("forward", "reverse", "js"):
        beside = Logits(kind, temperature, top_k)(seen)
        found = CachedLogits(TeacherCache(tmp_path, every), kind, temperature)(seen)
        exact = top_k is None or top_k >= CLASSES
        torch.testing.assert_close(found, beside, rtol=1e-5 if exact else 5e-3, atol=1e-5)


def test_few_of_many_classes_take_six_bytes_each(tmp_path: Path) -> None:
    every = rows(ROWS_OF_A_FILE)
    written(tmp_path, every, of_tokens, 4, 1.0)
    (file,) = tmp_path.iterdir()
    tokens = sum(row.inputs["input_ids"].size for row in every)
    described = 256 * 2 * 80  # names and shapes in the file's head
    assert file.stat().st_size < tokens * (4 * 4 + 5 * 2) + described


def test_rows_that_are_no_one_s_are_not_taken_for_others(tmp_path: Path) -> None:
    every = rows(4)
    written(tmp_path, every, of_rows, None, 1.0)
    with pytest.raises(KeyError):
        TeacherCache(tmp_path, every).of(rows(1))
