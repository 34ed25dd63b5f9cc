"""`gossamer eval`: the quality of an artifact, with its interval."""

from __future__ import annotations

from gossamer.cli import options
from gossamer.cli.console import Screen


def evaluate(
    artifact: options.Artifact,
    data: options.ProofData,
    task: options.GuessedTask = None,
    runtime: options.GuessedRuntime = None,
    column: options.Columns = None,
    task_set: options.Settings = None,
    eval_rows: options.EvaluationRows = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score an artifact, opened in its own runtime, on labelled rows."""
    columns, settings = options.read_columns(column), options.read_settings(task_set)
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer import api
    from gossamer.report.words import show_duration, show_figure

    with screen.progress() as progress:
        result = api.evaluate(
            artifact,
            data=data,
            task=task,
            runtime=runtime,
            task_settings=settings,
            columns=columns,
            evaluation_rows=eval_rows,
            threads=threads,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not screen.answer(result):
        screen.pairs(
            [
                (result.metric_name, show_figure(result.metric)),
                ("rows", f"{result.rows}"),
                ("took", show_duration(result.seconds)),
            ]
        )
