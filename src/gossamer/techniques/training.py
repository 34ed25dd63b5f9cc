"""What every step that trains has in common: its settings, the rows, the original beside it, and what is learned.

The loop is `gossamer.train.loop`, the losses are in `gossamer.train.objectives`. A step says which weights are trained;
what they learn is the original's predictions, the outputs of its blocks, its attention, and the rows' own labels, each
with a weight.
One row in ten is held back, and the candidate stays as it was where it did not come nearer on those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.errors import DataError, TechniqueError
from gossamer.measure.machine import multiplies_bf16
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.self_attention import SelfAttention, find_map_rules, find_self_attentions
from gossamer.run.fingerprint import hash_json
from gossamer.tasks.base import Batch, spread
from gossamer.techniques.base import Context, Technique
from gossamer.techniques.followed import attention_pairs, blocks_of, mapped, paired, related
from gossamer.techniques.remembered import Remembered
from gossamer.train.attention import Maps, Relations
from gossamer.train.lesson import Lesson, Optimizer, Outcome, Plan, Precision, rows_of_one
from gossamer.train.objectives import Divergence, Hidden, Labels, Logits, Objective
from gossamer.train.on_policy import OnPolicy, check_writes
from gossamer.train.projections import fitted
from gossamer.train.teacher_cache import FEW

MIN_ROWS = 64
HELD_BACK = 10  # every so many-th row only judges
MOST_JUDGED = 256
MOST_FITTED = 256  # rows that projections are fitted on
PASSES = 3  # of the student that one row takes in a step: forward, and twice that back
FLOAT_BYTES = 4
FOLLOWED = ("logits", "hidden", "relations", "attention")
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
    relations: float = Field(
        0.0,
        ge=0,
        description="weight of following how queries, keys and values relate tokens, in one block (MiniLM v2)",
    )
    relation_block: int | None = Field(
        None, ge=0, description="the original's block whose relations the last one follows; empty: its last"
    )
    relation_heads: int | None = Field(
        None,
        ge=1,
        description="heads that relations are split into; empty: at most the original's, dividing both widths",
    )
    attention: float = Field(0.0, ge=0, description="weight of following the original's attention maps")
    projection: Literal["lstsq", "learned"] = Field(
        "lstsq",
        description="how narrower blocks are led to the original's width: a fit that stands still, or learned on",
    )
    divergence: Divergence = Field(
        "forward", description="between predictions: forward (original to candidate), reverse, js"
    )
    temperature: float = Field(1.0, gt=0, description="predictions are compared at this temperature")
    top_k: int | None = Field(
        None, ge=1, description="compare the original's k most likely tokens, and the rest as one; empty: all"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="of the passes: auto is bf16 where this machine multiplies it faster; fp8 (blocks multiply in it, "
        "the rest is bf16) needs a GPU that does",
    )
    checkpointing: bool | None = Field(
        None,
        description="whether blocks are passed again on the way back instead of keeping all that it needs; empty: "
        "where not one row fits into memory otherwise",
    )
    compiled: bool = Field(False, description="whether blocks are compiled (torch.compile)")
    optimizer: Optimizer = Field("adamw", description="adamw, or adamw_8bit: both moments in 8 bits (torchao)")
    teacher: Literal["auto", "beside", "cached"] = Field(
        "auto",
        description="run the original beside in every step, or once, its predictions being kept on disk; auto: once, "
        "where predictions alone are followed and are few (classes, or top_k)",
    )
    on_policy: float = Field(
        0.0, ge=0, le=1, description="share of the steps on texts that the candidate writes itself (language models)"
    )
    new_tokens: int = Field(64, ge=1, description="most tokens that it writes behind the first half of a row")
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="of several processes: each has all weights, or (fsdp) a part of them and of what they need"
    )

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the original, of gradients, two moments, and the start that is kept."""
        return 5 * FLOAT_BYTES * model.num_parameters

    def model_passes(self, num_samples: int, left: float = 1.0) -> float:
        """Return the passes of all steps, `num_samples` being the rows that there are to learn from."""
        rows = min(self.rows, num_samples)
        own = left * (PASSES + bool(self.checkpointing))
        if self.on_policy:  # a token that is written takes about a pass of its own, of that one token
            return rows * self.epochs * (1 + own + left * self.on_policy)
        if self._follows_predictions_alone and self.teacher != "beside":  # where it is not known yet: it takes less
            return rows * (own * self.epochs + 1)
        return rows * self.epochs * (1 + own)

    def _check(self, candidate: Candidate, context: Context) -> None:
        """Raise TechniqueError where this candidate cannot be trained like this."""
        rows_of_one(self.batch_size, context.team, self.name)
        if self.sharding == "fsdp" and context.team.size == 1:
            context.progress.say(
                f"{self.name}: sharding: fsdp splits between processes, and one was started: all is here"
            )
        if candidate.weights is not None:
            raise TechniqueError(
                f"{self.name} needs the model whole, and this one is read piece by piece",
                "raise --memory, or leave the step out",
            )
        if not self._follows and not self.labels:
            raise TechniqueError(
                f"{', '.join(FOLLOWED)} and labels are all 0: nothing is learned", "give one of them a weight"
            )

        self._check_teacher()

    def _check_teacher(self) -> None:
        """Raise TechniqueError where what is followed cannot be had in the way that is asked for."""
        if self.on_policy and (self.sharding == "fsdp" or self.teacher == "cached" or not self._follows):
            other = "sharding: fsdp" if self.sharding == "fsdp" else "teacher: cached"
            other = other if self._follows else "labels alone"
            raise TechniqueError(
                f"{self.name}: on_policy has whole models judge what one of them writes, which {other} does not allow",
                "leave one of the two out",
            )
        if self.teacher == "cached" and not self._follows_predictions_alone:
            others = [name for name in FOLLOWED if name != "logits" and getattr(self, name)]
            what = f"{' and '.join(others)} look at the original's layers" if others else "logits are not followed"
            raise TechniqueError(
                f"{self.name}: teacher: cached keeps predictions alone, and {what}",
                "set these to 0 and logits above it, or teacher: beside",
            )

    @property
    def _follows(self) -> bool:
        """Say whether the original is followed in anything."""
        return any(getattr(self, name) for name in FOLLOWED)

    @property
    def _follows_predictions_alone(self) -> bool:
        """Say whether the original's predictions are all that is followed."""
        return [name for name in FOLLOWED if getattr(self, name)] == ["logits"]

    def _lesson(self, candidate: Candidate, context: Context) -> Lesson:
        """Return what is learned on which rows: the original is run beside where an objective follows it."""
        source, task = candidate.source, context.task
        rows = self._rows(context)
        teacher = source.original(task).requires_grad_(False)
        pairs = paired(blocks_of(candidate.module), blocks_of(teacher))
        objectives: list[tuple[float, Objective]] = []
        predictions = Logits(self.divergence, self.temperature, self.top_k)
        if self.logits:
            objectives.append((self.logits, predictions))
        lesson = Lesson(
            student=candidate.module,
            forward=lambda module, inputs: source.forward(module, inputs, task.output),
            objectives=objectives,
            teacher=teacher,
            student_blocks=[ours for ours, _ in pairs],
            teacher_blocks=[theirs for _, theirs in pairs],
            learned=[row for index, row in enumerate(rows) if index % HELD_BACK != HELD_BACK - 1],
            judged=spread(rows[HELD_BACK - 1 :: HELD_BACK], MOST_JUDGED),
        )
        if self.hidden and pairs:
            objectives.append((self.hidden, self._hidden(lesson, context)))
        if self.relations or self.attention:
            self._follow_attention(lesson, objectives, context)
        if self._labelled(rows, teacher, candidate, context):

            def loss(outputs: Tensor, row: Batch) -> Tensor:
                return task.loss({task.output: outputs}, row)

            objectives.append((self.labels, Labels(loss)))
        if self.on_policy:
            check_writes(candidate.module, rows, self.name)
            lesson.on_policy = OnPolicy(self.on_policy, self.new_tokens, context.seed)
        elif self._follows_predictions_alone and self.teacher != "beside":
            remembered = Remembered(lesson, rows, self._precision(context), context)
            shape = remembered.shape()
            if self.teacher == "auto" and self.top_k is None and shape[-1] > FEW:
                teacher.to("cpu")  # beside, it is moved with the student
            else:
                if source.lacks_tokens and len(shape) == 2 and (read := spread(context.as_original(), self.rows)):
                    remembered.in_its_own_tokens(source.module(task), read)
                remembered.follow(predictions, self.name)
        return lesson

    def _hidden(self, lesson: Lesson, context: Context) -> Hidden:
        """Return what follows blocks, with layers that lead to the original's width where the student is narrower."""
        watching = replace(lesson, objectives=[(1.0, Hidden())])
        with closing(watching.block_outputs(lesson.learned[:MOST_FITTED])) as passes:
            lesson.projections, axes = fitted(passes, trained=self.projection == "learned")
        if lesson.projections is None:
            return Hidden()
        narrow = sum(axis is not None for axis in axes)
        how = "then learned on" if self.projection == "learned" else "which stand still"
        context.progress.say(
            f"{self.name}: {narrow} of {len(axes)} blocks are led to the original's width by fitted layers, {how}"
        )
        return Hidden(lesson.projections, axes)

    def _follow_attention(self, lesson: Lesson, objectives: list[tuple[float, Objective]], context: Context) -> None:
        """Add what follows attention, and name the layers whose outputs it looks at."""
        example = {name: torch.from_numpy(values) for name, values in context.example.items()}
        assert lesson.teacher is not None
        ours, theirs = (self._attentions(module, example, lesson) for module in (lesson.student, lesson.teacher))
        looked: list[tuple[str, str]] = []
        if self.relations:
            relations = related(ours, theirs, self.relation_block, self.relation_heads)
            looked += [(one.student, one.teacher) for one in relations]
            objectives.append((self.relations, Relations(relations)))
        if self.attention:
            pairs = attention_pairs(ours, theirs)
            longest = max(lesson.learned, key=lambda row: sum(values.size for values in row.inputs.values()))
            row = {name: torch.from_numpy(values) for name, values in longest.inputs.items()}
            rules = [
                find_map_rules(module, [pair[side] for pair in pairs], row, lesson.forward)
                for side, module in enumerate((lesson.student, lesson.teacher))
            ]
            maps = mapped(pairs, *rules)
            looked += [names for one in maps for names in zip(one.student, one.teacher, strict=True)]
            objectives.append((self.attention, Maps(maps)))
        assert looked, "stacks of a student are stacks of its original"
        lesson.student_layers, lesson.teacher_layers = (list(dict.fromkeys(side)) for side in zip(*looked, strict=True))

    def _attentions(self, module: nn.Module, example: dict[str, Tensor], lesson: Lesson) -> Sequence[SelfAttention]:
        """Return the self-attentions of a model's blocks. Raises TechniqueError where none is understood."""
        found, unclear = find_self_attentions(module, example, lesson.forward)
        if not found:
            weights = " and ".join(name for name in ("relations", "attention") if getattr(self, name))
            raise TechniqueError(
                f"{self.name} finds no queries, keys and values that {weights} could follow: "
                f"{unclear or 'no block attends to its own tokens by layers of its own'}",
                f"set {weights} to 0, and follow `hidden`",
            )
        return found

    def _plan(self, context: Context) -> Plan:
        """Return how long and how fast."""
        return Plan(
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            memory=context.samples_memory,  # the copies of weights are not in it
            rate=self.rate,
            precision=self._precision(context),
            checkpointing=self.checkpointing,
            compiled=self.compiled,
            optimizer=self.optimizer,
            sharded=self.sharding == "fsdp",
            seed=context.seed,
            device=context.device,
        )

    def _precision(self, context: Context) -> Precision:
        """Return what passes compute in, the same in all processes."""
        if self.precision != "auto":
            return self.precision
        faster = multiplies_bf16() or context.device.type != "cpu"
        return "bf16" if context.team.everywhere(faster) else "fp32"

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
            if not self._follows:
                raise
            context.progress.say(f"{self.name}: {error.message}: the original alone is followed")
            return False
        return True

    def _rows(self, context: Context) -> list[Batch]:
        batches = context.training()
        if len(batches) < MIN_ROWS:
            raise TechniqueError(
                f"{self.name} needs {MIN_ROWS} rows to learn from, {len(batches)} are left beside those that calibrate "
                "and those that prove",
                "give more rows with --data",
            )
        return spread(batches, self.rows)
