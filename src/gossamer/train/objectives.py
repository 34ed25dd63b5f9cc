"""What a student learns from: its teacher's predictions, its teacher's hidden states, the labels.

With p the teacher's and q the student's distribution at temperature T, over N predictions (rows, or tokens that are no
padding):

    logits   T^2 / N  sum_n D(p_n, q_n)     D = KL(p || q) (Hinton et al., "Distilling the Knowledge in a Neural
             Network", 2015), KL(q || p) (Gu et al., "MiniLLM", 2024), or the mean of both to (p + q) / 2; with top_k
             over the teacher's k most likely classes and the others as one (without that one, the rest's share would
             be given to the k: Anshumann et al., "Sparse Logit Sampling", 2025)
    hidden   mean over blocks l of |h_l - t_m(l)|^2 / |t_m(l)|^2, h the student's and t the teacher's block outputs
             (Romero et al., "FitNets", 2015; Sun et al., "Patient Knowledge Distillation", 2019), m the map of blocks;
             a narrower h goes through a linear map first (`projections.py`)
    labels   the task's own loss

Attention is in `attention.py`.

Dividing by the teacher's own size makes blocks of any width and depth count alike, so one weight fits all models.

Shape suffixes: N predictions, V classes or tokens, K the most likely of them, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.tasks.base import Batch
from gossamer.train.rows import Lengths

Divergence = Literal["forward", "reverse", "js"]


@dataclass(frozen=True)
class Seen:
    """Hold one pass of both models: outputs, block outputs in the order of the student's blocks, and the rows.

    `student_layers` and `teacher_layers` are the outputs of layers that objectives look at, by name.
    """

    student: Tensor
    teacher: Tensor | None
    student_hidden: Sequence[Tensor]
    teacher_hidden: Sequence[Tensor]
    rows: Sequence[Batch]
    student_layers: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_layers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> Lengths:
        """Return how long the rows are."""
        return Lengths.of(self.rows)

    def row(self, index: int) -> Seen:
        """Return what a pass of one row alone would have given: no padding."""
        by_width = self.lengths.by_width

        def own(values: Tensor) -> Tensor:
            row = values[index : index + 1]
            padded = values.ndim == 3 and values.shape[1] in by_width
            return row[:, : by_width[values.shape[1]][index]] if padded else row

        return Seen(
            own(self.student),
            None if self.teacher is None else own(self.teacher),
            [own(values) for values in self.student_hidden],
            [own(values) for values in self.teacher_hidden],
            self.rows[index : index + 1],
            {name: own(values) for name, values in self.student_layers.items()},
            {name: own(values) for name, values in self.teacher_layers.items()},
        )


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
    top_k: int | None = None
    needs_teacher: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean divergence in nats times the square of the temperature."""
        assert seen.teacher is not None
        theirs_NV, ours_NV = (
            seen.lengths.valid(logits).float() / self.temperature for logits in (seen.teacher, seen.student)
        )
        if self.top_k is None or self.top_k >= theirs_NV.shape[-1]:
            log_p, log_q = theirs_NV.log_softmax(-1), ours_NV.log_softmax(-1)
        else:
            top_NK = theirs_NV.topk(self.top_k, -1).indices
            log_p, log_q = with_the_rest_as_one(theirs_NV, top_NK), with_the_rest_as_one(ours_NV, top_NK)
        return self.temperature**2 * divergence(log_p, log_q, self.divergence)


@dataclass(frozen=True)
class Hidden:
    """Follow the teacher's block outputs; `projections` lead to their widths, along `axes`, where those differ."""

    projections: nn.ModuleList | None = None
    axes: tuple[int | None, ...] = ()
    needs_teacher: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean over blocks of the squared distance as a share of the teacher's square."""
        lengths = seen.lengths
        shares = []
        for index, (ours, theirs) in enumerate(zip(seen.student_hidden, seen.teacher_hidden, strict=True)):
            if self.projections is not None and (axis := self.axes[index]) is not None:
                ours = self.projections[index](ours.movedim(axis, -1)).movedim(-1, axis)
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


def with_the_rest_as_one(logits_NV: Tensor, top_NK: Tensor) -> Tensor:
    """Return the log-probabilities of some classes, and behind them that of all others together, [N, K + 1].

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> with_the_rest_as_one(logits, torch.tensor([[0]])).exp()
    tensor([[0.5000, 0.5000]])
    """
    rest_N1 = logits_NV.scatter(-1, top_NK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits_NV.gather(-1, top_NK), rest_N1], -1) - logits_NV.logsumexp(-1, keepdim=True)


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
