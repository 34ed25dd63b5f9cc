"""Mixed bits: which layer gets how many, so that the predictions move least for the bytes that there are.

For every layer m and width b: `bytes[m, b]` as the runtime counts them, `kl[m, b]` predicted from the layer's
sensitivity and the error of rounding it to b bits. The choice is an integer programme,

    minimise sum kl[m, b] x[m, b]     with     sum_b x[m, b] = 1 for every m,    sum bytes[m, b] x[m, b] <= budget,

solved by HiGHS through scipy. Embeddings are rounded by a step of their own; every option for them, and leaving them as
they are, makes a budget for the layers. Of a model that is read piece by piece sensitivities come from one pass over
its blocks, each block's own output standing in for the predictions (`quantize/sensitivity.py` says what that leaves
out). Left out: stacked experts, which can be held with one grid only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from gossamer.goal import Goal
from gossamer.models.candidate import Candidate
from gossamer.models.walker import Forward, Stream, Walker, block_keys
from gossamer.plan.candidates import Steps
from gossamer.plan.job import Job, tensors_of
from gossamer.plan.predict import Tables, predicted_bytes
from gossamer.tasks.base import spread
from gossamer.techniques.base import Decision, SearchSpace, resolved
from gossamer.techniques.quantize.calibrated import CalibratedGrid, Gptq
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.sensitivity import (
    Sensitivity,
    block_sensitivities,
    last_sensitivities,
    sensitivities,
)

WIDTHS = (8, 6, 5, 4, 3, 2)
NUM_SAMPLES = 16
NUM_STREAMED_SAMPLES = 8  # that lie in memory between two blocks
Rows = dict[str, list[float]]  # parameter -> divergence at every width
Grid = TypeVar("Grid", bound=CalibratedGrid)
SLACK = 0.002  # of the bound: configuration files and headers are not counted to the byte


def mixed_recipes(job: Job, goal: Goal, tables: Tables, space: SearchSpace) -> list[Steps]:
    """Return recipes whose widths were chosen for the goal's bound on size; none without one, or without layers."""
    bounds = [part for part in goal.constraints if part.quantity == "size"]
    base = _base(space)
    stacked = any(experts.stacked for experts in job.model.experts)
    if not bounds or base is None or stacked:
        return []
    bound = min(part.bound * tables.original.size_bytes if part.relative else part.bound for part in bounds)
    found: list[Steps] = []
    for embeddings in ([], *([step] for step in Quantize.of_embeddings(space))):
        steps: Steps = (base, *embeddings)
        total = predicted_bytes(tables, *resolved(job.model, steps))
        mixed = within(job, base, base.resolve(job.model), bound * (1 - SLACK) - total)
        if mixed is not None and mixed.bits_of:
            found.append((mixed, *embeddings))
    return found


def within(job: Job, base: Grid, decisions: Sequence[Decision], extra: float) -> Grid | None:
    """Return the step with widths for which its layers take at most `extra` bytes more (less, below 0) than they do.

    `decisions` are the step's own. None when the narrowest widths do not reach that.
    """
    sizes = _sizes(job, decisions)
    present = int(sizes[np.arange(len(decisions)), WIDTHS.index(base.bits)].sum())
    chosen = allocate(_table(job, base, decisions), sizes, present + extra)
    return None if chosen is None else with_widths(base, decisions, [WIDTHS[index] for index in chosen])


def allocate(kl: NDArray[np.float64], sizes: NDArray[np.int64], budget: float) -> list[int] | None:
    """Return the index of the option chosen for each row of `kl` [M, B] and `sizes` [M, B]; None when nothing fits.

    >>> allocate(np.array([[0.0, 1.0], [0.0, 5.0]]), np.array([[8, 4], [8, 4]]), 12)
    [1, 0]
    """
    num_layers, num_options = kl.shape
    if sizes.min(axis=1).sum() > budget:
        return None
    one_each = np.kron(np.eye(num_layers), np.ones(num_options))
    # divergences span many powers of ten: in units of the largest, so that the solver's tolerances fit
    result = milp(
        c=(kl / max(kl.max(), 1e-300)).ravel(),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes.reshape(1, -1) / budget, -np.inf, 1.0),
        ],
        integrality=np.ones(kl.size),
        bounds=Bounds(0, 1),
        options={"time_limit": 20.0, "mip_rel_gap": 1e-3},
    )
    if result.x is None:
        return None
    return [int(index) for index in result.x.reshape(kl.shape).argmax(axis=1)]


def with_widths(base: Grid, decisions: Sequence[Decision], widths: Sequence[int]) -> Grid:
    """Return the step with these widths: the commonest as `bits`, the others by name."""
    names: dict[int, list[str]] = {}
    for decision, bits in zip(decisions, widths, strict=True):
        names.setdefault(bits, []).append(decision.layer.name)
    commonest = max(names, key=lambda bits: len(names[bits]))
    others = tuple((bits, tuple(sorted(names[bits]))) for bits in sorted(names, reverse=True) if bits != commonest)
    return type(base).model_validate({**base.model_dump(), "bits": commonest, "bits_of": others})


def _base(space: SearchSpace) -> Gptq | None:
    """Return the first grid that `gptq` itself proposes here: where it refuses, mixing widths makes no sense."""
    for steps in Gptq.candidates(space):
        if isinstance(steps[0], Gptq) and len(steps) == 1:
            return steps[0]
    return None


