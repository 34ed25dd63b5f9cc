"""The one training loop: `transformers.Trainer`; its loss is a weighted sum of objectives, its model a candidate's.

Precision, accumulation, checkpoints, resuming, early stopping come from transformers and Accelerate, and so do several
processes: each takes its rows of every step, and gradients are averaged (DistributedDataParallel). Steps have the same
rows however many processes and parts they are cut into. Here are the loss, the teacher that runs beside, and what keeps
a run from ending worse than it began:

- what was not better on rows held back is not kept (the start counts as a checkpoint too; a student that a schedule is
  still changing does not);
- weights that are exactly zero stay so: an earlier step made them, and says so in the recipe;
- a loss that is no number, or far above what it was, ends the training, and the best checkpoint is kept (`watch.py`).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gossamer.errors import TechniqueError
from gossamer.models.config import quiet_transformers
from gossamer.run.progress import Progress
from gossamer.run.team import ALONE, Team
from gossamer.tasks.base import Batch
from gossamer.train.fitting import COPIES, Fit, fitting_rows, free_bytes, remembered
from gossamer.train.lesson import Lesson, Outcome, Plan, rows_of_one
from gossamer.train.on_policy import OnPolicy
from gossamer.train.passes import blocks_in, check_passes, in_fp8, passing
from gossamer.train.rows import Rows, collate
from gossamer.train.sharded import ZerosStay, allow, check_same_way, split
from gossamer.train.watch import Scheduled, Watch
from gossamer.train.weights import Parts, Weights, trainable

EVALUATIONS = 4  # an epoch at least
JUDGED_AT_ONCE = 4  # rows
EIGHT_BITS = "adamw_torch_8bit"  # as transformers names torchao's
MOST_PARTS = 1 << 12  # of a step, and processes: what is drawn has a number of its own in each


def train(lesson: Lesson, plan: Plan, folder: Path, progress: Progress, *, label: str, team: Team = ALONE) -> Outcome:
    """Train the student in place; where it did not become better on the rows held back, it is as it was.

    Checkpoints lie in `folder` while it runs: the same call goes on from the last one, in as many processes as there
    are then. All processes of a team make this call and see that folder; all end with the same student. Raises
    TechniqueError when there are no rows to learn from, or a step's rows cannot be shared evenly.
    """
    if not lesson.learned or not lesson.judged:
        raise TechniqueError(
            f"{label} has {len(lesson.learned)} rows to learn from and {len(lesson.judged)} to judge on",
            "give more rows with --data",
        )
    check_passes(lesson.student, plan, label)
    watch = Watch(progress, label)
    with quiet_transformers(), _quiet_trainer():
        if plan.micro_batch is None:
            find = partial(_fitting, lesson, plan, progress, label, team)
            fit = remembered(folder, find, team)
            plan = replace(plan, micro_batch=fit.rows, checkpointing=fit.checkpointing)
        before = watch.usual = judge(lesson, plan, team)  # as it came, whatever a checkpoint brings
        run = _run_split if plan.sharded and team.size > 1 else _run
        outcome = run(lesson, plan, folder, watch, team, before)
    if team.leads:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _run(lesson: Lesson, plan: Plan, folder: Path, watch: Watch, team: Team, before: float) -> Outcome:
    """Train the student as it is: with all of its weights in each process."""
    student, arguments = (
        Weights(lesson.student, lesson.projections),
        _arguments(plan, len(lesson.learned), folder, team),
    )
    networks = lesson.student, lesson.teacher, lesson.projections
    with passing(lesson, plan), lesson.ready(), _moved(arguments.device, *networks), trainable(lesson.student, plan):
        start = {name: values.detach().clone() for name, values in student.trained().items()}
        outcome = _steps(_Trainer(lesson, student, arguments, watch, plan), watch, team, before)
        if not outcome.better:
            student.put(start)
    return outcome


def _run_split(lesson: Lesson, plan: Plan, folder: Path, watch: Watch, team: Team, before: float) -> Outcome:
    """Train a copy of the student of which each process holds a part."""
    with split(lesson, watch.label) as splitting:
        copied = splitting.lesson
        arguments = _arguments(plan, len(lesson.learned), folder, team, splitting.arguments)
        student = Parts(copied.student, copied.projections)
        teacher = lesson.teacher
        with passing(copied, plan), copied.ready(), _moved(arguments.device, teacher), trainable(copied.student, plan):
            outcome = _steps(_Trainer(copied, student, arguments, watch, plan), watch, team, before)
            if outcome.better:
                splitting.put_together(student)
    return outcome


def _steps(trainer: _Trainer, watch: Watch, team: Team, before: float) -> Outcome:
    """Take the steps, from the last checkpoint on where there is one; return what came of it."""
    schedule, folder = trainer.lesson.schedule, Path(str(trainer.args.output_dir))
    last = team.everywhere(_last_whole(folder) if team.leads else None)
    if last is not None:
        check_same_way(Path(last), split=bool(trainer.args.fsdp), label=watch.label)
    trainer.train(resume_from_checkpoint=last)
    after = float(trainer.evaluate()["eval_loss"])
    taken, steps = int(trainer.state.global_step), int(trainer.state.max_steps)
    settled = schedule is None or schedule.settled(taken, steps)
    return Outcome(before, after, taken, watch.diverged, settled)


def _fitting(lesson: Lesson, plan: Plan, progress: Progress, label: str, team: Team) -> Fit:
    """Return how many rows of its share of a step fit at once into one process, and how they are passed."""
    longest = sorted(lesson.learned, key=lambda row: -sum(values.size for values in row.inputs.values()))[:2]

    def run(rows: Sequence[Batch]) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=plan.precision != "fp32"):  # nothing was moved yet
            return lesson.loss(collate(rows))

    dtype = torch.float16 if plan.precision == "fp16" else torch.bfloat16
    with lesson.ready(), trainable(lesson.student, plan):
        trained = sum(values.numel() for values in Weights(lesson.student, lesson.projections).trained().values())
        free = free_bytes(plan.device, lesson.student, lesson.teacher, sharing=team.local_size)
        if plan.memory is not None:
            free = plan.memory + COPIES * 4 * trained
        return fitting_rows(
            plan.batch_size // team.size, longest, run, trained, free, progress, label,
            blocks=blocks_in(lesson.student), checkpointing=plan.checkpointing,
        )  # fmt: skip


def judge(lesson: Lesson, plan: Plan, team: Team = ALONE) -> float:
    """Return the loss of a student as it is on the rows held back, the same in all processes."""
    folder = TemporaryDirectory(prefix="gossamer-judge-")
    computed = in_fp8(lesson.student) if plan.precision == "fp8" else nullcontext()  # as what it is compared with
    plan = replace(plan, micro_batch=plan.micro_batch or JUDGED_AT_ONCE)
    with folder, computed, lesson.ready(), quiet_transformers(), _quiet_trainer():
        arguments = _arguments(plan, len(lesson.learned), Path(folder.name), team)
        with _moved(arguments.device, lesson.student, lesson.teacher, lesson.projections):
            student = Weights(lesson.student, lesson.projections)
            # a Trainer of its own: one that has judged does not wrap for DDP
            return float(_Trainer(lesson, student, arguments, TrainerCallback(), plan).evaluate()["eval_loss"])


@contextmanager
def _moved(device: torch.device, *networks: nn.Module | None) -> Iterator[None]:
    """Have networks where they are trained while the `with` lasts, in main memory behind it."""
    for network in networks:
        if network is not None:
            network.to(device)
    try:
        yield
    finally:
        for network in networks:
            if network is not None:
                network.to("cpu")


def _last_whole(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end: its state comes last. Others behind it are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return str(path)
    return None


def _arguments(
    plan: Plan, num_rows: int, folder: Path, team: Team, splitting: Mapping[str, Any] | None = None
) -> TrainingArguments:
    share = rows_of_one(plan.batch_size, team, "a training")
    micro = max(size for size in range(1, share + 1) if share % size == 0 and size <= (plan.micro_batch or share))
    on_cpu = plan.device.type == "cpu"  # else transformers takes the GPU of this process's number, as ours is
    steps = math.ceil(num_rows / plan.batch_size)
    every = max(1, math.ceil(steps / EVALUATIONS))
    more: dict[str, Any] = {**(splitting or {}), **({"optim": EIGHT_BITS} if plan.optimizer == "adamw_8bit" else {})}
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=plan.rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(plan.warmup * steps * plan.epochs),
        weight_decay=plan.weight_decay,
        adam_epsilon=plan.smallest_root,
        bf16=plan.precision in ("bf16", "fp8"),  # what is not multiplied in FP8
        fp16=plan.precision == "fp16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and team.size > 1 else None,
        ddp_broadcast_buffers=False,  # no pass changes one
        seed=plan.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=False,
        **more,
    )


class _Trainer(Trainer):
    """Train on a lesson's loss."""

    def __init__(
        self, lesson: Lesson, student: nn.Module, arguments: TrainingArguments, watch: TrainerCallback, plan: Plan
    ) -> None:
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=Rows(lesson.learned, plan.batch_size),
            eval_dataset=Rows(lesson.judged, plan.batch_size),  # whole parts: no process judges others
            data_collator=collate,
            callbacks=[
                EarlyStoppingCallback(plan.patience),
                watch,
                *([Scheduled(lesson.schedule)] if lesson.schedule else []),
                *([ZerosStay(student)] if arguments.fsdp and plan.only is None else []),
            ],
        )
        self.remove_callback(PrinterCallback)
        self.lesson = lesson
        self.part = (-1, 0)  # of which step, and which of its parts wrote last
        self.model_accepts_loss_kwargs = False

    def create_accelerator_and_postprocess(self) -> None:
        """Make what passes and steps go through."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            allow(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; of split weights a checkpoint has them beside the optimizer's state already."""
        if not self.args.fsdp:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint; its folder is there before any process asks whether the best one's is."""
        if self.args.fsdp:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            Path(str(self.args.output_dir), folder).mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the lesson's loss."""
        del num_items_in_batch
        writes = self.lesson.on_policy
        if writes is not None and torch.is_grad_enabled() and writes.writes(self.state.global_step):
            loss = model(self._written(writes, inputs["rows"]), partial(self.lesson.loss, labelled=False))
        else:
            loss = model(inputs, self.lesson.loss)
        return (loss, {}) if return_outputs else loss

    def _written(self, writes: OnPolicy, rows: Sequence[Batch]) -> dict[str, Any]:
        """Return rows that the student wrote, where it is; each part of a step and each process has its own."""
        step = self.state.global_step
        self.part = (step, self.part[1] + 1 if self.part[0] == step else 0)
        draw = (step * MOST_PARTS + self.part[1]) * MOST_PARTS + self.args.process_index
        found: dict[str, Any] = self._prepare_inputs(collate(writes.written(self.lesson.student, rows, draw)))
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of rows held back."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach().mean(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return nothing: our own tables say what a pass takes."""
        del inputs
        return 0


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Keep the Trainer's own lines off the terminal: progress is ours to say."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
