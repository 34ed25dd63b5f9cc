"""What can be asked of files that exist: quality, speed, how two compare. Behind `eval`, `bench`, `compare`.

An artifact is a folder with our manifest, or a plain Hugging Face folder (served by PyTorch, as its owner runs it).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.data.columns import bind_columns
from gossamer.data.rows import read_rows
from gossamer.data.splits import row_key
from gossamer.errors import ArtifactError, DataError, TaskError
from gossamer.goal import Goal
from gossamer.judgement import judge, overall
from gossamer.measure.latency import time_in_turns
from gossamer.measure.machine import usable_cores
from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import paired_quality, score_interval
from gossamer.measure.types import Interval
from gossamer.models.source import Source
from gossamer.plan.job import pinned_cores
from gossamer.plan.original import latency_record, reported
from gossamer.plan.prepare import Rows, made_up_row
from gossamer.plan.records import Figure, Judged, LatencyRecord, Record, VerdictName
from gossamer.plan.search import as_record
from gossamer.run.progress import Progress
from gossamer.runtimes.manifest import artifact_files, check_files, read_manifest
from gossamer.runtimes.process import Served
from gossamer.tasks import get_task
from gossamer.tasks.base import Arrays, Batch, Evaluation, Task

TASK_OF_CLASS = {
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForImageClassification": "image-classification",
}
LENGTH_SETTINGS = {
    "text-classification": ("max_length", "latency_tokens"),
    "causal-lm": ("context", "latency_tokens"),
}


class EvalResult(Record):
    """Hold what `evaluate` found: the task's metric with its interval, over `rows` rows."""

    artifact: str
    runtime: str
    metric_name: str
    metric: Figure
    rows: int
    seconds: float


class BenchResult(Record):
    """Hold what `bench` found: one or two distributions in seconds, peak memory in bytes, the paired ratio a / b."""

    a: LatencyRecord
    memory_a: int
    b: LatencyRecord | None = None
    memory_b: int | None = None
    ratio: Figure | None = None


class CompareResult(Record):
    """Hold what `compare` found of A against B on the same rows."""

    verdict: VerdictName
    goal: str
    judgements: tuple[Judged, ...]
    metric_name: str
    metric_a: Figure
    metric_b: Figure
    quality: Figure
    agreement: Figure
    kl: Figure
    latency_ratio: Figure
    size_ratio: Figure
    rows: int


@dataclass(frozen=True)
class Artifact:
    """Hold an artifact that was recognised: where it lies, what serves it, and the task it is for."""

    folder: Path
    runtime: str
    task: Task
    task_settings: Mapping[str, Any]
    source: Source  # its config, labels and tokenizer; the weights are the runtime's

    def serve(self, threads: int) -> Served:
        """Open it in a child process of its own."""
        return Served(
            self.runtime,
            self.folder,
            threads=threads,
            task_name=self.task.name,
            task_settings=self.task_settings,
            cpus=pinned_cores(threads),
        )


