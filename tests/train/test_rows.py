"""Mini-batches: what is padding is padded with zeros and left out of every loss."""

from __future__ import annotations

import numpy as np
import torch

from gossamer.tasks.base import Batch
from gossamer.train.rows import Lengths, collate, parts_of


def row(length: int, **more: np.ndarray) -> Batch:
    """Return a row of so many tokens."""
    return Batch({"input_ids": np.arange(1, length + 1)[None], **more}, np.array([0]))


def masked(length: int) -> Batch:
    """Return a row that says what is padding."""
    return row(length, attention_mask=np.ones((1, length), dtype=np.int64))


def test_rows_with_a_mask_are_padded_at_the_end() -> None:
    found = collate([masked(2), masked(4)])["inputs"]
    assert found["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert found["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_rows_of_one_length_are_stacked_without_a_mask() -> None:
    assert collate([row(3), row(3)])["inputs"]["input_ids"].shape == (2, 3)


def test_rows_that_no_mask_could_tell_apart_pass_alone() -> None:
    parts = parts_of(collate([row(2), row(3)]))
    assert [inputs["input_ids"].shape for inputs, _ in parts] == [(1, 2), (1, 3)]
    assert [len(rows) for _, rows in parts] == [1, 1]


def test_a_causal_decoder_needs_no_mask() -> None:
    sound = {"input_features": np.zeros((1, 80, 30), dtype=np.float32)}
    rows = [Batch({**sound, "decoder_input_ids": np.ones((1, n), dtype=np.int64)}, np.array([0])) for n in (2, 5)]
    found = collate(rows)["inputs"]
    assert found["decoder_input_ids"].shape == (2, 5)
    assert found["input_features"].shape == (2, 80, 30)
    assert Lengths.of(rows).valid(torch.zeros(2, 5, 7)).shape == (7, 7)


def test_values_of_padding_are_left_out() -> None:
    values = torch.arange(2 * 4 * 3).view(2, 4, 3)
    found = Lengths.of([masked(2), masked(4)]).valid(values)
    assert torch.equal(found, torch.cat([values[0, :2], values[1]]))


def test_values_of_whole_rows_stay() -> None:
    assert Lengths.of([masked(2), masked(4)]).valid(torch.zeros(2, 5)).shape == (2, 5)
