"""What looks on at every step of a training: the schedule that changes the student, and the watch that may end it.

Behind the first ten steps it is told how long one takes, and the memory, beside what was predicted before.

A training ends when its loss is no number, or when the mean over RECENT steps is DIVERGED times what it was at first
and on the rows held back. (One step tells nothing: on rows that the original has learned by heart most losses are near
nothing, and one hard row is 25 times the others.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from gossamer.measure.memory import peak_bytes
from gossamer.run.atomic import readable_bytes
from gossamer.run.progress import Progress
from gossamer.train.lesson import Schedule

DIVERGED = 10.0  # times what it was: what the loss of a training that went wrong reaches
RECENT = 10
TIMED = 10  # steps behind which it is told what one takes


class Scheduled(TrainerCallback):
    """Let a schedule change the student; only what is settled is judged, so that nothing else is the best."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Change the student."""
        self.schedule.before_step(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the gradients."""
        self.schedule.before_update()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the weights that have moved."""
        self.schedule.after_update()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put judging off."""
        if not self.schedule.settled(state.global_step, state.max_steps):
            control.should_evaluate = False


class Watch(TrainerCallback):
    """Report steps, and end a training whose loss is no number or far above what it was."""

    def __init__(self, progress: Progress, label: str) -> None:
        self.progress, self.label = progress, label
        self.usual = 0.0
        self.losses: list[float] = []
        self.diverged = False
        self._stage: Any = None
        self._advance: Callable[[float], None] = lambda units: None
        self._done = 0
        self._ends: list[float] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        self._stage = self.progress.stage(f"{self.label}: steps", state.max_steps)
        self._advance = self._stage.__enter__()
        self._done = 0
        self._ends = [time.perf_counter()]

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar on."""
        self._advance(state.global_step - self._done)
        self._done = state.global_step
        self._ends.append(time.perf_counter())
        left = state.max_steps - state.global_step
        if len(self._ends) == TIMED + 1 and left > TIMED:
            self._tell(left)

    def _tell(self, left: int) -> None:
        """Say what steps take, by those behind it."""
        seconds = median(b - a for a, b in pairwise(self._ends))
        held = f"this process took at most {readable_bytes(peak_bytes())} so far"
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            held += f", and {readable_bytes(torch.cuda.max_memory_allocated())} of the GPU"
        self.progress.say(
            f"{self.label}: a step takes {seconds:.2g} s by {TIMED} of them, the {left} that are left about "
            f"{seconds * left / 60:.1f} min; {held}"
        )

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Look at the loss."""
        told = {name: (logs or {}).get(name) for name in ("loss", "learning_rate", "eval_loss")}
        if values := {name: value for name, value in told.items() if value is not None}:
            self.progress.record(self.label, state.global_step, values)
        loss = told["loss"]
        if loss is None:
            return
        self.losses.append(loss)
        usual = max(self.usual, _mean(self.losses[: RECENT // 2]))
        recent = _mean(self.losses[-RECENT:])
        if not math.isfinite(loss) or (len(self.losses) > RECENT and recent > DIVERGED * usual):
            self.diverged = True
            control.should_training_stop = True
            self.progress.say(
                f"{self.label}: the loss is {recent:.3g} at step {state.global_step} where it was {usual:.3g}: "
                "stopped, the best weights so far are kept; a lower rate may do"
            )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self._stage is not None:
            self._stage.__exit__(None, None, None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
