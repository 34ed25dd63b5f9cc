"""How long a block takes at each size of each place that can be cut, in each format: measured in the serving runtime.

    seconds(sizes, format) = seconds(uncut, format) + sum over places (seconds(that place cut, format) - seconds(uncut))

Kurtic et al., "ZipLM", 2023, section 3.2, build such a table for each runtime environment; theirs too takes sub-layers
for additive. Each entry is timed in turns with the uncut blocks in float32, in processes of their own, at the request
whose latency is the goal's: a ratio, which drift does not touch. What decides the most (formats, uncut) or is out of
line with the others is timed in a second sitting, and a third where the two do not agree: a session may take half as
long again for as long as it is open. Seconds come from the whole model, unchanged, of whose time its blocks take their
share of the multiply-accumulates. Some sizes are measured, those between lie on straight lines; fewer units are never
slower (the table is made monotone by isotonic regression, which takes out what is noise).
Formats that hold weights in fewer bits and compute in float32 are timed uncut: cut, they take as much less as float32.
What is no block (stem, head) is in no table: a prediction starts from the whole model, unchanged, and adds what becomes
of its blocks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from gossamer.measure.latency import time_in_turns
from gossamer.models.reduced_map import reduced_map
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.plan.job import Job
from gossamer.plan.original import unchanged_artifact
from gossamer.plan.records import Record
from gossamer.plan.specimens import BlockKind, Specimen, Workshop, block_kinds, layers_of, place_of, sizes_of
from gossamer.runtimes.process import Served
from gossamer.techniques.base import Decision

FLOAT = "float32"
MEASURED_SHARES = (0.0, 0.5)  # of the sizes of a place, the least among them; the whole one is measured too
TURNS_SECONDS, ROUND_SECONDS, MIN_ROUNDS = 2.4, 0.2, 5  # of timing one entry
OUT_OF_LINE, ALIKE = 0.15, 0.06  # in logarithms: from what is expected of an entry, and between two sittings
LEAST_LEFT = 0.02  # of a block's time: sub-layers are not quite additive

Entry = tuple[str, str | None, int]  # a format, a place that is cut (None: uncut) and the units that are left of it


class BlockTimes(Record):
    """Hold the seconds of one kind of block in one format: uncut, and with one place cut to each measured size."""

    stack: str
    blocks: tuple[int, ...]
    format: str
    seconds: float
    cut: dict[str, tuple[tuple[int, float], ...]]  # place -> (units left, seconds of the block), ascending, uncut last

    def of(self, sizes: Mapping[str, int]) -> float:
        """Return the seconds of a block whose places have other sizes; those that are not named are whole.

        >>> cut = {"ffn": ((4, 2.0), (8, 3.0))}
        >>> BlockTimes(stack="layers", blocks=(0,), format=FLOAT, seconds=3.0, cut=cut).of({"ffn": 6})
        2.5
        """
        found = self.seconds
        for place, size in sizes.items():
            known, seconds = zip(*self.cut[place], strict=True)
            found += float(np.interp(size, known, seconds)) - self.seconds
        return max(LEAST_LEFT * self.seconds, found)


def block_times(
    job: Job, formats: Mapping[str, Sequence[Decision]], uncut: Mapping[str, Sequence[Decision]] | None = None
) -> tuple[BlockTimes, ...]:
    """Return the tables of every kind of block in float32 and in other formats, measured once for each run folder.

    `formats` are the decisions that make each (see `block_format`), `uncut` those of formats that are timed uncut
    alone. None for a model that is read piece by piece.
    """
    if job.budget is not None:
        return ()
    whole_only = dict(uncut or {}) if job.runtime.holds_layers else {}
    wanted = {FLOAT: [], **formats} if job.runtime.holds_layers else {FLOAT: []}
    found: list[BlockTimes] = []
    kinds = block_kinds(job.model, job.runtime)
    whole = unchanged_artifact(job)[1]["latency"]["p50"] if kinds else 0.0
    for kind in kinds:

        def build(folder: Path, kind: BlockKind = kind) -> list[dict[str, Any]]:
            tables = _measure(job, kind, wanted, whole_only, whole, folder)
            return [table.model_dump(mode="json") for table in tables]

        inputs = job.step_inputs(
            runtime=job.runtime.name,
            threads=job.threads,
            formats=sorted(wanted),
            uncut=sorted(whole_only),
            blocks=[kind.stack, *kind.blocks],
            places=sorted(kind.places),
            request={name: list(values.shape) for name, values in job.latency_inputs.items()},
        )
        found += [BlockTimes.model_validate(one) for one in job.run.step("block-times", inputs, build).value]
    return tuple(found)


def block_format(layers: Iterable[LayerInfo], decisions: Mapping[str, Decision]) -> str | None:
    """Return what a block's linear layers are held and fed as under decisions by layer name; None where they differ.

    Codes of 5 to 8 bits take a byte each and are multiplied alike; where inputs are not rounded they are turned into
    floats first, whatever their grid.
    """
    formats = set()
    for layer in layers:
        if layer.kind == "linear":
            one = decisions.get(layer.name)
            if one is None or one.weight is None:
                formats.add(FLOAT)
                continue
            bytewise = one.weight.format == "int" and one.weight.bits > 4
            if one.weight.format == "int" and one.activation is None:
                formats.add("int8 weights" if bytewise else "int4 weights")
                continue
            weight = one.weight.model_copy(update={"bits": 8}) if bytewise else one.weight
            formats.add(f"{weight} {one.activation or ''}".strip())
    return formats.pop() if len(formats) == 1 else None


def formats_of(model: ModelMap, decided: Iterable[Sequence[Decision]]) -> dict[str, Sequence[Decision]]:
    """Return the formats that blocks get from lists of decisions, and the first list that makes each; not float32."""
    found: dict[str, Sequence[Decision]] = {}
    places = {(layer.stack, layer.block) for layer in model.layers if layer.stack is not None and layer.block == 0}
    for decisions in decided:
        by_layer = {one.layer.name: one for one in decisions}
        for stack, block in places:
            assert stack is not None
            assert block is not None
            label = block_format(layers_of(model, stack, block), by_layer)
            if label not in (None, FLOAT):
                found.setdefault(str(label), decisions)
    return found


def change_of_blocks(
    tables: Sequence[BlockTimes], model: ModelMap, after: ModelMap, decisions: Sequence[Decision]
) -> tuple[float, frozenset[str]]:
    """Return what a recipe adds to the seconds of the blocks in the tables, and the names of the layers in it.

    `after` is the map of what it leaves. Blocks in a format that was not measured are not among them, and none where
    the stream that all of them share has become narrower.
    """
    if _widths(model) != _widths(after):
        return 0.0, frozenset()
    by_layer = {one.layer.name: one for one in decisions if one.weight is not None}
    depth = {stack.name: stack.num_blocks for stack in after.stacks}
    left = {(one.stack, one.block, place_of(one)): one.size for one in after.dimensions if one.block is not None}
    known = {(table.stack, block, table.format): table for table in tables for block in table.blocks}
    change, covered = 0.0, set()
    for (stack, block, label), table in known.items():
        if label != FLOAT:
            continue
        layers = layers_of(model, stack, block)
        here = known.get((stack, block, block_format(layers, by_layer) or ""))
        gone = block >= depth.get(stack, block + 1)
        if gone or here is not None:
            sizes = {place: left[stack, block, place] for place in table.cut} if not gone else {}
            change += (here.of(sizes) if here is not None and not gone else 0.0) - table.seconds
            covered |= {layer.name for layer in layers}
    return change, frozenset(covered)


def _widths(model: ModelMap) -> dict[str, int]:
    return {one.name: one.size for one in model.dimensions if one.kind == "width"}


def _measure(
    job: Job,
    kind: BlockKind,
    formats: Mapping[str, Sequence[Decision]],
    uncut: Mapping[str, Sequence[Decision]],
    whole: float,
    folder: Path,
) -> Iterable[BlockTimes]:
    """Time one kind of block of a model that takes `whole` seconds; `folder` is left empty."""
    measured = {
        place: _some([size for size in sizes_of(dimensions[0], job.model, job.runtime) if size < dimensions[0].size])
        for place, dimensions in kind.places.items()
    }
    cuts = [(place, size) for place, sizes in measured.items() for size in sizes]
    workshop = Workshop(job, kind)
    baseline = workshop.specimen(None, 0, [])
    served_from = _written(job, baseline, folder / "baseline")
    seconds: dict[Entry, float] = {(FLOAT, None, 0): 1.0}
    label = f"timing blocks of each size in {job.runtime.name}"
    entries: list[Entry] = [(name, None, 0) for name in formats]
    entries += [(name, *cut) for cut in cuts for name in formats] + [(name, None, 0) for name in uncut]
    with (
        job.serve(served_from) as reference,
        job.serve(served_from) as other,
        job.progress.stage(label, len(entries) - 1) as advance,
    ):

        def sitting(entry: Entry) -> float:
            specimen = workshop.specimen(*entry[1:], {**formats, **uncut}[entry[0]])
            other.reopen(_written(job, specimen, folder / "cut"))
            found = _in_turns(other, reference, specimen, baseline)
            shutil.rmtree(folder / "cut")
            return found

        for entry in entries[1:]:
            seconds[entry] = sitting(entry)
            advance(1)
        for entry in _doubtful(seconds, {cut: _work_left(job, kind, *cut) for cut in cuts}):
            seconds[entry] = _settled(seconds[entry], partial(sitting, entry))
    shutil.rmtree(served_from)
    tables = list(_tables(job, kind, formats, measured, seconds, whole))
    return [*tables, *(_as_float(tables[0], name, seconds[name, None, 0]) for name in uncut)]


def _work_left(job: Job, kind: BlockKind, place: str, size: int) -> float:
    """Return the share of a specimen's multiply-accumulates that is left where one place is cut."""
    left = reduced_map(job.model, {kind.places[place][0]: size})
    whole, cut = (sum(layer.macs for layer in layers_of(one, kind.stack, kind.blocks[0])) for one in (job.model, left))
    share = 1.0 if job.runtime.holds_layers else _share_of(job.model, kind)
    return 1 - share * (1 - cut / max(1, whole))


