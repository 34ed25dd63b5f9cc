"""How far each block is cut: the sizes that meet a goal with the least predicted loss.

For every choice m (channels or heads of one block; of all blocks, where the config has one number for them) and size b
the loss is predicted from one pass forward and back (`curves.py`), the saving read from a table: seconds of a block
(`block_times.py`), or parameters and multiply-accumulates, which can be counted. The choice is an integer programme,

    minimise sum loss[m, b] x[m, b]    with    sum_b x[m, b] = 1 for every m,    sum saved[m, b] x[m, b] >= needed,

the one of mixed widths (`allocation.py`). Left out: how many blocks go (each number of them is a recipe of its own),
and what cutting one block takes off or adds to the loss of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.models.quantized import rows_of
from gossamer.models.reduced_map import reduced_map
from gossamer.models.roles import Cuttable, Dimension, ModelMap
from gossamer.plan.allocation import NUM_SAMPLES, allocate
from gossamer.plan.block_times import BlockTimes
from gossamer.plan.job import Job, tensors_of
from gossamer.plan.specimens import place_of, said_together, sizes_of
from gossamer.runtimes.base import Runtime
from gossamer.tasks.base import spread
from gossamer.techniques.prune.curves import loss_curve
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.quantize.sensitivity import sensitivities

ORDER: tuple[Cuttable, ...] = ("heads", "ffn")  # one step each, in this order
UNIT_SECONDS = 1e-9  # savings are counted in whole numbers


@dataclass(frozen=True)
class Choice:
    """Hold dimensions that are cut alike, and the sizes that they may have, ascending, the whole one last."""

    dimensions: tuple[Dimension, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Cutting:
    """Hold all choices of a model with their losses [M, B] in nats; rows of fewer sizes repeat the whole one."""

    choices: tuple[Choice, ...]
    losses: NDArray[np.float64]

    def saved(self, of: Callable[[Dimension, int], float]) -> NDArray[np.int64]:
        """Return what each size of each choice saves, [M, B]; `of` tells what a dimension of some size takes."""
        found = np.zeros(self.losses.shape, dtype=np.int64)
        for m, choice in enumerate(self.choices):
            for b, size in enumerate(choice.sizes):
                found[m, b] = round(sum(of(one, one.size) - of(one, size) for one in choice.dimensions))
        return found.clip(min=0)

    def best(self, saved: NDArray[np.int64], needed: float) -> dict[Dimension, int] | None:
        """Return the size of each dimension that is cut, for savings of at least `needed`; None where that is too much.

        Among the choices of sizes that save enough it is the one of least predicted loss, within a thousandth.
        """
        most = saved.max(axis=1)
        spare = int(most.sum()) - needed
        if spare < 0:
            return None
        if spare < 1:  # savings are whole numbers: all that there is to save is needed
            chosen = np.where(saved == most[:, None], self.losses, np.inf).argmin(axis=1).tolist()
        elif (found := allocate(self.losses, most[:, None] - saved, spare)) is not None:
            chosen = list(found)
        else:
            return None
        picked = ((choice, choice.sizes[b]) for choice, b in zip(self.choices, self._known(chosen), strict=True))
        return {one: size for choice, size in picked for one in choice.dimensions if size < one.size}

    def loss(self, sizes: Mapping[Dimension, int]) -> float:
        """Return the predicted loss of some sizes together, in nats."""
        return float(self.losses[self._at(sizes)].sum())

    def total(self, saved: NDArray[np.int64], sizes: Mapping[Dimension, int]) -> float:
        """Return what some sizes save together."""
        return float(saved[self._at(sizes)].sum())

    def _at(self, sizes: Mapping[Dimension, int]) -> tuple[list[int], list[int]]:
        whole = [choice.dimensions[0] for choice in self.choices]
        picked = [c.sizes.index(sizes.get(one, one.size)) for c, one in zip(self.choices, whole, strict=True)]
        return list(range(len(picked))), picked

    def _known(self, chosen: Sequence[int]) -> list[int]:
        return [min(b, len(choice.sizes) - 1) for choice, b in zip(self.choices, chosen, strict=True)]


def choices_of(model: ModelMap, runtime: Runtime, what: Sequence[str] = ORDER) -> tuple[Choice, ...]:
    """Return what can be cut in the blocks, of some kinds, in sizes that the runtime holds."""
    found: dict[tuple[Dimension, ...], Choice] = {}
    for one in model.dimensions if not model.experts else ():
        if one.kind in what and one.block is not None and len(one.readers) == 1:
            alike = tuple(said_together(one, model)) if runtime.needs_config and one.attributes else (one,)
            sizes = sizes_of(one, model, runtime)
            if len(sizes) > 1 and all(each.size == one.size and each.block is not None for each in alike):
                found.setdefault(alike, Choice(alike, tuple(sizes)))
    return tuple(found.values())


def cutting(job: Job, what: Sequence[str] = ORDER) -> Cutting | None:
    """Return the choices of a job's model with their predicted losses; None where there are none.

    Measured once for each run folder, on the job's calibration rows. None too for a model that is read piece by piece.
    """
    choices = choices_of(job.model, job.runtime, what)
    if not choices or job.budget is not None:
        return None

    def build(_: Path) -> list[list[float]]:
        return _curves(job, [(one, choice.sizes) for choice in choices for one in choice.dimensions])

    each: list[Any] = [[one.name, one.kind, list(choice.sizes)] for choice in choices for one in choice.dimensions]
    inputs = job.step_inputs(rows=job.prints["calibration"], places=each, seed=job.seed)
    curves = iter(job.run.step("cut-losses", inputs, build).value)
    by_choice = {choice: [next(curves) for _ in choice.dimensions] for choice in choices}
    rows = {choice: np.sum(each, axis=0).tolist() for choice, each in by_choice.items() if all(each)}
    width = max(map(len, rows.values()), default=0)
    padded = [[*row, *[row[-1]] * (width - len(row))] for row in rows.values()]
    return Cutting(tuple(rows), np.array(padded)) if rows else None


def _curves(job: Job, places: Sequence[tuple[Dimension, Sequence[int]]]) -> list[list[float]]:
    """Return the predicted loss of each dimension at each of its sizes."""
    candidate = job.candidate()
    layers = {f"{layer.name}.weight": layer for layer in job.model.layers}
    readers = {one.readers[0]: layers[one.readers[0]] for one, _ in places}
    modules = {name: candidate.module.get_submodule(layer.name) for name, layer in readers.items()}
    samples = [tensors_of(batch.inputs) for batch in spread(job.calibration, NUM_SAMPLES)]
    forward = lambda module, inputs: job.source.forward(module, inputs, job.task.output)  # noqa: E731
    found = sensitivities(candidate.module, forward, samples, modules, seed=job.seed)
    curves: list[list[float]] = []
    with job.progress.stage("what each size is predicted to lose", len(places)) as advance:
        for one, sizes in places:
            reader = one.readers[0]
            unit = next(member.unit for member in one.members if member.parameter == reader)
            if reader not in found:  # no sample reaches it: nothing tells what it is good for
                curves.append([])
                continue
            moments = found[reader].moments
            seen_II = moments.second_II if getattr(modules[reader], "bias", None) is None else moments.covariance_II
            weight_OI = rows_of(candidate.values(reader).float(), readers[reader].transposed)
            curves.append(loss_curve(weight_OI, seen_II, found[reader].fisher_O, unit, sizes))
            advance(1)
    return curves


def seconds_by_size(tables: Sequence[BlockTimes], label: str) -> Callable[[Dimension, int], float]:
    """Return what a block takes when only one of its dimensions is cut, in billionths of a second."""
    known = {(table.stack, block): table for table in tables if table.format == label for block in table.blocks}

    def of(one: Dimension, size: int) -> float:
        assert one.block is not None
        table = known.get((one.stack, one.block))
        return table.of({place_of(one): size}) / UNIT_SECONDS if table is not None else 0.0

    return of


def counted_by_size(model: ModelMap, quantity: str) -> Callable[[Dimension, int], float]:
    """Return how many `params` or `flops` the model has when only one of its dimensions is cut."""

    def of(one: Dimension, size: int) -> float:
        after = reduced_map(model, {one: size}) if size < one.size else model
        return after.num_parameters if quantity == "params" else 2 * after.macs

    return of


def as_steps(sizes: Mapping[Dimension, int], model: ModelMap) -> tuple[Prune, ...]:
    """Return the steps that cut dimensions to these sizes: one number where all are cut alike, else by name."""
    steps = []
    for kind in ORDER:
        here = {one: size for one, size in sizes.items() if one.kind == kind}
        if here:
            everywhere = [one for one in model.dimensions if one.kind == kind]
            alike = len(set(here.values())) == 1 and len(here) == len(everywhere)
            to: Any = next(iter(here.values())) if alike else {one.name: size for one, size in here.items()}
            steps.append(Prune.model_validate({"what": kind, "to": to}))
    return tuple(steps)
