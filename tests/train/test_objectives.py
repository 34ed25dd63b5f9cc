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


def test_a_row_of_a_pass_is_what_it_would_be_alone() -> None:
    student, hidden, image = torch.randn(2, 5, 11), torch.randn(2, 5, 4), torch.randn(2, 5, 4, 4)
    both = seen(student, 2 * student, (hidden, image))
    for index, length in enumerate((3, 5)):
        one = both.row(index)
        assert torch.equal(one.student, student[index : index + 1, :length])
        assert torch.equal(one.student_hidden[0], hidden[index : index + 1, :length])
        assert torch.equal(one.teacher_hidden[0], image[index : index + 1])  # of no tokens
        p, q = (values[index, :length].log_softmax(-1) for values in (2 * student, student))
        assert torch.allclose(Logits()(one), divergence(p, q, "forward"))


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_top_k_is_the_divergence_of_k_classes_and_the_rest(kind: Divergence) -> None:
    student, teacher = torch.randn(2, 11), torch.randn(2, 11)
    found = []
    for row in range(2):
        order = teacher[row].argsort(descending=True)
        p, q = (
            torch.cat([values.softmax(0)[order[:3]], values.softmax(0)[order[3:]].sum().view(1)])
            for values in (teacher[row], student[row])
        )
        found.append(divergence(p.log()[None], q.log()[None], kind))
    assert torch.allclose(Logits(kind, top_k=3)(seen(student, teacher)), torch.stack(found).mean(), atol=1e-6)


def test_top_k_of_all_is_the_divergence_itself_and_less_is_never_more() -> None:
    student, teacher = torch.randn(2, 11), torch.randn(2, 11)
    losses = [float(Logits(top_k=k)(seen(student, teacher))) for k in (1, 3, 6, 11, 20)]
    assert losses[-1] == losses[-2] == float(Logits()(seen(student, teacher)))
    assert losses[:4] == sorted(losses[:4])  # merging classes cannot raise a divergence


def test_a_teacher_that_leaves_nothing_to_the_rest_gives_finite_gradients() -> None:
    student, teacher = torch.randn(2, 11, requires_grad=True), torch.randn(2, 11)
    teacher[:, 0] = 200.0
    Logits(top_k=1)(seen(student, teacher)).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert float(student.grad[:, 0].max()) < 0
