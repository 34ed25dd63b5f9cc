"""A job: one model, one task, one runtime, the rows to calibrate and to judge on, and the run folder that remembers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from gossamer.data.checks import Finding
from gossamer.models.blocks import find_stacks
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.walker import Walker
from gossamer.plan.calibration import apart
from gossamer.plan.lending import Lent
from gossamer.run.device import CPU
from gossamer.run.progress import Progress
from gossamer.run.team import ALONE, Team
from gossamer.run.workspace import Run
from gossamer.runtimes.base import ExportRequest, Runtime
from gossamer.runtimes.process import Served
from gossamer.tasks.base import Arrays, Batch, Evaluation, Row, Scores, Task, spread

KEPT_OPEN = 1 << 30  # bytes of what stays open while others are made or timed
STREAMED_TIMEOUT = 24 * 3600.0  # one answer may mean reading a whole model from disk


@dataclass(frozen=True)
class Rowset:
    """Hold the rows that batches are made of: those to calibrate with, how many inputs they make, those to judge by,
    and those that are left to learn from."""

    calibration: Sequence[Row] = ()
    num_inputs: int = 0
    evaluation: Sequence[Row] = ()
    others: Sequence[Row] = ()


@dataclass(frozen=True)
class Job:
    """Hold everything that the planner and the proof work on.

    `calibration` are batches that techniques may look at, `evaluation` the held-out ones that the verdict rests on;
    `latency_inputs` is the request whose time is the latency. `prints` are content hashes that steps are keyed by.
    """

    source: Source
    task: Task
    task_settings: Mapping[str, Any]
    runtime: Runtime
    run: Run
    progress: Progress
    model: ModelMap
    calibration: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]
    latency_inputs: Arrays
    prints: Mapping[str, str]
    threads: int
    seed: int = 0
    outputs: tuple[str, ...] = field(default=("logits",))
    scored: bool = True  # False: `evaluation` is made up, fit for checking outputs but not for quality
    memory: int | None = None  # bytes that the run may take, when the user set a limit
    budget: int | None = None  # bytes of weights that may be in memory; None: whole models are opened
    team: Team = ALONE  # the processes that carry out this job together
    device: torch.device = CPU  # where calibration and training compute
    findings: tuple[Finding, ...] = ()  # about the calibration rows
    rows: Rowset = field(default_factory=Rowset)
    proved: Lent = field(default_factory=Lent)  # the artifact whose files are judged
    baseline: Lent = field(default_factory=Lent)  # the original, which is timed in turns with each candidate

    @property
    def profiled(self) -> tuple[Batch, ...]:
        """Return the calibration batches on which the effects of steps are measured."""
        return tuple(spread(self.calibration, self.task.profile_samples))

    @cached_property
    def training(self) -> tuple[Batch, ...]:
        """Return the rows to learn from as batches of one row: none of them says what an evaluation row says.

        They are made as those that calibrate are: a bound on what is scored does not bound what is learned from.
        """
        rows = apart(self.rows.others, self.rows.evaluation)
        return tuple(self.task.calibration(rows, self.source, sys.maxsize)) if rows else ()

    def request(self, runtime: Runtime | None = None) -> ExportRequest:
        """Return what a runtime needs to write an artifact of this job's model."""
        runtime = runtime or self.runtime
        return ExportRequest(
            task=self.task,
            example=dict(self.evaluation[0].inputs),
            axes={name: self.task.input_axes.get(name, {0: "batch"}) for name in self.evaluation[0].inputs},
            outputs=self.outputs,
            cache=_made(self.run.cache / runtime.name),
        )

    def read_by(self, source: Source) -> Job:
        """Return the job with its rows in the tokens of another source: of a model whose vocabulary was cut."""
        if source is self.source:
            return self
        task, rows = self.task, self.rows
        calibration = task.calibration(rows.calibration, source, rows.num_inputs) if rows.calibration else ()
        evaluation = tuple(task.batches(rows.evaluation, source, batch_size=1))
        request = task.latency_inputs(evaluation)
        return replace(
            self, source=source, calibration=tuple(calibration), evaluation=evaluation, latency_inputs=request
        )

    def candidate(self) -> Candidate:
        """Return the original as a candidate to which nothing has been done: whole, or to be read piece by piece."""
        if self.budget is None:
            return Candidate(source=self.source, module=self.source.module(self.task))
        module = self.source.skeleton(self.task)
        return Candidate.streamed(self.source, module, self.source.read, self.budget)

    def computed(self, candidate: Candidate, passes: Sequence[Arrays]) -> Iterator[Arrays]:
        """Yield a candidate's outputs, float32, for each pass's inputs; layer inputs are rounded as in the artifact."""
        with candidate.simulated() as module, torch.inference_mode():
            run = InMemory(self.source, module, self.task.output)
            if candidate.weights is None:
                yield from map(run, passes)
                return
            samples = [tensors_of(inputs) for inputs in passes]
            forward = lambda module, inputs: self.source.forward(module, inputs, self.task.output)  # noqa: E731
            walker = Walker(module, forward, samples)
            for output in walker.outputs(find_stacks(module)[0], candidate.weights.held):
                yield {self.task.output: output.float().numpy()}
            candidate.weights.drop()

    def evaluate(
        self, candidate: Candidate, batches: Sequence[Batch], reference: Evaluation | None = None
    ) -> Evaluation:
        """Score a candidate in memory."""
        return self.task.evaluate(lambda passes: self.computed(candidate, passes), batches, reference)

    def serve(self, folder: Path, runtime: str | None = None) -> Served:
        """Open an artifact in a child process of its own."""
        return Served(
            runtime or self.runtime.name,
            folder,
            threads=self.threads,
            task_name=self.task.name,
            task_settings=self.task_settings,
            cpus=pinned_cores(self.threads),
            timeout=600.0 if self.budget is None else STREAMED_TIMEOUT,
            budget=self.budget,
        )

    @property
    def keeps_open(self) -> bool:
        """Say whether the original may stay open between candidates: a small one, where memory is not counted."""
        return self.memory is None and 4 * self.model.num_parameters <= KEPT_OPEN

    def step_inputs(self, **more: Any) -> dict[str, Any]:
        """Return what identifies a step of this job: the model, the task, and whatever else the step depends on."""
        return {"model": self.prints["model"], "task": self.task.name, "settings": dict(self.task_settings), **more}