def _doubtful(seconds: Mapping[Entry, float], work: Mapping[tuple[str, int], float]) -> list[Entry]:
    """Return the entries to be timed again: formats, uncut, and what is far from what the others let expect.

    A cut is expected to leave the float32 block the share of its time that it leaves of its work, and other formats
    the share that it leaves float32.
    """
    found: list[Entry] = []
    for entry, ratio in seconds.items():
        name, place, size = entry
        if place is None:
            expected = 0.0 if name != FLOAT else ratio
        elif name == FLOAT:
            expected = work[place, size]
        else:
            expected = seconds[name, None, 0] * seconds[FLOAT, place, size]
        if not expected or abs(log(ratio / expected)) > OUT_OF_LINE:
            found.append(entry)
    return found


def _settled(first: float, again: Callable[[], float]) -> float:
    """Return the mean of two sittings that agree, else the median of three."""
    second = again()
    if abs(log(second / first)) <= ALIKE:
        return (first + second) / 2
    return median((first, second, again()))


def _as_float(table: BlockTimes, name: str, ratio: float) -> BlockTimes:
    """Return the table of a format that takes `ratio` times as long as float32 at every size."""
    cut = {place: tuple((size, ratio * seconds) for size, seconds in known) for place, known in table.cut.items()}
    return table.model_copy(update={"format": name, "seconds": ratio * table.seconds, "cut": cut})


