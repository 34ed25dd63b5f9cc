"""How much each unit matters, from passes through the whole model: what is known before a sweep begins.

The formulas are in `units.py` and `taylor.py`; here is what they are given, and what several weights that read the same
units say together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.purpose import named
from gossamer.models.quantized import rows_of
from gossamer.models.roles import Dimension, ModelMap
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context
from gossamer.techniques.block import observe
from gossamer.techniques.prune.readers import joint_scores, readers_of, reading, scores_of
from gossamer.techniques.prune.taylor import taylor_scores
from gossamer.techniques.prune.units import activation_scores, fisher_scores, magnitude_scores
from gossamer.techniques.quantize.moments import has_moments
from gossamer.techniques.quantize.sensitivity import sensitivities

Forward = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def importance(
    candidate: Candidate,
    model: ModelMap,
    sizes: Mapping[Dimension, int],
    batches: Sequence[Batch],
    context: Context,
    *,
    by: str,
    damping: float,
) -> dict[Dimension, Tensor]:
    """Return the score of every unit, [U], by dimension, over all that read it; the least important has the least.

    `batches` are the calibration samples that are passed. Raises TechniqueError for scores that are NaN or
    infinite, and where no sample reaches a weight.
    """
    if by == "taylor":
        return taylor_scores(candidate, sizes, batches, context)
    readers = readers_of(sizes, {f"{layer.name}.weight": layer for layer in model.layers})
    scores = _by_reader(candidate, model, sizes, batches, context, by, damping)
    found: dict[Dimension, Tensor] = {}
    for one in sizes:
        read = [(member, readers[member.parameter]) for member in reading(one)]
        total_U = found[one] = torch.stack(
            [scores_of(one, scores[m.parameter], m, reader) for m, reader in read if m.parameter in scores]
        ).sum(0)
        if not bool(torch.isfinite(total_U).all()):
            raise TechniqueError(f"the importance of {one.kind} of {one.name} is NaN or infinite", "try another `by`")
    return found


def _by_reader(
    candidate: Candidate,
    model: ModelMap,
    sizes: Mapping[Dimension, int],
    batches: Sequence[Batch],
    context: Context,
    by: str,
    damping: float,
) -> dict[str, Tensor]:
    """Return the score of every unit, [U], by the weight that reads it."""
    layers = {f"{layer.name}.weight": layer for layer in model.layers}
    units = {name: reader.unit for name, reader in readers_of(sizes, layers).items()}
    rows = {name: rows_of(candidate.values(name).float(), layers[name].transposed) for name in units}
    if by == "magnitude":
        return {name: magnitude_scores(rows[name], unit) for name, unit in units.items()}
    modules = {name: candidate.module.get_submodule(layers[name].name) for name in units}
    modules = {name: layer for name, layer in modules.items() if has_moments(layer)}
    blind = [name for one in sizes if not modules.keys() & set(one.readers) for name in one.readers]
    if blind:
        context.progress.say(f"prune: chosen by magnitude, as second moments do not describe {named(blind)}")
    found_blind = {name: magnitude_scores(rows[name], units[name]) for name in blind}
    samples, forward = [tensors(batch) for batch in batches], forward_of(candidate, context)
    if by == "fisher":
        found = sensitivities(candidate.module, forward, samples, modules, seed=context.seed)
        _check_reached(modules, found)
        return found_blind | {
            name: fisher_scores(rows[name], found[name].moments.second_II, found[name].fisher_O, units[name])
            for name in modules
        }
    with torch.no_grad():
        seen = observe(modules, [partial(forward, candidate.module, sample) for sample in samples])
    _check_reached(modules, seen)
    if by == "activation":
        return found_blind | {name: activation_scores(seen[name].mean_abs_I, units[name]) for name in modules}
    seconds = {name: seen[name].second_II for name in modules}
    return found_blind | joint_scores(sizes, rows, seconds, readers_of(sizes, layers), damping)


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Return a batch's inputs as tensors."""
    return {name: torch.from_numpy(values) for name, values in batch.inputs.items()}


def forward_of(candidate: Candidate, context: Context) -> Forward:
    """Return what runs a module of the candidate's kind on inputs by name."""
    source, output = candidate.source, context.task.output
    return lambda module, inputs: source.forward(module, inputs, output)


def _check_reached(wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise TechniqueError(f"no calibration sample reaches {missing[0]}", "give other rows, or choose by magnitude")
