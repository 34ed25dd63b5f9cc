"""The losses against what their formulas say."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional

from gossamer.tasks.base import Batch
from gossamer.train.objectives import Divergence, Hidden, Labels, Logits, Seen, divergence


def seen(student: torch.Tensor, teacher: torch.Tensor | None = None, hidden: tuple[torch.Tensor, ...] = ()) -> Seen:
    """Return a pass over two rows of 3 and 5 tokens."""
    lengths = (3, 5)
    rows = [
        Batch({"input_ids": np.ones((1, n), dtype=np.int64)}, np.array([i]), {"labels": np.full((1, n), i)})
        for i, n in enumerate(lengths)
    ]
    return Seen(student, teacher, hidden[:1], hidden[1:], rows)


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_a_divergence_is_zero_only_between_equals(kind: Divergence) -> None:
    p, q = (torch.randn(6, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    assert float(divergence(p, p, kind)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(p, q, kind)) > 1e-3


def test_forward_and_reverse_are_each_other_turned_round() -> None:
    p, q = (torch.randn(6, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    assert torch.equal(divergence(p, q, "forward"), divergence(q, p, "reverse"))
    assert torch.allclose(divergence(p, q, "js"), divergence(q, p, "js"))


def test_logits_leave_padding_out() -> None:
    student, teacher = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    before = Logits()(seen(student, teacher))
    student[0, 3:] = 1e3
    assert torch.equal(Logits()(seen(student, teacher)), before)


def test_logits_at_a_temperature_are_the_textbook_loss() -> None:
    student, teacher = torch.randn(2, 11), torch.randn(2, 11)
    wanted = 4 * functional.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    assert torch.allclose(Logits(temperature=2)(seen(student, teacher)), wanted, atol=1e-6)


def test_hidden_is_a_share_of_the_teachers_square() -> None:
    theirs = torch.randn(2, 5, 4)
    assert float(Hidden()(seen(torch.zeros(2, 4), None, (1.1 * theirs, theirs)))) == pytest.approx(0.01, rel=1e-4)


def test_labels_are_the_tasks_loss_row_by_row() -> None:
    def loss(outputs: torch.Tensor, row: Batch) -> torch.Tensor:
        return functional.cross_entropy(outputs.flatten(0, 1), torch.from_numpy(row.targets["labels"]).flatten())

    logits = torch.randn(2, 5, 3)
    wanted = (functional.cross_entropy(logits[0, :3], torch.zeros(3, dtype=torch.long))
              + functional.cross_entropy(logits[1], torch.ones(5, dtype=torch.long))) / 2  # fmt: skip
    assert torch.allclose(Labels(loss)(seen(logits)), wanted)
