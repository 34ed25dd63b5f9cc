"""Fewer blocks beside narrower ones, where a goal leaves so little time that narrow blocks alone would be left with
next to nothing.

Where a share r of the blocks' time is left, sqrt(r) of the blocks stay and each is cut to the sqrt(r) of its own time:
half of the saving, in logarithms, comes from depth and half from size, as those who scale models up share it out (Tan
and Le, "EfficientNet", 2019, section 3.3, raise depth and width together). Which blocks go is told by their influence
(`techniques/prune/blocks.py`). Left out: other shares of the two, each of which would have to be profiled; neither the
root nor DEEP was compared with others on a real model yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import sqrt
from pathlib import Path

import torch

from gossamer.models.roles import Dimension
from gossamer.plan.allocation import NUM_SAMPLES
from gossamer.plan.job import Job, tensors_of
from gossamer.tasks.base import spread
from gossamer.techniques.base import Technique
from gossamer.techniques.prune.blocks import influences
from gossamer.techniques.prune.prune import Prune

DEEP = 0.4  # of the blocks' time is left: below it blocks go


class FewerBlocks:
    """Tell which blocks go where a share of their time is left; `job` is the model's."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def steps(self, share: float) -> tuple[Prune, ...]:
        """Return the steps that take blocks out; none where enough is left, or the runtime cannot hold fewer.

        >>> FewerBlocks(job).steps(0.25)[0].label()  # of six blocks  # doctest: +SKIP
        'prune layers, 2, 3, 4 fewer by influence'
        """
        if not 0 < share < DEEP:
            return ()
        stacks = [one for one in self.job.model.dimensions if one.kind == "layers"]
        found = []
        for one in stacks:
            stay = max(1, len(one.held), round(one.size * sqrt(share)))
            if stay < one.size:
                gone = tuple(sorted(self._order[one][: one.size - stay]))
                targets = (one.stack,) if len(stacks) > 1 else ("*",)
                found.append(Prune.model_validate({"what": "layers", "remove": gone, "targets": targets}))
        refused = (self.job.runtime.cut_refusal(cut) for step in found for cut in step.cuts(self.job.model))
        return () if any(refused) else tuple(found)

    @cached_property
    def _order(self) -> dict[Dimension, list[int]]:
        """Return the blocks of each stack that may go, the least missed first; measured once for each run folder."""
        job = self.job
        stacks = [one for one in job.model.dimensions if one.kind == "layers"]

        def build(_: Path) -> list[list[float]]:
            module = job.candidate().module
            samples = [tensors_of(batch.inputs) for batch in spread(job.calibration, NUM_SAMPLES)]
            blocks = [[module.get_submodule(f"{one.stack}.{n}") for n in range(one.size)] for one in stacks]
            passes = (job.source.forward(module, sample, job.task.output) for sample in samples)
            with torch.no_grad():
                found = iter(influences([block for each in blocks for block in each], lambda: passes))
            return [[next(found) for _ in each] for each in blocks]

        inputs = job.step_inputs(rows=job.prints["calibration"], stacks=[one.stack for one in stacks])
        scores = job.run.step("block-influence", inputs, build).value
        return {one: _least_first(each, one) for one, each in zip(stacks, scores, strict=True)}


def _least_first(scores: Sequence[float], one: Dimension) -> list[int]:
    free = (number for number in range(one.size) if number not in one.held)
    return sorted(free, key=lambda number: (scores[number], number))


def takes_named_blocks(step: Technique) -> bool:
    """Say whether a step takes out blocks as they are proposed here."""
    return isinstance(step, Prune) and step.what == "layers" and isinstance(step.remove, tuple)


def is_taken(one: Dimension, steps: Sequence[Prune]) -> bool:
    """Say whether a dimension lies in a block that some steps take out."""
    for step in steps:
        here = step.targets == ("*",) or one.stack in step.targets
        if here and isinstance(step.remove, tuple) and one.block in step.remove:
            return True
    return False
