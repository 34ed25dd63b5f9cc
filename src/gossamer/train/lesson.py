"""What is trained on what, and how long: the settings of a training, its networks, rows and losses, its outcome."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.attention import fused_attention
from gossamer.models.self_attention import outputs_of
from gossamer.run.device import CPU
from gossamer.run.team import Team
from gossamer.tasks.base import Batch
from gossamer.train.objectives import Labels, Objective, Seen
from gossamer.train.on_policy import OnPolicy
from gossamer.train.rows import parts_of

Forward = Callable[[nn.Module, dict[str, Tensor]], Tensor]
Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Optimizer = Literal["adamw", "adamw_8bit"]
LONG = 256  # tokens of a row


@dataclass(frozen=True)
class Plan:
    """Say how long and how fast: epochs over the rows, rows of a step, the highest rate, precision, the seed."""

    epochs: float
    batch_size: int
    rate: float
    precision: Precision = "fp32"
    micro_batch: int | None = None  # rows of one pass, the steps seeing as many whatever it is; None: what fits
    memory: int | None = None  # bytes that a step's passes may take; None: what is free
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.0
    smallest_root: float = 1e-8  # Adam's epsilon: gradients far below it move nothing
    patience: int = 4  # looks at rows held back without a gain after which it ends
    frozen: tuple[type[nn.Module], ...] = (nn.Embedding,)  # layers whose weights stay (a head tied to one stays too)
    checkpointing: bool | None = False  # blocks are passed again on the way back; None: where no row fits otherwise
    compiled: bool = False  # blocks are
    optimizer: Optimizer = "adamw"
    sharded: bool = False  # where several processes train: each holds its part of weights, gradients and moments
    only: frozenset[str] | None = None  # parameters that are trained, by name; None: all but those of frozen layers
    seed: int = 0
    device: torch.device = CPU


class Schedule(Protocol):
    """Change a student between the steps of its training. Before it is settled it is not judged, and not kept.

    Buffers of the student are in its checkpoints; all else has to follow from them, the weights and the step.
    """

    def before_step(self, taken: int, steps: int) -> None:
        """Change the student where `taken` of all `steps` are behind it."""

    def before_update(self) -> None:
        """Look at the gradients of a whole step, the same in all processes, before the weights move by them."""

    def after_update(self) -> None:
        """Look at the weights that have moved."""

    def settled(self, taken: int, steps: int) -> bool:
        """Say whether the student of the last of the steps taken is what a training may end with."""


@dataclass
class Lesson:
    """Hold what is trained on what: the student, its blocks and the teacher's that they follow, objectives, rows.

    `student_layers` and `teacher_layers` name layers whose outputs objectives look at; `projections` are layers that
    objectives use, and that may be trained with the student.
    """

    student: nn.Module
    forward: Forward
    objectives: Sequence[tuple[float, Objective]]
    teacher: nn.Module | None = None
    student_blocks: Sequence[nn.Module] = ()
    teacher_blocks: Sequence[nn.Module] = ()
    learned: Sequence[Batch] = ()
    judged: Sequence[Batch] = ()
    schedule: Schedule | None = None
    on_policy: OnPolicy | None = None
    student_layers: Sequence[str] = ()
    teacher_layers: Sequence[str] = ()
    projections: nn.ModuleList | None = None
    kept: list[Any] = field(default_factory=list)  # what has to live as long as the lesson
    _hidden: dict[str, list[Tensor]] = field(default_factory=lambda: {"student": [], "teacher": []})
    _layers: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {"student": {}, "teacher": {}})

    def loss(self, batch: dict[str, Any], *, labelled: bool = True) -> Tensor:
        """Return the weighted sum of the objectives on a mini-batch, the mean over its rows.

        Not `labelled`: the rows' own labels say nothing (the student wrote the rows), and are left out.
        """
        parts = parts_of(batch)
        rows = sum(len(some) for _, some in parts)
        losses = [self._weighted(self._seen(*part), labelled) * (len(part[1]) / rows) for part in parts]
        return torch.stack(losses).sum()

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """Return the same of each row alone, [B], from one pass over all of a mini-batch."""
        found = []
        for inputs, some in parts_of(batch):
            seen = self._seen(inputs, some)
            found += [self._weighted(seen.row(index)) for index in range(len(some))]
        return torch.stack(found)

    def _weighted(self, seen: Seen, labelled: bool = True) -> Tensor:
        objectives = [one for one in self.objectives if labelled or not isinstance(one[1], Labels)]
        return torch.stack([weight * objective(seen) for weight, objective in objectives]).sum()

    def block_outputs(self, rows: Sequence[Batch]) -> Generator[tuple[Sequence[Tensor], Sequence[Tensor]], None, None]:
        """Yield what the student's blocks and the teacher's give out for each of some rows, no gradients being kept."""
        with self._watched(), torch.no_grad():
            for row in rows:
                seen = self._seen({name: torch.from_numpy(values) for name, values in row.inputs.items()}, [row])
                yield seen.student_hidden, seen.teacher_hidden

    def _seen(self, inputs: dict[str, Tensor], rows: Sequence[Batch]) -> Seen:
        teacher = None
        for side in ("student", "teacher"):
            self._hidden[side].clear()
            self._layers[side].clear()
        if self.teacher is not None and any(objective.needs_teacher for _, objective in self.objectives):
            with torch.no_grad():
                teacher = self.forward(self.teacher, inputs)
        student = self.forward(self.student, inputs)
        hidden, layers = self._hidden, self._layers
        return Seen(
            student,
            teacher,
            list(hidden["student"]),
            list(hidden["teacher"]),
            rows,
            dict(layers["student"]),
            dict(layers["teacher"]),
        )

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Keep what objectives look at while the `with` lasts; attention over long rows goes by the fused kernel.

        What attention written out keeps for its way back grows with the square of the length; of short rows that is
        little, and the kernel is slower there (MiniLM, 16 rows of 128 tokens in bf16: 0.66 s a step instead of 0.52).
        """
        longest = max(
            (values.shape[1] for row in self.learned for values in row.inputs.values() if values.ndim == 2), default=0
        )
        with ExitStack() as stack:
            for network in (self.student, self.teacher) if longest > LONG else ():
                if network is not None:
                    stack.enter_context(fused_attention(network))
            stack.enter_context(self._watched())
            self._layers["student"] = stack.enter_context(outputs_of(self.student, self.student_layers))
            if self.teacher is not None:
                self._layers["teacher"] = stack.enter_context(outputs_of(self.teacher, self.teacher_layers))
            yield

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Keep what the blocks give out, where an objective looks at it, while the `with` lasts."""
        handles = []
        if any(objective.needs_hidden for _, objective in self.objectives):
            for side, blocks in (("student", self.student_blocks), ("teacher", self.teacher_blocks)):
                kept = self._hidden[side]
                for block in blocks:
                    handles.append(block.register_forward_hook(lambda _m, _a, found, kept=kept: _keep(kept, found)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _keep(kept: list[Tensor], found: Any) -> None:
    kept.append(found if isinstance(found, Tensor) else found[0])


@dataclass(frozen=True)
class Outcome:
    """Hold the loss on the rows held back before and after, how many steps were taken, and whether it was stopped.

    `settled`: the student came to what its training may end with; `gained`: the loss is lower for certain.
    """

    before: float
    after: float
    steps: int
    diverged: bool
    settled: bool = True
    gained: bool = True

    @property
    def better(self) -> bool:
        """Say whether the student is better than it was."""
        return self.settled and self.gained


def rows_of_one(batch_size: int, team: Team, label: str) -> int:
    """Return how many rows of a step each process has. Raises TechniqueError where they cannot be shared evenly.

    >>> rows_of_one(16, Team(rank=0, size=4), "distill")
    4
    """
    if batch_size % team.size:
        raise TechniqueError(
            f"{label}: a step of {batch_size} rows cannot be shared evenly by {team.size} processes",
            f"set batch_size to a multiple of {team.size}, or start another number of processes",
        )
    return batch_size // team.size
