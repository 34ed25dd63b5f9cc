"""`transformers.Trainer` on a lesson: its loss, its rows held back, its checkpoints, and what looks on meanwhile."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gossamer.run.team import Team
from gossamer.tasks.base import Batch
from gossamer.train.curve import Curve
from gossamer.train.gains import Judged, Patience
from gossamer.train.lesson import Lesson, Plan, rows_of_one
from gossamer.train.on_policy import OnPolicy
from gossamer.train.rows import Rows, collate
from gossamer.train.sharded import ZerosStay, allow
from gossamer.train.watch import Scheduled, Watch

EVALUATIONS = 4  # an epoch at least
PATIENT = 1 / 2  # of all looks: a schedule is not judged by its first steps, where the rate is high
EIGHT_BITS = "adamw_torch_8bit"  # as transformers names torchao's
MOST_PARTS = 1 << 12  # of a step, and processes: what is drawn has a number of its own in each


def arguments_of(
    plan: Plan, lesson: Lesson, folder: Path, team: Team, splitting: Mapping[str, Any] | None = None
) -> TrainingArguments:
    """Return what a Trainer is told of a plan. Raises TechniqueError where processes cannot share a step evenly."""
    share = rows_of_one(plan.batch_size, team, "a training")
    micro = max(size for size in range(1, share + 1) if share % size == 0 and size <= (plan.micro_batch or share))
    on_cpu = plan.device.type == "cpu"  # else transformers takes the GPU of this process's number, as ours is
    steps, every = _looks(plan, lesson)
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


def _looks(plan: Plan, lesson: Lesson) -> tuple[int, int]:
    """Return the steps of an epoch, and behind how many rows held back are looked at."""
    steps = math.ceil(len(lesson.learned) / plan.batch_size)
    return steps, max(1, math.ceil(steps / EVALUATIONS))


class LessonTrainer(Trainer):
    """Train on a lesson's loss."""

    def __init__(
        self,
        lesson: Lesson,
        student: nn.Module,
        arguments: TrainingArguments,
        plan: Plan,
        team: Team,
        watch: Watch | None = None,
    ) -> None:
        steps, every = _looks(plan, lesson)
        curve = (team.size, arguments.per_device_train_batch_size, plan.device.type)
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=Rows(lesson.learned, plan.batch_size),
            eval_dataset=Rows(lesson.judged, plan.batch_size),  # whole parts: no process judges others
            data_collator=collate,
            callbacks=[
                *([watch, Curve(Path(str(arguments.output_dir)), curve, watch.label)] if watch else []),
                *([Scheduled(lesson.schedule)] if lesson.schedule else []),
                *([ZerosStay(student)] if arguments.fsdp and plan.only is None else []),
            ],
        )
        self.remove_callback(PrinterCallback)
        self.lesson = lesson
        self.team = team
        self.patience = Patience(max(plan.patience, math.ceil(PATIENT * plan.epochs * steps / every)))
        self.looked: list[list[float]] = []  # losses of rows held back, of each mini-batch of this process
        self.found = Judged(math.nan, ())
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
        folder = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        folder.mkdir(parents=True, exist_ok=True)
        if self.team.leads:
            self.patience.write(folder)
        super()._save_checkpoint(model, trial)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Judge on the rows held back; end a training that gains nothing there."""
        self.looked = []
        metrics = super().evaluate(*args, **kwargs)
        in_turns = zip(*self.team.gathered(self.looked), strict=True)  # as mini-batches were dealt out to processes
        rows = chain.from_iterable(chain.from_iterable(in_turns))
        self.found = Judged(float(metrics["eval_loss"]), tuple(rows))
        if self.is_in_train and self.patience.is_over(self.found):
            self.control.should_training_stop = True
        return metrics

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
            losses = model(inputs, self.lesson.losses).float()
        self.looked.append(losses.tolist())
        return losses.mean(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return nothing: our own tables say what a pass takes."""
        del inputs
        return 0


@contextmanager
def quiet_trainer() -> Iterator[None]:
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
