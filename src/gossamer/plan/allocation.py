"""Mixed bits: which layer gets how many, so that the predictions move least for the bytes that there are.

For every layer m and width b: `bytes[m, b]` as the runtime counts them, `kl[m, b]` predicted from the layer's
sensitivity and the error of rounding it to b bits. The choice is an integer programme,

    minimise sum kl[m, b] x[m, b]     with     sum_b x[m, b] = 1 for every m,    sum bytes[m, b] x[m, b] <= budget,

solved by HiGHS through scipy. Embeddings are rounded by a step of their own; every option for them, and leaving them as
they are, makes a budget for the layers. Left out: models that are read piece by piece, whose gradients would need every
block twice; stacked experts, which can be held with one grid only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from gossamer.goal import Goal
from gossamer.plan.candidates import Steps
from gossamer.plan.job import Job, tensors_of
from gossamer.plan.predict import Tables, predicted_bytes
from gossamer.tasks.base import spread
from gossamer.techniques.base import Decision, SearchSpace, resolved
from gossamer.techniques.quantize.calibrated import CalibratedGrid, Gptq
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.sensitivity import sensitivities

WIDTHS = (8, 6, 5, 4, 3, 2)
NUM_SAMPLES = 16
Grid = TypeVar("Grid", bound=CalibratedGrid)
SLACK = 0.002  # of the bound: configuration files and headers are not counted to the byte


def mixed_recipes(job: Job, goal: Goal, tables: Tables, space: SearchSpace) -> list[Steps]:
    """Return recipes whose widths were chosen for the goal's bound on size; none without one, or without layers."""
    bounds = [part for part in goal.constraints if part.quantity == "size"]
    base = _base(space)
    stacked = any(experts.stacked for experts in job.model.experts)
    if not bounds or base is None or job.budget is not None or stacked:
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
        candidate = job.candidate()
        layers = {d.parameter: candidate.module.get_submodule(d.layer.name) for d in decisions}
        samples = [tensors_of(batch.inputs) for batch in spread(job.calibration, NUM_SAMPLES)]
        forward = lambda module, inputs: job.source.forward(module, inputs, job.task.output)  # noqa: E731
        with job.progress.stage("sensitivity of each layer", len(decisions)) as advance:
            found = sensitivities(candidate.module, forward, samples, layers, seed=job.seed)
            rows = []
            for decision in decisions:
                assert decision.weight is not None
                weight, transposed = candidate.values(decision.parameter), decision.layer.transposed
                row = []
                for bits in WIDTHS:
                    spec = decision.weight.model_copy(update={"bits": bits})
                    codes = quantize_weight(weight, spec, transposed=transposed, name=decision.parameter)
                    known = found.get(decision.parameter)
                    row.append(
                        float((weight - codes.dequantize()).square().sum())
                        if known is None
                        else known.divergence(weight, codes.dequantize(), transposed=transposed)
                    )
                rows.append(row)
                advance(1)
        return rows

    # what is rounded and how far: the technique's other settings change nothing here
    grid = [[decision.parameter, str(decision.weight)] for decision in decisions]
    inputs: dict[str, Any] = job.step_inputs(rows=job.prints["calibration"], grid=grid, seed=job.seed)
    return np.array(job.run.step("sensitivity", inputs, build).value, dtype=np.float64)
