"""How fast this machine is at what a run consists of, measured on the model itself, kept in the run folder.

    opening, one pass, scoring one batch     the original in this process, on rows of the job
    multiplying                              float32 matrices, as solvers do
    training                                 one step forward and back on a mini-batch, where a recipe trains
    writing                                  a file, flushed to disk

Of a model that is read piece by piece one pass reads every weight from disk; what is left of it when the
multiplications are taken off is the reading.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.measure.machine import multiplies_bf16
from gossamer.measure.memory import release_unused, resident_bytes
from gossamer.models.attention import fused_attention
from gossamer.models.candidate import Candidate
from gossamer.models.walker import block_keys
from gossamer.plan.job import Job
from gossamer.plan.records import Record
from gossamer.run.device import CPU
from gossamer.tasks.base import Arrays, Batch, spread

NUM_BATCHES = 3  # that are scored, the first to warm up
AGAIN, AGAIN_SECONDS = 4, 2.0  # times that each is, while they are short: what disturbs one pass must not decide
MATRIX, REPEATS = 768, 8
WRITTEN_BYTES = 16 << 20
TIMED_STEPS, TIMED_ROWS = 3, 16
SHARE_TIMED = 0.25  # of the memory that is free may be taken for timing a step
STEP_PASSES = 3  # forward, and twice that back


class Rates(Record):
    """Hold seconds by kind of work, and what this process takes without a model.

    `pass_seconds` and `score_seconds` are for one value of a batch's first input (a token), as are the bytes:
    `output_bytes` of what a pass gives, `kept_bytes` of what is kept of the original's scores, `block_bytes` of what a
    block gives, `call_bytes` of what it is called with. `read_seconds` is what reading all weights takes for each pass
    over a model that does not fit, `macs_per_second` of float32 matrices.
    """

    base_bytes: int
    open_seconds: float
    read_seconds: float
    pass_seconds: float
    score_seconds: float
    output_bytes: float
    kept_bytes: float
    block_bytes: float
    call_bytes: float
    macs_per_second: float
    bytes_per_second: float


class TrainingRate(Record):
    """Hold what one training pass takes for one value of a first input.

    `seconds`: of one pass, a step forward and back taking three; `kept_bytes`: kept for the way back, and `again_bytes`
    where blocks are passed again on it.
    """

    seconds: float
    kept_bytes: float
    again_bytes: float


def measured_rates(job: Job) -> Rates:
    """Return the rates of this machine for a job; measured once for each run folder."""

    def build(folder: Path) -> dict[str, Any]:
        with job.progress.stage("how fast this machine is", None):
            return _measure(job, folder).model_dump(mode="json")

    inputs = job.step_inputs(threads=job.threads, streamed=job.budget is not None, rows=job.prints["evaluation"])
    return Rates.model_validate(job.run.step("rates", inputs, build).value)


def _measure(job: Job, folder: Path) -> Rates:
    release_unused()
    base = resident_bytes()
    began = time.perf_counter()
    candidate = job.candidate()
    opened = time.perf_counter() - began
    macs = multiplications_per_second()
    of_batches = _of_batches(job, candidate, macs)
    del candidate
    release_unused()
    return Rates(
        base_bytes=base,
        open_seconds=opened,
        macs_per_second=macs,
        bytes_per_second=bytes_per_second(folder),
        **of_batches,
    )


def training_rate(job: Job) -> TrainingRate:
    """Return what a training pass takes for one value of a first input.

    Measured once for each run folder, on calibration rows, in the precision that training has here.
    """

    def build(_: Path) -> dict[str, Any]:
        with job.progress.stage("how fast it trains", None):
            return _time_training(job).model_dump(mode="json")

    inputs = job.step_inputs(threads=job.threads, rows=job.prints["calibration"])
    return TrainingRate.model_validate(job.run.step("training-rate", inputs, build).value)


def _time_training(job: Job) -> TrainingRate:
    from gossamer.train.fitting import free_bytes, kept  # what trains is imported where something trains
    from gossamer.train.passes import blocks_in
    from gossamer.train.rows import collate, parts_of

    candidate, found = job.candidate(), []
    candidate.module.requires_grad_(True)

    def losses(rows: Sequence[Batch]) -> Iterator[Tensor]:
        for inputs, _ in parts_of(collate(rows)):
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
                outputs = candidate.source.forward(candidate.module, inputs, job.task.output)
            yield outputs.float().square().mean()

    with fused_attention(candidate.module):
        longest = max(job.calibration, key=lambda row: values_of([row]))
        each = kept(lambda: next(losses([longest])), blocks_in(candidate.module))
        together = max(1, min(TIMED_ROWS, int(SHARE_TIMED * free_bytes(CPU) / max(1, each.all))))
        for number in range(TIMED_STEPS):
            rows = [job.calibration[(number * together + i) % len(job.calibration)] for i in range(together)]
            began = time.perf_counter()
            for loss in losses(rows):
                torch.autograd.backward(loss)
            candidate.module.zero_grad()
            found.append((time.perf_counter() - began) / values_of(rows))
    values = values_of([longest])
    seconds = min(found) / STEP_PASSES
    return TrainingRate(seconds=seconds, kept_bytes=each.all / values, again_bytes=each.again / values)


def values_of(batches: Sequence[Batch]) -> int:
    """Return how many values the first inputs of some batches hold: what the time of a pass grows with."""
    return sum(next(iter(batch.inputs.values())).size for batch in batches)


def _of_batches(job: Job, candidate: Candidate, macs_per_second: float) -> dict[str, float]:
    """Return the rates that are found by running and scoring a few batches of the job's own rows."""
    passing, scoring, given, kept, between = [], [], [], [], _Between()
    for batch in spread(job.evaluation, NUM_BATCHES if job.budget is None else 1):
        spent, size = 0.0, values_of([batch])

        def run_all(passes: Sequence[Arrays], size: int = size) -> Iterator[Arrays]:
            nonlocal spent
            for inputs in passes:
                began = time.perf_counter()
                (outputs,) = job.computed(candidate, [inputs])
                spent += time.perf_counter() - began
                given.append(sum(values.nbytes for values in outputs.values()) / size)
                yield outputs

        started = time.perf_counter()
        for number in range(AGAIN):
            if number and time.perf_counter() - started > AGAIN_SECONDS:
                break
            spent, began = 0.0, time.perf_counter()
            with between.watching(candidate.module, [stack.name for stack in job.model.stacks], size):
                if job.scored:
                    found = job.task.evaluate(run_all, [batch])
                    kept.append(sum(values.nbytes for values in found.kept.values()) / size)
                else:
                    list(run_all([batch.inputs]))
            whole = time.perf_counter() - began
            passing.append(spent / size)
            scoring.append((whole - spent) / size)
    seconds, reading = min(passing[1:] or passing), 0.0
    if job.budget is not None:
        request = next(iter(job.latency_inputs.values())).size
        reading, seconds = seconds * size, job.model.macs / max(1, request) / macs_per_second
        reading = max(0.0, reading - seconds * size)
    return {
        "pass_seconds": seconds,
        "score_seconds": min(scoring[1:] or scoring),
        "read_seconds": reading,
        "output_bytes": max(given),
        "kept_bytes": max(kept, default=0.0),
        "block_bytes": between.given,
        "call_bytes": between.taken,
    }


