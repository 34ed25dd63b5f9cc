"""What every step that trains has in common: its settings, the rows, the original beside it, and what is learned.

The loop is `gossamer.train.loop`, the losses are in `gossamer.train.objectives`. A step says which weights are trained;
what they learn is the original's predictions, the outputs of its blocks, and the rows' own labels, each with a weight.
One row in ten is held back, and the candidate stays as it was where it did not come nearer on those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.errors import DataError, TechniqueError
from gossamer.measure.machine import multiplies_bf16
from gossamer.models.blocks import find_stacks
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.run.fingerprint import hash_json
from gossamer.tasks.base import Batch, Task, spread
from gossamer.techniques.base import Context, Technique
from gossamer.train.lesson import Lesson, Outcome, Plan, rows_of_one
from gossamer.train.objectives import Divergence, Hidden, Labels, Logits, Objective

MIN_ROWS = 64
HELD_BACK = 10  # every so many-th row only judges
MOST_JUDGED = 256
PASSES = 4  # that one row takes in a step: the teacher's, the student's forward, and twice that back
FLOAT_BYTES = 4
FILE = "trained.safetensors"
Training = Callable[[Path], tuple[dict[str, Any], dict[str, Tensor]]]


class TrainingTechnique(Technique):
    """A technique that trains: settings of the loop and of what is learned; which weights is left to the others."""

    epochs: float = Field(3.0, gt=0, description="how often each row is seen")
    rows: int = Field(8192, ge=MIN_ROWS, description="most rows that are used, evenly spread over those given")
    batch_size: int = Field(16, ge=1, description="rows of one step")
    micro_batch: int | None = Field(
        None, ge=1, description="rows of one pass; empty: as many of a step's as fit into memory"
    )
    rate: float = Field(6e-5, gt=0, lt=0.1, description="the highest learning rate; it falls along half a cosine")
    logits: float = Field(1.0, ge=0, description="weight of following the original's predictions")
    hidden: float = Field(1.0, ge=0, description="weight of following the outputs of the original's blocks")
    labels: float = Field(0.5, ge=0, description="weight of the rows' own labels")
    divergence: Divergence = Field(
        "forward", description="between predictions: forward (original to candidate), reverse, js"
    )
    temperature: float = Field(1.0, gt=0, description="predictions are compared at this temperature")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the passes: auto is bf16 where this machine multiplies it faster"
    )

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the original, of gradients, two moments, and the start that is kept."""
        return 5 * FLOAT_BYTES * model.num_parameters

    def model_passes(self, num_samples: int) -> float:
        """Return the passes of all steps, `num_samples` being the rows that there are to learn from."""
        return PASSES * self.epochs * min(self.rows, num_samples)

    def _check(self, candidate: Candidate, context: Context) -> None:
        """Raise TechniqueError where this candidate cannot be trained like this."""
        rows_of_one(self.batch_size, context.team, self.name)
        if torch.cuda.is_available() and context.team.local_size > torch.cuda.device_count():
            raise TechniqueError(
                f"{self.name} trains on one GPU each: {context.team.local_size} processes were started here, "
                f"{torch.cuda.device_count()} GPUs are there",
                "start as many processes as there are GPUs",
            )
        if candidate.weights is not None:
            raise TechniqueError(
                f"{self.name} needs the model whole, and this one is read piece by piece",
                "raise --memory, or leave the step out",
            )
        if not self.logits and not self.hidden and not self.labels:
            raise TechniqueError("logits, hidden and labels are all 0: nothing is learned", "give one of them a weight")

    def _lesson(self, candidate: Candidate, context: Context) -> Lesson:
        """Return what is learned on which rows: the original is run beside where an objective follows it."""
        source, task = candidate.source, context.task
        rows = self._rows(context)
        teacher = source.original(task).requires_grad_(False)
        pairs = paired(blocks_of(candidate.module), blocks_of(teacher))
        return Lesson(
            student=candidate.module,
            forward=lambda module, inputs: source.forward(module, inputs, task.output),
            objectives=self._objectives(task, bool(pairs), self._labelled(rows, teacher, candidate, context)),
            teacher=teacher,
            student_blocks=[ours for ours, _ in pairs],
            teacher_blocks=[theirs for _, theirs in pairs],
            learned=[row for index, row in enumerate(rows) if index % HELD_BACK != HELD_BACK - 1],
            judged=spread(rows[HELD_BACK - 1 :: HELD_BACK], MOST_JUDGED),
        )

    def _plan(self, context: Context) -> Plan:
        """Return how long and how fast."""
        precision = self.precision
        if precision == "auto":
            faster = multiplies_bf16() or torch.cuda.is_available()
            precision = "bf16" if context.team.everywhere(faster) else "fp32"
        return Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            memory=context.samples_memory,  # the copies of weights are not in it
            rate=self.rate,
            precision=precision,
            seed=context.seed,
        )

    def _learned(self, candidate: Candidate, context: Context, train: Training) -> tuple[Any, dict[str, Tensor]]:
        """Return what `train(folder of its checkpoints)` found and the values; kept in the run folder, once done.

        Of several processes the leader keeps it; what the others have is read from its file.
        """
        team = context.team
        inputs = {**context.identity, "applied": [*candidate.applied, self.entry()], "rows": context.training_print}
        if context.run is None:
            with TemporaryDirectory(prefix=f"gossamer-{self.name}-") as folder:
                return train(Path(team.everywhere(folder)) / "checkpoints")
        checkpoints = context.run.cache / f"{self.name}-{hash_json(inputs)[:12]}"

        def build(folder: Path) -> dict[str, Any]:
            team.everywhere(True)  # the others wait for this, and train too
            found, values = train(checkpoints)
            save_file(values, folder / FILE)
            return found

        if team.leads:
            step = context.run.step("trained", inputs, build)
            team.everywhere(False)
            told = team.everywhere({"folder": str(step.folder), "value": step.value})
        else:
            while team.everywhere():
                train(checkpoints)
            told = team.everywhere()
        return told["value"], load_file(Path(told["folder"]) / FILE)

    def _told(self, outcome: Outcome, lesson: Lesson, context: Context, *, otherwise: str) -> dict[str, Any]:
        """Say what came of a training, and return it; `otherwise` is what is the case where it is not kept."""
        verdict = "" if outcome.better else f": {otherwise}"
        context.progress.say(
            f"{self.name}: loss on {len(lesson.judged)} rows held back {outcome.before:.3e} before, "
            f"{outcome.after:.3e} after {outcome.steps} steps{verdict}"
        )
        return {"before": outcome.before, "after": outcome.after, "steps": outcome.steps, "kept": outcome.better}

    def _labelled(self, rows: Sequence[Batch], teacher: nn.Module, candidate: Candidate, context: Context) -> bool:
        """Say whether rows have what the task's loss asks for: rows without labels teach by the original alone."""
        if not self.labels:
            return False
        inputs, task = {name: torch.from_numpy(values) for name, values in rows[0].inputs.items()}, context.task
        with torch.no_grad():
            outputs = {task.output: candidate.source.forward(teacher, inputs, task.output)}
        try:
            task.loss(outputs, rows[0])
        except DataError as error:
            if not self.logits and not self.hidden:
                raise
            context.progress.say(f"{self.name}: {error.message}: the original alone is followed")
            return False
        return True

    def _objectives(self, task: Task, blocks: bool, labelled: bool) -> list[tuple[float, Objective]]:
        def loss(outputs: Tensor, row: Batch) -> Tensor:
            return task.loss({task.output: outputs}, row)

        found: list[tuple[float, Objective]] = []
        if self.logits:
            found.append((self.logits, Logits(self.divergence, self.temperature)))
        if self.hidden and blocks:
            found.append((self.hidden, Hidden()))
        if labelled:
            found.append((self.labels, Labels(loss)))
        return found

    def _rows(self, context: Context) -> list[Batch]:
        batches = context.training()
        if len(batches) < MIN_ROWS:
            raise TechniqueError(
                f"{self.name} needs {MIN_ROWS} rows to learn from, {len(batches)} are left beside those that calibrate "
                "and those that prove",
                "give more rows with --data",
            )
        return spread(batches, self.rows)


def blocks_of(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the blocks of every stack, in order."""
    found: dict[str, list[nn.Module]] = {}
    for name, (stack, _) in find_stacks(module)[1].items():
        found.setdefault(stack, []).append(module.get_submodule(name))
    return found


def paired(
    student: dict[str, list[nn.Module]], teacher: dict[str, list[nn.Module]]
) -> list[tuple[nn.Module, nn.Module]]:
    """Return each block of the student with the one of the teacher that it follows: evenly, the last with the last.

    >>> ours, theirs = [nn.Identity() for _ in range(2)], [nn.Identity() for _ in range(6)]
    >>> [theirs.index(block) for _, block in paired({"a": ours}, {"a": theirs})]
    [2, 5]
    """
    pairs = []
    for name, ours in student.items():
        theirs = teacher.get(name, [])
        if theirs:
            pairs += [(block, theirs[(i + 1) * len(theirs) // len(ours) - 1]) for i, block in enumerate(ours)]
    return pairs
