"""`gossamer bench`: latency, throughput and memory of an artifact; of two, timed in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options
from gossamer.cli.console import Screen

if TYPE_CHECKING:
    from gossamer.plan.records import LatencyRecord


def bench(
    artifact: options.Artifact,
    against: Annotated[str | None, typer.Option(help="Another artifact, timed in turns with the first.")] = None,
    task: options.GuessedTask = None,
    runtime: options.GuessedRuntime = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the request, where the model reads text.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure each artifact.")] = 10.0,
    task_set: options.Settings = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Time an artifact in a process of its own: latency p50 p95 p99, throughput, peak memory."""
    settings = options.read_settings(task_set)
    screen = Screen(as_json=json, quiet=quiet)
    from gossamer import api
    from gossamer.cli.outcome import with_interval
    from gossamer.report.words import NONE, show, show_seconds

    with screen.progress() as progress:
        result = api.bench(
            artifact,
            against=against,
            task=task,
            runtime=runtime,
            tokens=tokens,
            seconds=seconds,
            task_settings=settings,
            threads=threads,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if screen.answer(result):
        return
    measured: list[tuple[str, LatencyRecord, int | None]] = [(artifact, result.a, result.memory_a)]
    if against is not None and result.b is not None:
        measured.append((against, result.b, result.memory_b))
    columns = ("artifact", "p50", "p95", "p99", "mean", "requests/s", "peak memory", "runs")
    rows = [
        (
            name,
            show_seconds(times.p50),
            show_seconds(times.p95),
            show_seconds(times.p99),
            show_seconds(times.mean),
            f"{times.throughput:.4g}",
            NONE if memory is None else show(memory, "B"),
            f"{len(times.samples)}",
        )
        for name, times, memory in measured
    ]
    screen.table(columns, rows, right=columns[1:], fold=("artifact",))
    if result.ratio is not None:
        screen.pairs([("latency of the first as a share of the other's, in pairs", with_interval(result.ratio))])