def open_artifact(
    folder: str | Path,
    *,
    task: str | None = None,
    runtime: str | None = None,
    task_settings: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Return the artifact in a folder; what is not given is read from its manifest or guessed from its config.

    Raises ArtifactError for a folder whose files were changed after they were proven, TaskError when nothing says what
    the model is for.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ArtifactError(
            f"{path} is not a folder", "name the folder that `gossamer optimize` wrote, or a model folder"
        )
    manifest = read_manifest(path)
    if manifest is not None:
        check_files(path, manifest)
        settings = {**manifest.task_settings, **(task_settings or {})}
        source = Source.companions(path, trust_remote_code=trust_remote_code)
        name = task or manifest.task
        return Artifact(path, runtime or manifest.runtime, get_task(name, **settings), settings, source)
    source = Source.open(path, trust_remote_code=trust_remote_code)
    settings = dict(task_settings or {})
    name = task or guessed_task(source)
    return Artifact(path, runtime or "torch", get_task(name, **settings), settings, source)


def guessed_task(source: Source) -> str:
    """Return the task that the config's class names mean. Raises TaskError when they mean none of ours."""
    for architecture in source.architectures:
        for suffix, task in TASK_OF_CLASS.items():
            if architecture.endswith(suffix):
                return task
    raise TaskError(
        f"{source.name} does not say what it is for (architectures: {', '.join(source.architectures) or 'none'})",
        "name the task with --task",
    )


def read_batches(artifact: Artifact, data: Rows, columns: Mapping[str, str], num_rows: int | None) -> tuple[Batch, ...]:
    """Return the rows of some data as batches of one for this artifact's task."""
    skipped: list[str] | None = [] if artifact.task.leaves_out_empty else None
    rows = bind_columns(read_rows(data), artifact.task, columns, skipped=skipped)
    if num_rows is not None and num_rows < len(rows):
        rows = sorted(rows, key=row_key)[:num_rows]
    if len(rows) < 2:
        raise DataError(f"{len(rows)} rows are too few for an interval", "give at least 2 rows")
    return tuple(artifact.task.batches(rows, artifact.source, batch_size=1))


def evaluate_artifact(
    artifact: Artifact, data: Rows, columns: Mapping[str, str], num_rows: int | None, threads: int, progress: Progress
) -> EvalResult:
    """Return an artifact's score on some rows, with its interval."""
    began = time.monotonic()
    batches = read_batches(artifact, data, columns, num_rows)
    evaluation = _scored(artifact, batches, threads, progress, "scoring", None)
    interval = score_interval(evaluation.scores, artifact.task.metric.figure)
    return EvalResult(
        artifact=str(artifact.folder),
        runtime=artifact.runtime,
        metric_name=artifact.task.metric.name,
        metric=_figure(interval, artifact.task.metric.unit, artifact.task.metric.higher_is_better),
        rows=len(evaluation.scores.sums),
        seconds=round(time.monotonic() - began, 3),
    )


def bench_artifact(
    a: Artifact, b: Artifact | None, *, tokens: int, seconds: float, threads: int, progress: Progress
) -> BenchResult:
    """Return the latency and memory of one artifact, or of two timed in turns, on a request of `tokens` tokens."""
    inputs_a = made_up_request(a, tokens)
    with a.serve(threads) as first, progress.stage("timing", None):
        if b is None:
            alone = time_in_turns(first, None, inputs_a, None, budget_seconds=seconds)
            return BenchResult(a=latency_record(alone.a), memory_a=first.peak_memory())
        with b.serve(threads) as second:
            pair = time_in_turns(first, second, inputs_a, made_up_request(b, tokens), budget_seconds=2 * seconds)
            assert pair.b is not None
            return BenchResult(
                a=latency_record(pair.a),
                memory_a=first.peak_memory(),
                b=latency_record(pair.b),
                memory_b=second.peak_memory(),
                ratio=_figure(pair.ratio_of("p50")),
            )


def compare_artifacts(
    a: Artifact,
    b: Artifact,
    *,
    data: Rows,
    columns: Mapping[str, str],
    num_rows: int | None,
    goal: Goal,
    threads: int,
    seed: int,
    progress: Progress,
) -> CompareResult:
    """Return how A does against B on the same rows, in pairs, and whether A meets the goal with B as the original."""
    if a.task.name != b.task.name:
        raise TaskError(f"A is for {a.task.name}, B for {b.task.name}", "compare artifacts of one task")
    batches_a, batches_b = (read_batches(artifact, data, columns, num_rows) for artifact in (a, b))
    original = _scored(b, batches_b, threads, progress, "scoring B", None)
    candidate = _scored(a, batches_a, threads, progress, "scoring A", original)
    assert candidate.divergence is not None
    assert candidate.agreement is not None
    with a.serve(threads) as first, b.serve(threads) as second, progress.stage("timing in turns", None):
        pair = time_in_turns(first, second, a.task.latency_inputs(batches_a), b.task.latency_inputs(batches_b))
        memory = {"a": float(first.peak_memory()), "b": float(second.peak_memory())}
    assert pair.b is not None
    metric = a.task.metric
    metric_a, metric_b = (score_interval(found.scores, metric.figure) for found in (candidate, original))
    quality = _figure(paired_quality(candidate.scores, original.scores, metric, seed=seed), "", True)
    bytes_a, bytes_b = (shipped_bytes(_shipped(artifact)) for artifact in (a, b))
    figures = {
        "quality": _figure(metric_a),
        "quality ratio": quality,
        "size": Figure.exact(bytes_a, "B"),
        "memory": Figure.exact(memory["a"], "B"),
        "throughput": Figure.exact(pair.a.throughput, "1/s"),
    }
    originals = {"quality": metric_b.value, "size": float(bytes_b), "memory": memory["b"]}
    originals["throughput"] = pair.b.throughput
    for statistic in ("p50", "p95", "p99", "mean"):
        figures[f"latency {statistic}"] = _figure(pair.a.interval(statistic), "s")
        figures[f"latency {statistic} ratio"] = _figure(pair.ratio_of(statistic))
    judgements = judge(goal, figures, originals)
    return CompareResult(
        verdict=overall(judgements).value,
        goal=str(goal),
        judgements=tuple(as_record(judgement) for judgement in judgements),
        metric_name=metric.name,
        metric_a=_figure(metric_a, metric.unit, metric.higher_is_better),
        metric_b=_figure(metric_b, metric.unit, metric.higher_is_better),
        quality=quality,
        agreement=_figure(score_interval(candidate.agreement), "", True),
        kl=_figure(score_interval(candidate.divergence), "nats"),
        latency_ratio=figures["latency p50 ratio"],
        size_ratio=Figure.exact(bytes_a / bytes_b, ""),
        rows=len(candidate.scores.sums),
    )


def made_up_request(artifact: Artifact, tokens: int) -> Arrays:
    """Return one request of `tokens` tokens, or one noise image, made by the task itself from made-up content."""
    settings = dict(artifact.task_settings)
    for setting in LENGTH_SETTINGS.get(artifact.task.name, ()):
        settings[setting] = tokens
    task = get_task(artifact.task.name, **settings)
    row = made_up_row(2 * tokens if task.name in LENGTH_SETTINGS else task.made_up_words)
    return task.latency_inputs(task.batches([row], artifact.source, batch_size=1))


def default_threads(threads: int | None) -> int:
    """Return the number of threads to serve with: what was asked for, or every usable core."""
    return threads or usable_cores()


def _scored(
    artifact: Artifact,
    batches: Sequence[Batch],
    threads: int,
    progress: Progress,
    label: str,
    reference: Evaluation | None,
) -> Evaluation:
    with artifact.serve(threads) as served:
        return artifact.task.evaluate(reported(served.run_all, progress, label), batches, reference)


def _shipped(artifact: Artifact) -> list[Path]:
    """Return the files of an artifact, or of the user's own folder only those that belong to the model."""
    if read_manifest(artifact.folder) is not None:
        return artifact_files(artifact.folder)
    return artifact.source.shipped_files()


def _figure(interval: Interval, unit: str = "", higher_is_better: bool = False) -> Figure:
    return Figure(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        unit=unit,
        higher_is_better=higher_is_better,
    )