def pinned_cores(threads: int) -> list[int] | None:
    """Return the cores that a child with so many threads is pinned to: the first of this process's own."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    return sorted(os.sched_getaffinity(0))[:threads]


def tensors_of(inputs: Arrays) -> dict[str, torch.Tensor]:
    """Return arrays as tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in inputs.items()}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class InMemory:
    """Run a module in this process the way `Task.evaluate` wants it: arrays in, arrays out, float32."""

    def __init__(self, source: Source, module: nn.Module, output: str) -> None:
        self.source = source
        self.module = module
        self.output = output

    def __call__(self, inputs: Arrays) -> Arrays:
        """Return the scored output of one batch."""
        tensors = tensors_of(inputs)
        with torch.inference_mode():
            values = self.source.forward(self.module, tensors, self.output)
        return {self.output: values.float().numpy()}


def save_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation as safetensors."""
    arrays = {f"kept.{name}": np.ascontiguousarray(values) for name, values in evaluation.kept.items()}
    named = {"scores": evaluation.scores, "divergence": evaluation.divergence, "agreement": evaluation.agreement}
    for name, scores in named.items():
        if scores is not None:
            arrays[f"{name}.sums"] = np.ascontiguousarray(scores.sums)
            arrays[f"{name}.weights"] = np.ascontiguousarray(scores.weights)
    save_file(arrays, path)


def load_evaluation(path: Path) -> Evaluation:
    """Read what `save_evaluation` wrote."""
    arrays = load_file(path)

    def scores(name: str) -> Scores | None:
        if f"{name}.sums" not in arrays:
            return None
        return Scores(sums=arrays[f"{name}.sums"], weights=arrays[f"{name}.weights"])

    found = scores("scores")
    assert found is not None
    kept = {name.removeprefix("kept."): values for name, values in arrays.items() if name.startswith("kept.")}
    return Evaluation(scores=found, kept=kept, divergence=scores("divergence"), agreement=scores("agreement"))
