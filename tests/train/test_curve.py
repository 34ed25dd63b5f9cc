"""A training goes on along the curve that it had, or says that it does not; out of memory, in smaller parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from gossamer.errors import TechniqueError
from gossamer.run.progress import Silent
from gossamer.run.team import Team
from gossamer.train import loop
from gossamer.train.curve import FILE, Curve
from gossamer.train.lesson import Lesson, Plan
from gossamer.train.loop import train
from gossamer.train.objectives import Seen


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def told(folder: Path, began: int, losses: dict[int, float], parts: tuple[int, int, str] = (1, 4, "cpu")) -> None:
    curve, control = Curve(folder, parts, "distill"), TrainerControl()
    state = TrainerState(global_step=began, is_world_process_zero=True)
    curve.on_train_begin(None, state, control)
    for step, loss in losses.items():
        state.global_step = step
        curve.on_log(None, state, control, logs={"loss": loss})
        curve.on_log(None, state, control, logs={"eval_loss": 9.0})


def test_the_first_step_that_is_taken_again_tells_the_same(tmp_path: Path) -> None:
    told(tmp_path, 0, {1: 0.9, 2: 0.8, 3: 0.7})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # killed
    told(tmp_path, 1, {2: 0.80000001, 3: 0.6})  # behind the first it may drift
    with pytest.raises(TechniqueError, match=r"and was 0\.6"):  # what was told behind a torn line is known
        told(tmp_path, 2, {3: 0.7})
    told(tmp_path, 1, {2: 0.81}, parts=(2, 2, "cpu"))
    told(tmp_path, 0, {1: 0.5})  # begun anew
    with pytest.raises(
        TechniqueError, match=r"distill does not go on as it began: the loss of step 2 is 0\.9, and was"
    ):
        told(tmp_path, 1, {2: 0.9}, parts=(2, 2, "cpu"))
    with pytest.raises(TechniqueError, match=r"and was 0\.81"):
        told(tmp_path, 1, {2: float("nan")})


class Killed(Exception):
    pass


class Deadly(Silent):
    """End at a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def record(self, series: str, step: int, values: Any) -> None:
        if step >= self.step and "loss" in values:
            raise Killed


def test_a_training_that_goes_on_from_what_it_was_not_is_stopped(
    tmp_path: Path, make_lesson: Callable[[], Lesson], plan: Plan
) -> None:
    folder = tmp_path / "checkpoints"
    whole = make_lesson()
    outcome = train(whole, plan, tmp_path / "whole", Silent(), label="distill")
    asked = make_lesson()
    start = {name: values.clone() for name, values in asked.student.named_parameters()}
    with pytest.raises(Killed):
        train(asked, plan, folder, Deadly(6), label="distill")
    assert all(torch.equal(values, start[name]) for name, values in asked.student.named_parameters())
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert [entry["step"] for entry in lines] == list(range(1, len(lines) + 1))
    other = make_lesson()
    other.learned = list(reversed(other.learned))
    with pytest.raises(TechniqueError, match="does not go on as it began"):
        train(other, plan, folder, Silent(), label="distill")
    again = make_lesson()
    killed_later = train(again, plan, folder, Silent(), label="distill")
    assert killed_later == outcome
    for (name, values), (_, others) in zip(
        whole.student.named_parameters(), again.student.named_parameters(), strict=True
    ):
        assert torch.equal(values, others), name


class Greedy:
    """Ask for more memory than there is, behind so many passes, where more than so many rows come at once."""

    needs_teacher = False
    needs_hidden = False

    def __init__(self, rows: int, calls: int = 0) -> None:
        self.rows, self.calls = rows, calls
        self.seen: list[int] = []

    def __call__(self, seen: Seen) -> Tensor:
        self.seen.append(len(seen.rows))
        if torch.is_grad_enabled() and len(seen.rows) > self.rows and len(self.seen) > self.calls:
            torch.empty(1 << 50)
        return seen.student.float().square().mean()


@pytest.mark.parametrize("calls", [0, 15])
def test_out_of_memory_it_goes_on_with_fewer_rows_at_once(
    tmp_path: Path, make_lesson: Callable[[], Lesson], plan: Plan, calls: int
) -> None:
    said, asked, greedy = Said(), make_lesson(), Greedy(2, calls)
    asked.objectives = [(1.0, greedy)]
    outcome = train(asked, plan, tmp_path / "checkpoints", said, label="distill")
    assert [line for line in said.lines if "out of memory" in line] == [
        "distill: out of memory with 4 rows at a time: goes on with 2 at a time, steps of 8 as ever"
    ]
    assert outcome.better
    assert outcome.steps == 10
    plain = make_lesson()
    plain.objectives = [(1.0, Greedy(8))]
    assert train(plain, plan, tmp_path / "plain", Silent(), label="distill").after == pytest.approx(outcome.after, 1e-4)


def test_of_one_row_blocks_are_passed_again_and_then_there_is_nothing_left(
    tmp_path: Path, make_lesson: Callable[[], Lesson], plan: Plan
) -> None:
    said, asked = Said(), make_lesson()
    asked.objectives = [(1.0, Greedy(0))]
    plan = replace(plan, micro_batch=1, checkpointing=None)
    with pytest.raises(TechniqueError, match=r"distill ran out of memory with 1 rows at a time: .*allocate memory"):
        train(asked, plan, tmp_path / "checkpoints", said, label="distill")
    assert "blocks passed again on the way back" in said.lines[-1]


def test_several_processes_end_and_go_on_with_less(tmp_path: Path, plan: Plan) -> None:
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    team, watch = Team(rank=1, size=2), loop.Watch(Silent(), "distill")
    with pytest.raises(TechniqueError, match="ran out of memory with 4 rows at a time") as raised:
        loop._in_smaller_parts(plan, error, tmp_path, watch, team, may_pass_again=False)
    assert "goes on with 2 at a time" in raised.value.hint
    assert loop.remembered(tmp_path, lambda: pytest.fail("asked anew")) == loop.Fit(2)
