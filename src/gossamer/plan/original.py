"""Measure the original: as its owner runs it today (PyTorch, float32), and unchanged in the runtime that will serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gossamer.measure.latency import time_in_turns
from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import score_interval
from gossamer.plan.job import Job, load_evaluation, save_evaluation
from gossamer.plan.records import Figure, LatencyRecord, Original
from gossamer.run.progress import Progress
from gossamer.runtimes import get_runtime
from gossamer.runtimes.manifest import artifact_files, copy_companions
from gossamer.runtimes.process import Served
from gossamer.tasks.base import Arrays, Evaluation, RunAll

ORIGINAL_RUNTIME = "torch"
EVALUATION = "evaluation.safetensors"
SCORING = "scoring the original"
UNTIMED: dict[str, Any] = {"latency": None, "memory": 0}
FEW_PASSES = 8  # a stage of fewer is over before its bar is read


def original_folder(job: Job) -> tuple[str, Path]:
    """Return (runtime, folder) that serve the original: the user's own folder, or an exported program of a module."""
    if job.source.path is not None:
        return ORIGINAL_RUNTIME, job.source.path

    def build(folder: Path) -> dict[str, Any]:
        runtime = get_runtime(ORIGINAL_RUNTIME)
        target = folder / "artifact"
        target.mkdir()
        runtime.write_original(job.source, target, job.request(runtime))
        return {}

    return ORIGINAL_RUNTIME, job.run.step("original-program", job.step_inputs(), build).folder / "artifact"


def score_original(job: Job) -> tuple[Evaluation | None, dict[str, Any]]:
    """Return the original's evaluation on the held-out rows (None when there are none), and {latency, memory}."""

    def build(step: Path) -> dict[str, Any]:
        measured = UNTIMED
        if job.budget is None:
            with baseline(job) as served:
                measured = _timed_and_weighed(job, served, "timing the original")
        if job.scored:
            save_evaluation(_scores(job), step / EVALUATION)
        return measured

    inputs = job.step_inputs(rows=job.prints["evaluation"], threads=job.threads)
    result = job.run.step("original", inputs, build)
    return load_evaluation(result.folder / EVALUATION) if job.scored else None, result.value


@contextmanager
def baseline(job: Job) -> Iterator[Served]:
    """Lend the original in a process that has only been timed; it stays open where it is small."""
    runtime, folder = original_folder(job)
    with job.baseline.out(folder, partial(job.serve, folder, runtime)) as served:
        yield served
    if not job.keeps_open:
        job.baseline.close()


def _scores(job: Job) -> Evaluation:
    """Return the original's evaluation: in this process, or in one of its own where it is read piece by piece."""
    if job.budget is None:
        run_all = reported(partial(job.computed, job.candidate()), job.progress, SCORING)
        return job.task.evaluate(run_all, job.evaluation)
    runtime, folder = original_folder(job)
    with job.serve(folder, runtime) as served:
        return job.task.evaluate(reported(served.run_all, job.progress, SCORING), job.evaluation)


def unchanged_artifact(job: Job) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the unchanged model in the serving runtime, and its {latency, memory, beside}.

    The two are timed in turns, as a candidate will be: what a prediction starts from is a share of the original's time,
    and of two that were timed one after the other it came out a sixth too small (docs/concepts/planner.md). Where the
    original itself is served by that runtime, its own figures are these.
    """

    def write(step: Path) -> dict[str, Any]:
        target = step / "artifact"
        target.mkdir()
        with job.progress.stage(f"exporting the original to {job.runtime.name}", None):
            job.runtime.write_original(job.source, target, job.request())
        copy_companions(job.source, target)  # a candidate ships them too: sizes are predicted from this folder's
        return {}

    def measure(step: Path) -> dict[str, Any]:
        label = f"timing the original in {job.runtime.name}, in turns with itself in PyTorch"
        with job.serve(folder) as served, baseline(job) as original:
            return _timed_and_weighed(job, served, label, beside=original)

    inputs = job.step_inputs(runtime=job.runtime.name)
    folder = job.run.step("unchanged", inputs, write).folder / "artifact"
    if job.runtime.name == ORIGINAL_RUNTIME:
        return folder, score_original(job)[1]
    timed = {**inputs, "threads": job.threads, "in turns": True}
    return folder, job.run.step("unchanged-timed", timed, measure).value


def describe_original(job: Job) -> tuple[Original, Evaluation | None]:
    """Return the record of the original together with its scores."""
    evaluation, measured = score_original(job)
    _, served_folder = original_folder(job)
    files = job.source.shipped_files() if job.source.path is not None else artifact_files(served_folder)
    if job.budget is not None:  # the folder itself is what would be written: it is not copied
        return Original(
            metric=metric_figure(job, evaluation) if evaluation is not None else None,
            size_bytes=shipped_bytes(files),
            num_parameters=job.model.num_parameters,
            macs=job.model.macs,
            latency=LatencyRecord.not_measured(),
            memory_bytes=0,
        ), evaluation
    folder, unchanged = unchanged_artifact(job)
    apart = job.runtime.name != ORIGINAL_RUNTIME
    record = Original(
        metric=metric_figure(job, evaluation) if evaluation is not None else None,
        size_bytes=shipped_bytes(files),
        num_parameters=job.model.num_parameters,
        macs=job.model.macs,
        latency=LatencyRecord.model_validate(unchanged.get("beside", measured["latency"])),
        memory_bytes=measured["memory"],
        same_runtime_latency=LatencyRecord.model_validate(unchanged["latency"]) if apart else None,
        same_runtime_bytes=shipped_bytes(artifact_files(folder)),
    )
    return record, evaluation


def metric_figure(job: Job, evaluation: Evaluation) -> Figure:
    """Return the task's own metric of an evaluation, with its interval."""
    metric = job.task.metric
    interval = score_interval(evaluation.scores, metric.figure)
    return Figure(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
    )


def _timed_and_weighed(job: Job, served: Served, label: str, beside: Served | None = None) -> dict[str, Any]:
    """Return {latency, memory} of one served artifact, as JSON, and the latency of what it was timed in turns with."""
    with job.progress.stage(label, None):
        found = time_in_turns(served, beside, job.latency_inputs, None)
    other = {"beside": latency_record(found.b).model_dump(mode="json")} if found.b is not None else {}
    return {"latency": latency_record(found.a).model_dump(mode="json"), "memory": served.peak_memory(), **other}


def latency_record(distribution: Any) -> LatencyRecord:
    """Return a measured distribution as the record that is kept."""
    return LatencyRecord(
        samples=tuple(float(seconds) for seconds in distribution.samples),
        p50=distribution.p50,
        p95=distribution.p95,
        p99=distribution.p99,
        mean=distribution.mean,
        throughput=distribution.throughput,
    )


def reported(run_all: RunAll, progress: Progress, label: str) -> RunAll:
    """Return a model that reports each pass as it is done; rounds of a few passes go by unmentioned."""

    def run(passes: Sequence[Arrays]) -> Iterator[Arrays]:
        if len(passes) < FEW_PASSES:
            yield from run_all(passes)
            return
        with progress.stage(label, len(passes)) as advance:
            for outputs in run_all(passes):
                yield outputs
                advance(1)

    return run
