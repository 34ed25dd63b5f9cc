"""Tasks are found by name; what is misspelt gets a suggestion."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gossamer.errors import TaskError
from gossamer.tasks import TASKS, get_task


@pytest.mark.parametrize("name", list(TASKS))
def test_settings_are_frozen_and_json(name: str) -> None:
    task = get_task(name)
    settings = dataclasses.asdict(task)  # type: ignore[call-overload]
    assert get_task(name, **json.loads(json.dumps(settings))) == task
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.max_length = 3  # type: ignore[attr-defined]


def test_unknown_task_names_the_known() -> None:
    with pytest.raises(TaskError) as error:
        get_task("text-clasification")
    assert "did you mean 'text-classification'?" in error.value.hint
    assert "causal-lm" in error.value.hint


def test_unknown_setting_and_wrong_value() -> None:
    with pytest.raises(TaskError, match="no setting 'maxlength'") as error:
        get_task("text-classification", maxlength=3)
    assert "did you mean 'max_length'?" in error.value.hint
    with pytest.raises(TaskError, match="max_length 0"):
        get_task("text-classification", max_length=0)
    with pytest.raises(TaskError, match="context 'many'"):
        get_task("causal-lm", context="many")
