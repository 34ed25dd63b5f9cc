"""The technique `distill`: the candidate learns from the original, on the user's own rows, what earlier steps lost.

The loop is `gossamer.train.loop`, the losses are in `gossamer.train.objectives`. The original is run beside the
candidate, so no label is needed; one row in ten is held back, and the candidate stays as it was where it did not come
nearer to the original on those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

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
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.train.objectives import Divergence, Hidden, Labels, Logits, Objective

MIN_ROWS = 64
HELD_BACK = 10  # every so many-th row only judges
MOST_JUDGED = 256
PASSES = 4  # that one row takes in a step: the teacher's, the student's forward, and twice that back
WEIGHTS = "weights.safetensors"


class Distill(Technique):
    """Train the candidate to follow the original's predictions and the outputs of its blocks.

    In a recipe behind the steps that cut and before those that round: `- distill: {epochs: 3}`. Hinton et al.,
    "Distilling the Knowledge in a Neural Network", 2015; Jiao et al., "TinyBERT", 2020, section 3.
    """

    name: ClassVar[str] = "distill"
    family: ClassVar[str] = "distill"
    needs: ClassVar[Needs] = Needs(
        training=True,
        gradients=True,
        after=("vocabulary", "prune", "sparsify", "low_rank"),
        before=(
            "rotate", "smooth", "awq", "quantize", "gptq", "learned_rounding", "tune_scales", "kv_cache", "cast",
        ),
    )  # fmt: skip

    divergence_left: ClassVar[float] = 0.3

    epochs: float = Field(3.0, gt=0, description="how often each row is seen")
    rows: int = Field(8192, ge=MIN_ROWS, description="most rows that are used, evenly spread over those given")
    batch_size: int = Field(16, ge=1, description="rows of one step")
    micro_batch: int | None = Field(None, ge=1, description="rows of one pass, where a step's do not fit in memory")
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

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return nothing: shapes and formats are other steps' matter."""
        return []

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the original, of gradients, two moments, and the start that is kept."""
        return 5 * 4 * model.num_parameters

    def model_passes(self, num_samples: int) -> float:
        """Return the passes of all steps, `num_samples` being the rows that there are to learn from."""
        return PASSES * self.epochs * min(self.rows, num_samples)

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate after training, or as it was where rows held back say that it is not better."""
        self._check(candidate, context)
        inputs = {**context.identity, "applied": [*candidate.applied, self.entry()], "rows": context.training_print}

        def build(folder: Path) -> dict[str, Any]:
            assert context.run is not None
            found = self._trained(candidate, context, context.run.cache / f"distill-{hash_json(inputs)[:12]}")
            save_file(_values(candidate.module), folder / WEIGHTS)
            return found

        if context.run is None:
            with TemporaryDirectory(prefix="gossamer-distill-") as folder:
                self._trained(candidate, context, Path(folder) / "checkpoints")
        else:
            step = context.run.step("trained", inputs, build)
            _put(candidate.module, load_file(step.folder / WEIGHTS))
        candidate.applied.append(self.entry())
        return candidate

    def _check(self, candidate: Candidate, context: Context) -> None:
        if context.team.size > 1:
            raise TechniqueError(
                f"distill trains in one process, and this recipe is carried out by {context.team.size}",
                "run it without torchrun, or leave the step out",
            )
        if candidate.weights is not None:
            raise TechniqueError(
                "distill needs the model whole, and this one is read piece by piece",
                "raise --memory, or leave the step out",
            )
        if candidate.quantized:
            raise TechniqueError(
                f"{len(candidate.quantized)} parameters were rounded before this step, which trains them",
                "put it before the steps that round",
            )
        if not self.logits and not self.hidden and not self.labels:
            raise TechniqueError("logits, hidden and labels are all 0: nothing is learned", "give one of them a weight")

    def _trained(self, candidate: Candidate, context: Context, checkpoints: Path) -> dict[str, Any]:
        """Train in place, and return what came of it."""
        from gossamer.train.loop import Lesson, Plan, train  # transformers' Trainer takes seconds to import

        source, task = candidate.source, context.task
        rows = self._rows(context)
        student_blocks, teacher = blocks_of(candidate.module), source.original(task).requires_grad_(False)
        pairs = paired(student_blocks, blocks_of(teacher))
        lesson = Lesson(
            student=candidate.module,
            forward=lambda module, inputs: source.forward(module, inputs, task.output),
            objectives=self._objectives(task, bool(pairs), self._labelled(rows, teacher, candidate, context)),
            teacher=teacher,
            student_blocks=[ours for ours, _ in pairs],
            teacher_blocks=[theirs for _, theirs in pairs],
            learned=[row for index, row in enumerate(rows) if index % HELD_BACK != HELD_BACK - 1],
            judged=spread(rows[HELD_BACK - 1 :: HELD_BACK], MOST_JUDGED),
        )
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if multiplies_bf16() or torch.cuda.is_available() else "fp32"
        plan = Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            rate=self.rate,
            precision=precision,
            seed=context.seed,
        )
        outcome = train(lesson, plan, checkpoints, context.progress, label=self.name)
        verdict = "" if outcome.better else ": the weights stay as they were"
        context.progress.say(
            f"distill: loss on {len(lesson.judged)} rows held back {outcome.before:.3e} before, {outcome.after:.3e} "
            f"after {outcome.steps} steps{verdict}"
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
            context.progress.say(f"distill: {error.message}: the original alone is followed")
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
                f"distill needs {MIN_ROWS} rows to learn from, {len(batches)} are left beside those that calibrate and "
                "those that prove",
                "give more rows with --data",
            )
        return spread(batches, self.rows)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it takes minutes, so it is proposed only where a recipe falls short without it (`repair`)."""
        yield from ()

    @classmethod
    def repair(cls, steps: Sequence[Technique], space: SearchSpace) -> Technique | None:
        """Return the step with its defaults for a recipe that cuts something, where there are rows to learn from."""
        cuts = any(step.family == "prune" for step in steps)
        if not cuts or space.training_rows < 4 * MIN_ROWS or any(isinstance(step, cls) for step in steps):
            return None
        return cls.model_validate({})


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


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: values.detach().contiguous() for name, values in module.named_parameters()}


def _put(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
