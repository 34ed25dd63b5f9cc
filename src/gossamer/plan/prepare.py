"""From what a user names (a model, files of rows, a task) to a job: rows read, split, turned into batches, hashed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from gossamer.data.checks import Finding, finding
from gossamer.data.columns import bind_columns
from gossamer.data.rows import read_rows
from gossamer.data.splits import loose_key, row_key, split_rows, without_overlap
from gossamer.errors import DataError, ModelError, RuntimeUnavailable
from gossamer.measure.machine import usable_cores
from gossamer.measure.memory import keep_nothing_large, release_unused
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Forward, Source
from gossamer.models.structure import map_model
from gossamer.plan.budget import GIB, memory_limit, streamed_budget, weights_budget, whole_bytes
from gossamer.plan.calibration import check_calibration, kept_apart
from gossamer.plan.job import Job, Rowset
from gossamer.plan.words import words_of
from gossamer.run.device import chosen_device
from gossamer.run.fingerprint import hash_json
from gossamer.run.progress import Progress, Silent
from gossamer.run.team import ALONE, Team
from gossamer.run.workspace import Run, read_identity
from gossamer.runtimes import get_runtime
from gossamer.tasks import get_task
from gossamer.tasks.base import Arrays, Batch, Row, Task

DEFAULT_RUNTIME, PIECE_BY_PIECE = "onnxruntime", "torch"
MIN_EVALUATION_ROWS = 8
MIN_SAMPLES = 2  # a task may make fewer samples than rows: long documents under a limit on tokens
STREAMED_WORDS = 20  # enough to see whether two compute the same, where each pass reads the model from disk
Rows = str | Path | list[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Hold what a verb was asked to work on, as the user named it."""

    model: str | Path | nn.Module
    task: str
    data: Rows | None  # None: nothing can be calibrated or scored, only written and checked
    evaluation: Rows | None = None
    runtime: str | None = None  # None: chosen for the model (`with_runtime`)
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    threads: int | None = None
    memory: int | None = None  # bytes that the run may take; None: what is free now
    device: str = "auto"  # where calibration and training compute: auto, cpu, cuda
    calibration_rows: int = 128
    evaluation_rows: int | None = None
    forward: Forward | None = None
    trust_remote_code: bool = False
    progress: Progress = field(default_factory=Silent)

    @property
    def runtime_name(self) -> str:
        """Return what will serve the model."""
        return self.runtime or DEFAULT_RUNTIME


@dataclass(frozen=True)
class Prepared:
    """Hold rows and hashes that a job needs, before a run folder is opened."""

    source: Source
    task: Task
    calibration: list[Row]
    evaluation: list[Row]
    prints: dict[str, str]
    names: dict[str, str]
    findings: tuple[Finding, ...] = ()
    others: list[Row] = field(default_factory=list)  # neither in `calibration` nor held out


