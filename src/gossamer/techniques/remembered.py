"""The original run once over all rows: its predictions are read from disk instead of running it again in each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context
from gossamer.train.lesson import Lesson, Precision
from gossamer.train.objectives import Logits
from gossamer.train.teacher_cache import CachedLogits, TeacherCache, print_of, write


class Remembered:
    """Remember what a lesson's teacher predicts of some rows, computed in a precision, by the step of that name."""

    def __init__(self, lesson: Lesson, rows: Sequence[Batch], precision: Precision, context: Context) -> None:
        assert lesson.teacher is not None
        self.lesson = lesson
        self.rows = self.read = rows
        self.precision = precision
        self.context = context
        self.teacher = lesson.teacher.to(context.device)

    def shape(self) -> torch.Size:
        """Return what is predicted of the first row: [1, classes], or [1, tokens, classes]."""
        with torch.no_grad():
            return self._predict({name: torch.from_numpy(v) for name, v in self.read[0].inputs.items()}).shape

    def in_its_own_tokens(self, teacher: nn.Module, read: Sequence[Batch]) -> None:
        """Have the teacher read the same rows in the tokens that it was trained on, where its student has fewer.

        For predictions of whole rows alone: those of tokens would have other places.
        """
        assert len(read) == len(self.rows)
        self.teacher, self.read = teacher.requires_grad_(False).to(self.context.device), read

    def follow(self, logits: Logits, label: str) -> None:
        """Have the lesson follow what is on disk; written first, once for each run folder."""
        context, lesson = self.context, self.lesson
        inputs: dict[str, Any] = {
            **context.identity, "read": print_of(self.read), "precision": self.precision,
            "top_k": logits.top_k, "temperature": logits.temperature,
        }  # fmt: skip

        def build(folder: Path) -> None:
            write(
                folder, self.read, self._predict, top_k=logits.top_k, temperature=logits.temperature,
                progress=context.progress, label=label,
            )  # fmt: skip

        if context.run is None:
            kept = TemporaryDirectory(prefix=f"gossamer-{label}-teacher-")
            lesson.kept.append(kept)
            folder = Path(kept.name)
            build(folder)
        else:
            found = context.run.step("teacher", inputs, build).folder if context.team.leads else None
            folder = Path(context.team.everywhere(None if found is None else str(found)))
        cached = CachedLogits(TeacherCache(folder, self.rows), logits.divergence, logits.temperature)
        lesson.objectives = [(weight, cached if one is logits else one) for weight, one in lesson.objectives]
        lesson.teacher, lesson.teacher_blocks = None, ()

    def _predict(self, inputs: dict[str, Tensor]) -> Tensor:
        device = self.context.device
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=self.precision != "fp32"):
            return self.lesson.forward(self.teacher, {name: values.to(device) for name, values in inputs.items()})
