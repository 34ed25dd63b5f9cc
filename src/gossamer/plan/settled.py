"""Put sizes in the place of a goal: `prune_until: {latency: 50%}` becomes `prune` steps with the size of each block.

So does the goal of `gates`, which is then given the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.errors import RecipeError, RunError
from gossamer.plan.block_times import BlockTimes, block_format, block_times, formats_of
from gossamer.plan.candidates import Steps
from gossamer.plan.cutting import as_steps, counted_by_size, cutting, seconds_by_size
from gossamer.plan.job import Job
from gossamer.plan.proposed_cuts import in_words
from gossamer.plan.specimens import layers_of
from gossamer.techniques.base import Decision, resolved
from gossamer.techniques.prune.until import Until


def settled(job: Job, steps: Steps) -> Steps:
    """Return a recipe whose steps all say what they do; the sizes that were found are told as progress.

    Raises RecipeError where nothing can be cut or the least that is left is more than the goal.
    """
    if not any(isinstance(step, Until) and step.quantity for step in steps):
        return steps
    if job.team.size > 1:
        raise RunError(
            f"a goal of latency or params is measured in one process, {job.team.size} were started together",
            "find the sizes with `gossamer plan` in one process, and give them: prune: {what: ffn, to: {...}}",
        )
    found: Steps = ()
    for number, step in enumerate(steps):
        if isinstance(step, Until) and step.quantity:
            found = (*found, *_cuts(job, step, steps[number + 1 :]))
        else:
            found = (*found, step)
    return found


def _cuts(job: Job, step: Until, then: Steps) -> Steps:
    choices = cutting(job, step.may_cut)
    if choices is None:
        raise RecipeError(
            f"`{step.label()}`: {' and '.join(step.may_cut)} of no block can be cut for {job.runtime.name}",
            "`gossamer inspect` says why, by name; a runtime that holds a graph (onnxruntime) holds any sizes",
        )
    if step.quantity == "latency":
        label, tables = _timed(job, step, then)
        saved = choices.saved(seconds_by_size(tables, label))
        whole = sum(len(table.blocks) * table.seconds for table in tables if table.format == label) * 1e9
        of = f"the blocks' time in {label}, {whole / 1e6:.2f} ms,"
    else:
        saved = choices.saved(counted_by_size(job.model, "params"))
        stacks = {one.stack for choice in choices.choices for one in choice.dimensions}
        whole = float(sum(layer.num_parameters for layer in job.model.layers if layer.stack in stacks))
        of = f"the blocks' {whole:,.0f} parameters"
    sizes = choices.best(saved, (1 - step.share) * whole)
    if sizes is None:
        least = 1 - float(saved.max(axis=1).sum()) / whole
        raise RecipeError(
            f"`{step.label()}` cannot be reached: cut as far as it goes, {least:.0%} of {of} are left",
            f"allow {least:.0%} or more, or take out blocks as well: prune: {{what: layers, remove: 1}}",
        )
    left = 1 - choices.total(saved, sizes) / whole
    job.progress.say(f"{step.label()}: {in_words(sizes)}; predicted: {left:.1%} of {of} left")
    return step.with_sizes(as_steps(sizes, job.model))


def _timed(job: Job, step: Until, then: Steps) -> tuple[str, Sequence[BlockTimes]]:
    """Return the format that the blocks get from the steps behind, and the tables; float32 where it is not timed."""
    decisions: Sequence[Decision] = resolved(job.model, then)[0]
    tables = block_times(job, formats_of(job.model, [decisions]))
    by_layer = {one.layer.name: one for one in decisions if one.weight is not None}
    labels = {block_format(layers_of(job.model, one.stack, block), by_layer) for one in tables for block in one.blocks}
    known = {one.format for one in tables}
    if len(labels) == 1 and (label := labels.pop()) in known:
        return str(label), tables
    job.progress.say(f"{step.label()}: blocks are timed in float32, not as the steps behind hold them")
    return "float32", tables
