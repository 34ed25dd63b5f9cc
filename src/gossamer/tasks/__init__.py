"""What a model is for. One file a task; `get_task` finds it by name."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from gossamer.errors import TaskError
from gossamer.tasks.base import Arrays, Batch, Evaluation, Metric, Scores, Task
from gossamer.tasks.causal_lm import CausalLM
from gossamer.tasks.image_classification import ImageClassification
from gossamer.tasks.speech_recognition import SpeechRecognition
from gossamer.tasks.text_classification import TextClassification

__all__ = ["TASKS", "Arrays", "Batch", "Evaluation", "Metric", "Scores", "Task", "get_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TextClassification, CausalLM, ImageClassification, SpeechRecognition)
}


def get_task(name: str, **settings: Any) -> Task:
    """Return the task of this name with its settings.

    Raises TaskError for an unknown task, an unknown setting, or a value that does not fit.

    >>> get_task("text-classification", max_length=128, latency_tokens=128)
    """
    found = TASKS.get(name)
    if found is None:
        raise TaskError(f"unknown task {name!r}", f"{_nearest(name, list(TASKS))}known tasks: {', '.join(TASKS)}")
    known = [field.name for field in fields(found)]  # type: ignore[arg-type]  # tasks are dataclasses
    for setting in settings:
        if setting not in known:
            listed = f"its settings: {', '.join(known)}" if known else "it has no settings"
            raise TaskError(f"{name} has no setting {setting!r}", f"{_nearest(setting, known)}{listed}")
    try:
        return found(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        raise TaskError(
            f"{name}: {where} {first['input']!r}: {first['msg']}", f"set {where} to a whole number"
        ) from error


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""