def prepare(inputs: Inputs) -> Prepared:
    """Return the rows of a job, checked and split: calibration rows never occur among the evaluation rows.

    Without separate evaluation rows the data are split by content. Raises DataError, ModelError or TaskError.
    """
    chosen_device(inputs.device)  # told before anything is read
    source = Source.open(inputs.model, forward=inputs.forward, trust_remote_code=inputs.trust_remote_code)
    task = get_task(inputs.task, **inputs.task_settings)
    if inputs.data is None:
        return _without_rows(source, task)
    findings: list[Finding] = []
    rows, data_print, data_name = _read(inputs.data, task, inputs.columns, findings)
    if inputs.evaluation is None:
        parts = split_rows(rows, sizes={"test": 0.5, "calibration": min(inputs.calibration_rows, len(rows) // 4)})
        evaluation = parts.test
        eval_print, eval_name = data_print, f"{data_name} (held-out half)"
    else:
        evaluation, eval_print, eval_name = _read(inputs.evaluation, task, inputs.columns, [])
        free, dropped = without_overlap(rows, evaluation, key=loose_key)
        if dropped:
            inputs.progress.say(f"{dropped} rows of {data_name} also occur in {eval_name}: not used for calibration")
        if not free:
            raise DataError(
                f"all {len(rows)} rows of {data_name} also occur in {eval_name}", "give other rows with --data"
            )
        parts = split_rows(free, sizes={"calibration": min(inputs.calibration_rows, len(free))})
    if inputs.evaluation_rows is not None and inputs.evaluation_rows < len(evaluation):
        evaluation = sorted(evaluation, key=row_key)[: inputs.evaluation_rows]
    if len(evaluation) < MIN_EVALUATION_ROWS:
        raise DataError(
            f"{len(evaluation)} evaluation rows cannot support a verdict: at least {MIN_EVALUATION_ROWS} are needed",
            "give more rows with --eval",
        )
    calibration = kept_apart(parts.calibration, parts.train, evaluation, findings)
    taken = {id(row) for row in calibration}
    others = [row for row in parts.train if id(row) not in taken]
    prints = {
        "model": source.fingerprint,
        "data": data_print,
        "calibration": hash_json([row_key(row) for row in calibration]),
        "evaluation": hash_json([row_key(row) for row in evaluation]),
        "evaluation-file": eval_print,
        "training": hash_json([row_key(row) for row in others]),
    }
    names = {"data": data_name, "evaluation": eval_name}
    return Prepared(source, task, calibration, evaluation, prints, names, tuple(findings), others)


def with_runtime(inputs: Inputs, prepared: Prepared, out: Path | None) -> Inputs:
    """Return the inputs with a runtime: the one that was named, or the one that the run in `out` began with.

    Otherwise the usual one; for a model that its memory cannot hold whole the one that goes through it piece by piece.
    """
    if inputs.runtime is not None:
        return inputs
    if out is not None and (out / "run.json").exists():
        known = read_identity(out).get("runtime")
        return replace(inputs, runtime=known) if isinstance(known, str) else inputs
    needed, limit = whole_bytes(prepared.source), memory_limit(inputs.memory)
    if needed <= limit:
        return inputs
    inputs.progress.say(
        f"{prepared.source.name} needs about {needed / GIB:.1f} GiB to be opened whole, {limit / GIB:.1f} GiB may be "
        f"used: runtime {PIECE_BY_PIECE}, which goes through it piece by piece"
    )
    return replace(inputs, runtime=PIECE_BY_PIECE)


def _without_rows(source: Source, task: Task) -> Prepared:
    names = ("data", "calibration", "evaluation", "evaluation-file", "training")
    prints = {"model": source.fingerprint, **dict.fromkeys(names, "")}
    return Prepared(source, task, [], [], prints, {"data": "none", "evaluation": "none"})


def made_up_row(words: int) -> Row:
    """Return a row whose content means nothing: enough to trace a model, and to see whether two compute the same."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 255, (224, 224, 3), dtype=np.uint8)
    text = "the quick brown fox jumps over the lazy dog. " * (words // 9 + 1)
    hiss = {"array": random.standard_normal(16_000, dtype=np.float32) * 0.1, "sampling_rate": 16_000}
    return {"text": text, "image": Image.fromarray(noise), "audio": hiss}


def _read(rows: Rows, task: Task, columns: Mapping[str, str], findings: list[Finding]) -> tuple[list[Row], str, str]:
    """Return (bound rows, content hash, name for messages); rows that say nothing are left out where a task says so."""
    table = read_rows(rows)
    skipped: list[str] = []
    bound = bind_columns(table, task, columns, skipped=skipped if task.leaves_out_empty else None)
    if skipped:
        findings.append(finding("empty", "warning", skipped, len(table), "are empty and left out"))
    return bound, table.fingerprint, table.name


@contextmanager
def opened_job(inputs: Inputs, prepared: Prepared, run: Run, team: Team = ALONE) -> Iterator[Job]:
    """Yield the job over an opened run folder, with this process's threads set for its length.

    Processes that share this machine share its cores; what is served and timed has them all.
    """
    threads = inputs.threads or usable_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(inputs.threads or max(1, threads // team.local_size))
    try:
        task, source, runtime = prepared.task, prepared.source, get_runtime(inputs.runtime_name)
        budget = weights_budget(source, runtime, inputs.memory)
        calibration: tuple[Batch, ...] = ()
        if prepared.calibration:
            calibration = tuple(task.calibration(prepared.calibration, source, inputs.calibration_rows))
        words = task.made_up_words if budget is None else min(task.made_up_words, STREAMED_WORDS)
        judged = prepared.evaluation or [made_up_row(words)]
        evaluation = tuple(task.batches(judged, source, batch_size=1))
        num_samples = len({int(sample) for batch in evaluation for sample in batch.samples})
        if prepared.evaluation and num_samples < MIN_SAMPLES:
            raise DataError(
                f"{num_samples} evaluation samples cannot support a verdict: at least {MIN_SAMPLES} are needed",
                "raise max_tokens, or give more rows with --eval",
            )
        request = task.latency_inputs(evaluation)
        model = replace(_mapped(source, task, request, budget), words=words_of(prepared, inputs.progress))
        if (reason := runtime.refusal_together(model, {})) is not None:
            raise RuntimeUnavailable(f"{runtime.name} cannot hold {source.name}: {reason}", "use --runtime torch")
        findings = check_calibration(prepared, calibration, inputs.progress)
        job = Job(
            source=source,
            task=task,
            task_settings=dict(inputs.task_settings),
            runtime=runtime,
            run=run,
            progress=inputs.progress,
            model=model,
            calibration=calibration,
            evaluation=evaluation,
            latency_inputs=request,
            prints=prepared.prints,
            threads=threads,
            seed=inputs.seed,
            outputs=(task.output,),
            scored=bool(prepared.evaluation),
            budget=budget,
            memory=inputs.memory,
            team=team,
            device=chosen_device(inputs.device, team),
            findings=findings,
            rows=Rowset(prepared.calibration, inputs.calibration_rows, judged, prepared.others),
        )
        with closing(job.proved), closing(job.baseline):
            yield job
    finally:
        torch.set_num_threads(before)


def piece_by_piece(job: Job) -> Job | None:
    """Return a job over the same model, read piece by piece; None where model or runtime must be opened whole."""
    if job.budget is not None or job.source.shards is None or not job.runtime.streams:
        return None
    budget = streamed_budget(job.memory)
    try:
        model = replace(_mapped(job.source, job.task, job.latency_inputs, budget), words=job.model.words)
        return replace(job, budget=budget, model=model)
    except ModelError:  # batch norms, tensors of other names
        return None


def _mapped(source: Source, task: Task, request: Arrays, budget: int | None) -> ModelMap:
    example = {name: torch.from_numpy(values) for name, values in request.items()}
    if budget is None:
        return map_model(source.module(task), example, source.forward)
    keep_nothing_large()
    candidate = Candidate.streamed(source, source.skeleton(task), source.read, budget)
    found = map_model(candidate.module, example, source.forward, candidate.held)
    del candidate
    release_unused()  # what is resident from here on is what a forecast counts from
    return found


def identity(inputs: Inputs, prepared: Prepared, **more: Any) -> dict[str, Any]:
    """Return what a run folder is about; another identity is refused."""
    from gossamer import __version__

    return {
        "model": prepared.prints["model"],
        "data": prepared.prints["data"],
        "evaluation": prepared.prints["evaluation-file"],
        "rows": [len(prepared.calibration), len(prepared.evaluation)],
        "task": inputs.task,
        "task settings": dict(inputs.task_settings),
        "runtime": inputs.runtime_name,
        "seed": inputs.seed,
        "version": __version__,
        **more,
    }
