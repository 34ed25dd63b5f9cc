"""`gossamer plan`: what each recipe would give, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options
from gossamer.cli.console import Screen
from gossamer.errors import GoalError

if TYPE_CHECKING:
    from gossamer.plan.records import PlanResult


def plan(
    model: options.Model,
    task: options.Task,
    data: options.Data,
    goal: options.PossibleGoal = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Plan this recipe (YAML) alone; without a goal nothing is measured but rates.")
    ] = None,
    evaluation: options.Evaluation = None,
    runtime: options.ChosenRuntime = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of a run that keeps what is measured, for optimize to go on from.")
    ] = None,
    column: options.Columns = None,
    task_set: options.Settings = None,
    memory: options.Memory = None,
    device: options.Device = "auto",
    calibration_rows: options.CalibrationRows = 128,
    eval_rows: options.EvaluationRows = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    time: options.Time = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Predict what every recipe brings and takes, most promising first: quality, size, latency; memory, disk, time."""
    if goal is None and recipe is None:
        raise GoalError("a plan needs a goal or a recipe", 'give --goal "quality >= 99%, size <= 30%" or --recipe FILE')
    if goal is not None:
        options.check_goal(goal)
    columns, settings, budget = options.read_columns(column), options.read_settings(task_set), options.read_time(time)
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer import api

    with screen.progress() as progress:
        result = api.plan(
            model,
            task=task,
            data=data,
            goal=goal,
            recipe=recipe,
            evaluation=evaluation,
            runtime=runtime,
            out=out,
            task_settings=settings,
            columns=columns,
            seed=seed,
            threads=threads,
            memory=options.read_memory(memory),
            device=device,
            calibration_rows=calibration_rows,
            evaluation_rows=eval_rows,
            trust_remote_code=trust_remote_code,
            time_budget=budget,
            progress=progress,
        )
    if not screen.answer(result):
        _show(screen, result)


def _show(screen: Screen, result: PlanResult) -> None:
    """Write a plan for a person: the goal, the original, every recipe's prediction, what the first one takes."""
    from gossamer.cli.outcome import show_original, show_predictions
    from gossamer.cli.spending import show_forecast

    if result.original is not None:
        screen.line("goal", style="bold")
        for sentence in result.goal_in_words:
            screen.line(f"  {sentence}")
        screen.heading("the original, in PyTorch on this machine")
        show_original(screen, result.original)
        screen.heading("predicted, most promising first; % is of the original")
        show_predictions(screen, result.candidates, result.original)
    if result.candidates:
        show_forecast(screen, result.candidates[0])
    if result.calibration:
        screen.heading("calibration rows")
        for sentence in result.calibration:
            screen.line(sentence)
    for note in result.notes:
        screen.line(f"note: {note}")
