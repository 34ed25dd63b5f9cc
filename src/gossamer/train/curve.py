"""The loss of every step on disk: a training that goes on from a checkpoint has to go on along the same curve.

The steps behind the checkpoint were taken before, by the run that was killed, and their losses told. The first that is
taken again must tell the same: otherwise weights, rows or the optimizer's state are not what they were, and what came
of it would be a training that began anew in silence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from gossamer.errors import TechniqueError

FILE = "losses.jsonl"
SAME = 1e-4  # by which it may differ: sums are made in the same order
IN_OTHER_PARTS = 0.05  # where rows are cut into other parts, shared by other processes, or passed elsewhere


class Curve(TrainerCallback):
    """Keep losses in a file, and compare the first one that is told again.

    `parts` says how a step's rows are divided and where they are passed: processes, rows of one pass, the device.
    Raises TechniqueError from a step whose loss is another than it was.
    """

    def __init__(self, folder: Path, parts: tuple[int, int, str], label: str) -> None:
        self.path = folder / FILE
        self.parts = list(parts)
        self.label = label
        self.known: dict[int, dict[str, Any]] = {}
        self.compared = 0  # the step that is

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read what was told before."""
        self.compared = state.global_step + 1
        told = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if told and not told.endswith("\n") and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")  # what comes next has a line of its own
        for line in told.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last one, of a run that was killed while it wrote
                continue
            self.known[entry["step"]] = entry

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Compare a loss with what it was, and keep it."""
        loss, step = (logs or {}).get("loss"), state.global_step
        if loss is None:
            return
        before = self.known.get(step) if step == self.compared and step > 1 else None
        if before is not None and math.isfinite(before["loss"]):
            allowed = SAME if before["parts"] == self.parts else IN_OTHER_PARTS
            if not abs(loss - before["loss"]) <= allowed * max(abs(before["loss"]), SAME):
                raise TechniqueError(
                    f"{self.label} does not go on as it began: the loss of step {step} is {loss:.6g}, and was "
                    f"{before['loss']:.6g}",
                    f"remove {self.path.parent} to begin the training anew",
                )
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss, "parts": self.parts}) + "\n")