@dataclass
class _Between:
    """Note the bytes of what blocks are called with besides hidden states and of what they give, for each value."""

    taken: float = 0.0
    given: float = 0.0

    @contextmanager
    def watching(self, module: nn.Module, stacks: Sequence[str], size: int) -> Iterator[None]:
        """Watch the first block of each stack while the `with` lasts."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.given = max(self.given, _tensor_bytes(output) / size)
            self.taken = max(self.taken, (_tensor_bytes((args, kwargs)) - _tensor_bytes(args[:1])) / size)

        with ExitStack() as hooks:
            for name in stacks:
                container = module.get_submodule(name)
                block = container.get_submodule(block_keys(container)[0])
                hooks.callback(block.register_forward_hook(note, with_kwargs=True).remove)
            yield


def _tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a nest of lists, tuples and mappings."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def multiplications_per_second() -> float:
    """Return how many multiply-accumulates of float32 matrices this process does in a second."""
    left, right = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    torch.mm(left, right)
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(left, right)
        found.append(time.perf_counter() - began)
    return MATRIX**3 / min(found)


def bytes_per_second(folder: Path) -> float:
    """Return how many bytes a second are written in a folder, flushed to disk; where little fits little is written."""
    count = min(WRITTEN_BYTES, shutil.disk_usage(folder).free // 8)
    path, content = folder / "written", os.urandom(max(1, count))
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return len(content) / seconds
