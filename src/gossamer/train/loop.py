"""The one training loop: `transformers.Trainer`; its loss is a weighted sum of objectives, its model a candidate's.

Precision, accumulation, checkpoints, resuming, early stopping come from transformers and Accelerate, and so do several
processes: each takes its rows of every step, and gradients are averaged (DistributedDataParallel). Steps have the same
rows however many processes and parts they are cut into. Here are the loss, the teacher that runs beside, and what keeps
a run from ending worse than it began:

- what is not better on rows held back for certain is not kept (`gains.py`; a student that a schedule is still changing
  is not judged);
- a step that runs out of memory is taken again in smaller parts, from the last checkpoint on;
- a training that was killed goes on along the same curve, or not at all (`curve.py`);
- weights that are exactly zero stay so: an earlier step made them, and says so in the recipe;
- a loss that is no number, or far above what it was, ends the training, and the best checkpoint is kept (`watch.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME

from gossamer.errors import TechniqueError, first_line
from gossamer.models.config import quiet_transformers
from gossamer.run.progress import Progress
from gossamer.run.team import ALONE, Team
from gossamer.tasks.base import Batch
from gossamer.train.fitting import COPIES, Fit, fitting_rows, free_bytes, remember, remembered, smaller
from gossamer.train.gains import Judged
from gossamer.train.lesson import Lesson, Outcome, Plan
from gossamer.train.passes import blocks_in, check_passes, in_fp8, passing
from gossamer.train.rows import collate
from gossamer.train.sharded import check_same_way, split
from gossamer.train.trainer import LessonTrainer, arguments_of, quiet_trainer
from gossamer.train.watch import Watch
from gossamer.train.weights import Parts, Weights, trainable

JUDGED_AT_ONCE = 4  # rows


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
    watch, asked = Watch(progress, label), plan.checkpointing
    with quiet_transformers(), quiet_trainer():
        fit = remembered(folder, partial(_fitting, lesson, plan, progress, label, team), team)
        plan = replace(plan, micro_batch=fit.rows, checkpointing=fit.checkpointing)
        before = judged(lesson, plan, team)  # as it came, whatever a checkpoint brings
        watch.usual = before.loss
        run = _run_split if plan.sharded and team.size > 1 else _run
        outcome = None
        while outcome is None:
            try:
                outcome = run(lesson, plan, folder, watch, team, before)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                again = asked is None and bool(blocks_in(lesson.student))
                plan = _in_smaller_parts(plan, error, folder, watch, team, may_pass_again=again)
            if outcome is None:
                clear_device_cache(garbage_collection=True)  # what the error held
    if team.leads:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _in_smaller_parts(
    plan: Plan, error: RuntimeError, folder: Path, watch: Watch, team: Team, *, may_pass_again: bool
) -> Plan:
    """Return the plan of a training that ran out of memory with less at once, which is kept beside its checkpoints.

    Raises TechniqueError where there is no less, and of several processes, which do not know of each other's want.
    """
    now = f"{plan.micro_batch} rows at a time"
    fit = smaller(
        Fit(plan.micro_batch or 1, bool(plan.checkpointing)),
        plan.batch_size // team.size,
        may_pass_again=may_pass_again,
    )
    if fit is None:
        raise TechniqueError(
            f"{watch.label} ran out of memory with {now}: {first_line(error)}",
            "give shorter rows, or train fewer weights (lora)",
        ) from error
    remember(folder, fit)
    then = f"{fit.rows} at a time{', blocks passed again on the way back' if fit.checkpointing else ''}"
    if team.size > 1:
        raise TechniqueError(
            f"{watch.label} ran out of memory with {now}: {first_line(error)}",
            f"start it again (torchrun --max-restarts does): it goes on with {then}",
        ) from error
    watch.progress.say(
        f"{watch.label}: out of memory with {now}: goes on with {then}, steps of {plan.batch_size} as ever"
    )
    return replace(plan, micro_batch=fit.rows, checkpointing=fit.checkpointing)


def _run(lesson: Lesson, plan: Plan, folder: Path, watch: Watch, team: Team, before: Judged) -> Outcome:
    """Train the student as it is: with all of its weights in each process."""
    student, arguments = Weights(lesson.student, lesson.projections), arguments_of(plan, lesson, folder, team)
    networks = lesson.student, lesson.teacher, lesson.projections
    with passing(lesson, plan), lesson.ready(), _moved(arguments.device, *networks), trainable(lesson.student, plan):
        start = {name: values.detach().clone() for name, values in student.trained().items()}
        better = False
        try:
            outcome = _steps(LessonTrainer(lesson, student, arguments, plan, team, watch), watch, team, before)
            better = outcome.better
        finally:
            if not better:
                student.put(start)
    return outcome


def _run_split(lesson: Lesson, plan: Plan, folder: Path, watch: Watch, team: Team, before: Judged) -> Outcome:
    """Train a copy of the student of which each process holds a part."""
    with split(lesson, watch.label) as splitting:
        copied = splitting.lesson
        arguments = arguments_of(plan, lesson, folder, team, splitting.arguments)
        student = Parts(copied.student, copied.projections)
        teacher = lesson.teacher
        with passing(copied, plan), copied.ready(), _moved(arguments.device, teacher), trainable(copied.student, plan):
            outcome = _steps(LessonTrainer(copied, student, arguments, plan, team, watch), watch, team, before)
            if outcome.better:
                splitting.put_together(student)
    return outcome


def _steps(trainer: LessonTrainer, watch: Watch, team: Team, before: Judged) -> Outcome:
    """Take the steps, from the last checkpoint on where there is one; return what came of it."""
    schedule, folder = trainer.lesson.schedule, Path(str(trainer.args.output_dir))
    last = team.everywhere(_last_whole(folder) if team.leads else None)
    if last is not None:
        check_same_way(Path(last), split=bool(trainer.args.fsdp), label=watch.label)
        trainer.patience.read(Path(last))
    trainer.train(resume_from_checkpoint=last)
    trainer.evaluate()
    taken, steps = int(trainer.state.global_step), int(trainer.state.max_steps)
    settled = schedule is None or schedule.settled(taken, steps)
    after = trainer.found
    return Outcome(before.loss, after.loss, taken, watch.diverged, settled, after.gained_on(before))


def _fitting(lesson: Lesson, plan: Plan, progress: Progress, label: str, team: Team) -> Fit:
    """Return how many rows of its share of a step fit at once into one process, and how they are passed.

    Where it is said how many they are, so many: nothing is tried out.
    """
    if plan.micro_batch is not None:
        return Fit(plan.micro_batch, bool(plan.checkpointing))
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
    return judged(lesson, plan, team).loss


def judged(lesson: Lesson, plan: Plan, team: Team = ALONE) -> Judged:
    """Return the losses of a student as it is on the rows held back, the same in all processes."""
    folder = TemporaryDirectory(prefix="gossamer-judge-")
    computed = in_fp8(lesson.student) if plan.precision == "fp8" else nullcontext()  # as what it is compared with
    plan = replace(plan, micro_batch=plan.micro_batch or JUDGED_AT_ONCE)
    with folder, computed, lesson.ready(), quiet_transformers(), quiet_trainer():
        arguments = arguments_of(plan, lesson, Path(folder.name), team)
        with _moved(arguments.device, lesson.student, lesson.teacher, lesson.projections):
            student = Weights(lesson.student, lesson.projections)
            # a Trainer of its own: one that has judged does not wrap for DDP
            trainer = LessonTrainer(lesson, student, arguments, plan, team)
            trainer.evaluate()
            return trainer.found


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
