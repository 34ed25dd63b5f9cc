"""`gossamer compare`: two artifacts on the same rows, in pairs, and a verdict."""

from __future__ import annotations

from typing import Annotated

import typer

from gossamer.cli import options
from gossamer.cli.console import Screen


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The artifact that is judged.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.", show_default=False)],
    data: options.ProofData,
    goal: options.Goal = "quality >= 99%",
    task: options.GuessedTask = None,
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
    """Compare A with B sample by sample: score, agreement, divergence, latency, size.

    Exit status: 0 when A meets the goal against B, 2 when it does not or cannot be decided.
    """
    options.check_goal(goal)
    columns, settings = options.read_columns(column), options.read_settings(task_set)
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer import api
    from gossamer.cli.outcome import show_judgements, status_of, with_interval
    from gossamer.report.words import show_figure

    with screen.progress() as progress:
        result = api.compare(
            a,
            b,
            data=data,
            goal=goal,
            task=task,
            task_settings=settings,
            columns=columns,
            evaluation_rows=eval_rows,
            threads=threads,
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not screen.answer(result):
        screen.verdict(result.verdict, f"{a} against {b}")
        show_judgements(screen, result.judgements)
        screen.pairs(
            [
                (f"{result.metric_name} of A", show_figure(result.metric_a)),
                (f"{result.metric_name} of B", show_figure(result.metric_b)),
                ("quality kept, in pairs", with_interval(result.quality)),
                ("equal top choices", with_interval(result.agreement)),
                ("KL to B, nats", show_figure(result.kl)),
                ("latency of B's", with_interval(result.latency_ratio)),
                ("size of B's", with_interval(result.size_ratio)),
            ]
        )
    raise typer.Exit(status_of(result.verdict))