def _tables(
    job: Job,
    kind: BlockKind,
    formats: Iterable[str],
    measured: Mapping[str, Sequence[int]],
    seconds: Mapping[Entry, float],
    whole: float,
) -> Iterable[BlockTimes]:
    """Yield the tables from ratios to the uncut specimen, whose blocks take their share of the whole model's time."""
    count, share = len(kind.blocks), _share_of(job.model, kind)
    taken, outside = (whole * share, 0.0) if job.runtime.holds_layers else (whole, whole * (1 - share))
    for name in formats:
        uncut = (seconds[name, None, 0] * taken - outside) / count
        cut = {}
        for place, sizes in measured.items():
            times = [min(uncut, (seconds[name, place, size] * taken - outside) / count) for size in sizes]
            smooth = isotonic_regression(times).x.tolist()
            cut[place] = (*zip(sizes, smooth, strict=True), (kind.places[place][0].size, uncut))
        yield BlockTimes(stack=kind.stack, blocks=kind.blocks, format=name, seconds=uncut, cut=cut)


def _share_of(model: ModelMap, kind: BlockKind) -> float:
    """Return the share of the multiply-accumulates of layers that these blocks do."""
    inside = sum(layer.macs for block in kind.blocks for layer in layers_of(model, kind.stack, block))
    return inside / max(1, sum(layer.macs for layer in model.layers))


def _some(sizes: Sequence[int]) -> list[int]:
    """Return the sizes that are measured, ascending."""
    return sorted({sizes[round(share * len(sizes))] for share in MEASURED_SHARES})


def _written(job: Job, specimen: Specimen, target: Path) -> Path:
    target.mkdir()
    job.runtime.write(specimen.candidate, target, specimen.request)
    return target


def _in_turns(other: Served, reference: Served, specimen: Specimen, baseline: Specimen) -> float:
    """Return the ratio of a specimen's time to the baseline's."""
    pair = time_in_turns(
        other,
        reference,
        specimen.inputs,
        baseline.inputs,
        budget_seconds=TURNS_SECONDS,
        round_seconds=ROUND_SECONDS,
        min_rounds=MIN_ROUNDS,
    )
    return pair.ratio_of("p50").value