def _sizes(job: Job, decisions: Sequence[Decision]) -> NDArray[np.int64]:
    """Return the bytes of every layer at every width [M, B]; a width that the runtime refuses takes those of 8 bits."""
    rows = []
    for decision in decisions:
        assert decision.weight is not None
        row = []
        for bits in WIDTHS:
            spec = decision.weight.model_copy(update={"bits": bits})
            refused = job.runtime.refusal(decision.layer.role, decision.layer.shape, spec, None) is not None
            held = spec if not refused else decision.weight.model_copy(update={"bits": WIDTHS[0]})
            row.append(job.runtime.stored_bytes(decision.layer.role, decision.layer.shape, held, 4))
        rows.append(row)
    return np.array(rows, dtype=np.int64)


def _table(job: Job, base: CalibratedGrid, decisions: Sequence[Decision]) -> NDArray[np.float64]:
    """Return the predicted divergence of every layer at every width [M, B]; one without moments counts by its error."""

    def build(_: Path) -> list[list[float]]:
        rows = _whole_rows(job, decisions) if job.budget is None else _streamed_rows(job, decisions)
        return [rows[decision.parameter] for decision in decisions]

    # what is rounded and how far: the technique's other settings change nothing here
    grid = [[decision.parameter, str(decision.weight)] for decision in decisions]
    of = "predictions" if job.budget is None else "blocks"
    inputs: dict[str, Any] = job.step_inputs(rows=job.prints["calibration"], grid=grid, seed=job.seed, of=of)
    return np.array(job.run.step("sensitivity", inputs, build).value, dtype=np.float64)


def _whole_rows(job: Job, decisions: Sequence[Decision]) -> Rows:
    """Return the divergences of every layer, by its parameter, from gradients of the predictions."""
    candidate = job.candidate()
    layers = {d.parameter: candidate.module.get_submodule(d.layer.name) for d in decisions}
    samples = [tensors_of(batch.inputs) for batch in spread(job.calibration, NUM_SAMPLES)]
    with job.progress.stage("sensitivity of each layer", len(decisions)) as advance:
        found = sensitivities(candidate.module, _forward_of(job), samples, layers, seed=job.seed)
        rows = {}
        for decision in decisions:
            rows[decision.parameter] = _row(candidate, decision, found.get(decision.parameter))
            advance(1)
    return rows


def _streamed_rows(job: Job, decisions: Sequence[Decision]) -> Rows:
    """Return the divergences of every layer, by its parameter, from one pass over the blocks, one of them in memory."""
    candidate = job.candidate()
    assert candidate.weights is not None
    module = candidate.module
    rows: Rows = {}
    samples = [tensors_of(batch.inputs) for batch in spread(job.calibration, NUM_STREAMED_SAMPLES)]
    walker, stream = Walker(module, _forward_of(job), samples), Stream()
    at: dict[tuple[str | None, int | None], list[Decision]] = {}
    for decision in decisions:
        at.setdefault((decision.layer.stack, decision.layer.block), []).append(decision)
    places = [(stack, index) for stack in job.model.stacks for index in range(stack.num_blocks)]
    with torch.no_grad(), job.progress.stage("sensitivity of each layer, block by block", len(places) + 1) as advance:
        for stack, index in places:
            container = module.get_submodule(stack.name)
            block = container.get_submodule(block_keys(container)[index])
            here = at.get((stack.name, index), [])
            calls = list(walker.calls(stack, index, stream))
            with candidate.held(block):
                layers = {one.parameter: module.get_submodule(one.layer.name) for one in here}
                found = block_sensitivities(block, calls, layers, seed=job.seed) if here else {}
                rows |= {one.parameter: _row(candidate, one, found.pop(one.parameter, None)) for one in here}
                stream.outputs = [call(block) for call in calls]
            if index == stack.num_blocks - 1:
                stream.finish(stack.name)
            advance(1)
        outside = at.get((None, None), [])
        layers = {one.parameter: module.get_submodule(one.layer.name) for one in outside}
        found, worth = last_sensitivities(walker, stream, layers, seed=job.seed)
        inside = {parameter: [worth * share for share in row] for parameter, row in rows.items()}
        advance(1)
    # what lies in front of the blocks does not move what is behind them here
    known = {parameter: one for parameter, one in found.items() if bool(one.fisher_O.any())}
    return inside | {one.parameter: _row(candidate, one, known.get(one.parameter)) for one in outside}


def _forward_of(job: Job) -> Forward:
    return lambda module, inputs: job.source.forward(module, inputs, job.task.output)


def _row(candidate: Candidate, decision: Decision, known: Sensitivity | None) -> list[float]:
    """Return the predicted divergence of a layer at every width; one without moments counts by its weights' error."""
    assert decision.weight is not None
    weight, transposed = candidate.values(decision.parameter), decision.layer.transposed
    row = []
    for bits in WIDTHS:
        spec = decision.weight.model_copy(update={"bits": bits})
        rounded = quantize_weight(weight, spec, transposed=transposed, name=decision.parameter).dequantize()
        if known is None:
            row.append(float((weight - rounded).square().sum()))
        else:
            row.append(known.divergence(weight, rounded, transposed=transposed))
    return row
