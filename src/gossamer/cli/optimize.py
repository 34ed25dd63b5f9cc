"""`gossamer optimize`: from a goal to a smaller model that is proven to meet it."""

from __future__ import annotations

from pathlib import Path

import typer

from gossamer.cli import options
from gossamer.cli.console import Screen


def optimize(
    model: options.Model,
    task: options.Task,
    data: options.Data,
    goal: options.Goal,
    evaluation: options.Evaluation = None,
    runtime: options.ChosenRuntime = None,
    out: options.Out = Path("build"),
    fresh: options.Fresh = False,
    column: options.Columns = None,
    task_set: options.Settings = None,
    memory: options.Memory = None,
    device: options.Device = "auto",
    calibration_rows: options.CalibrationRows = 128,
    eval_rows: options.EvaluationRows = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    max_candidates: options.MaxCandidates = 8,
    time: options.Time = None,
    track: options.Track = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a model smaller and faster until a goal is proven; the same command resumes.

    Exit status: 0 when the goal is met, 2 when it is not or cannot be decided.
    """
    options.check_goal(goal)
    columns, settings, budget = options.read_columns(column), options.read_settings(task_set), options.read_time(time)
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer import api
    from gossamer.cli.outcome import show_run, status_of

    with screen.progress() as progress:
        result = api.optimize(
            model,
            task=task,
            data=data,
            goal=goal,
            evaluation=evaluation,
            runtime=runtime,
            out=out,
            fresh=fresh,
            max_candidates=max_candidates,
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
            time_budget=budget,
            progress=progress,
        )
        page = api.report(out)
    if not screen.answer(result):
        show_run(screen, result, page)
    raise typer.Exit(status_of(result.verdict))
