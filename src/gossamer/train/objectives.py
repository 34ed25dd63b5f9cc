"""What a student learns from: its teacher's predictions, its teacher's hidden states, the labels.

With p the teacher's and q the student's distribution at temperature T, over N predictions (rows, or tokens that are no
padding):

    logits   T^2 / N  sum_n D(p_n, q_n)     D = KL(p || q) (Hinton et al., "Distilling the Knowledge in a Neural
             Network", 2015), KL(q || p) (Gu et al., "MiniLLM", 2024), or the mean of both to (p + q) / 2
    hidden   mean over blocks l of |h_l - t_m(l)|^2 / |t_m(l)|^2, h the student's and t the teacher's block outputs
             (Romero et al., "FitNets", 2015; Sun et al., "Patient Knowledge Distillation", 2019), m the map of blocks
    labels   the task's own loss

Dividing by the teacher's own size makes blocks of any width and depth count alike, so one weight fits all models.

Shape suffixes: N predictions, V classes or tokens, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from gossamer.tasks.base import Batch
from gossamer.train.rows import Lengths

Divergence = Literal["forward", "reverse", "js"]


@dataclass(frozen=True)
class Seen:
    """Hold one pass of both models: outputs, block outputs in the order of the student's blocks, and the rows."""

    student: Tensor
    teacher: Tensor | None
    student_hidden: Sequence[Tensor]
    teacher_hidden: Sequence[Tensor]
    rows: Sequence[Batch]

    @property
    def lengths(self) -> Lengths:
        """Return how long the rows are."""
        return Lengths.of(self.rows)


class Objective(Protocol):
    """Return a loss, a scalar with a graph to the student."""

    needs_teacher: ClassVar[bool]
    needs_hidden: ClassVar[bool]

    def __call__(self, seen: Seen) -> Tensor:
        """Return the loss of one pass."""


@dataclass(frozen=True)
class Logits:
    """Follow the teacher's predictions."""

    divergence: Divergence = "forward"
    temperature: float = 1.0
    needs_teacher: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean divergence in nats times the square of the temperature."""
        assert seen.teacher is not None
        log_p, log_q = (
            torch.log_softmax(seen.lengths.valid(logits).float() / self.temperature, -1)
            for logits in (seen.teacher, seen.student)
        )
        return self.temperature**2 * divergence(log_p, log_q, self.divergence)


@dataclass(frozen=True)
class Hidden:
    """Follow the teacher's block outputs."""

    needs_teacher: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean over blocks of the squared distance as a share of the teacher's square."""
        lengths = seen.lengths
        shares = []
        for ours, theirs in zip(seen.student_hidden, seen.teacher_hidden, strict=True):
            ours_ND, theirs_ND = lengths.valid(ours).float(), lengths.valid(theirs).float()
            shares.append((ours_ND - theirs_ND).square().sum() / theirs_ND.square().sum())
        return torch.stack(shares).mean()


@dataclass(frozen=True)
class Labels:
    """Learn the rows' own labels. `loss` is the task's, of the outputs [1, ...] of one row."""

    loss: Callable[[Tensor, Batch], Tensor]
    needs_teacher: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean over rows, padding left out."""
        width = seen.student.shape[1]
        lengths = seen.lengths.by_width.get(width) if seen.student.ndim == 3 else None
        found = [
            self.loss(seen.student[index : index + 1, : lengths[index] if lengths else width].float(), row)
            for index, row in enumerate(seen.rows)
        ]
        return torch.stack(found).mean()


def divergence(log_p_NV: Tensor, log_q_NV: Tensor, kind: Divergence) -> Tensor:
    """Return the mean divergence of q from p in nats.

    >>> p = torch.tensor([[0.5, 0.5]]).log()
    >>> float(divergence(p, p, "js"))
    0.0
    """
    if kind == "forward":
        return _kl(log_p_NV, log_q_NV)
    if kind == "reverse":
        return _kl(log_q_NV, log_p_NV)
    log_m = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
    return 0.5 * (_kl(log_p_NV, log_m) + _kl(log_q_NV, log_m))


def _kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean()
