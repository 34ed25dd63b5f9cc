"""`gossamer apply`: one explicit recipe, carried out and proven."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli import options
from gossamer.cli.console import Screen
from gossamer.run.team import started_rank


def apply(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.", show_default=False)],
    model: options.Model,
    out: options.Out,
    task: options.GuessedTask = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to calibrate and prove with, where the recipe or the proof needs them.")
    ] = None,
    evaluation: options.Evaluation = None,
    goal: Annotated[str | None, typer.Option(help="What must hold; without it the result is only measured.")] = None,
    runtime: options.Runtime = "torch",
    fresh: options.Fresh = False,
    column: options.Columns = None,
    task_set: options.Settings = None,
    memory: options.Memory = None,
    device: options.Device = "auto",
    calibration_rows: options.CalibrationRows = 128,
    eval_rows: options.EvaluationRows = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    track: options.Track = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Carry out one recipe, re-open what was written, and prove what it does."""
    if goal is not None:
        options.check_goal(goal)
    columns, settings = options.read_columns(column), options.read_settings(task_set)
    leads = started_rank() == 0
    screen = Screen(as_json=json, quiet=quiet or not leads)
    from gossamer import api
    from gossamer.cli.outcome import show_run, status_of

    with screen.progress() as progress:
        result = api.apply(
            recipe,
            model,
            task=task,
            data=data,
            evaluation=evaluation,
            goal=goal,
            runtime=runtime,
            out=out,
            fresh=fresh,
            task_settings=settings,
            columns=columns,
            seed=seed,
            threads=threads,
            memory=options.read_memory(memory),
            device=device,
            calibration_rows=calibration_rows,
            evaluation_rows=eval_rows,
            trust_remote_code=trust_remote_code,
            track=options.read_names(track),
            progress=progress,
        )
        page = api.report(out) if leads else None
    if page is not None and not screen.answer(result):
        show_run(screen, result, page)
    raise typer.Exit(status_of(result.verdict))
