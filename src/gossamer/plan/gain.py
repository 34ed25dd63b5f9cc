"""What more calibration rows would bring: measured on the rows that there are, by fitting to parts of them.

A block that is fitted to m rows errs on rows that it was not fitted to by

    e(m) = e_0 (1 + a / m)

what rounding costs anyway, and what fitting to chance costs (the excess of a least-squares fit falls as 1 / m). The
middle block is fitted to quarters and to halves of the n rows; its output error on the rows left out gives e(n/4) and
e(n/2), hence

    e(n) = e(n/2) - (e(n/4) - e(n/2)) / 2          e(n) - e(2n) = (e(n/4) - e(n/2)) / 4

The divergence of the model moves with its blocks' errors, so the share (e(n) - e(2n)) / e(n) is what twice the rows are
expected to take off it. Rows left out are what makes it honest: on 8 windows of SmolLM2 the divergence on the rows that
were fitted was 0.0042 nats, on others 0.0108. Left out: other blocks, and rows of another kind than those given, which
no number of these replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.models.candidate import Candidate
from gossamer.models.walker import Call, block_keys
from gossamer.plan.job import Job, tensors_of
from gossamer.techniques.base import Decision, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import BlockTechnique

PARTS = 4
LEAST_ROWS = 4 * PARTS  # of fewer the quarters say nothing
NOTICEABLE = 0.01


def gain_of_twice(job: Job, steps: Sequence[Technique]) -> float | None:
    """Return the share of its divergence that a recipe is expected to lose with twice the calibration rows.

    None where no step is fitted to rows block by block, or there are too few rows to tell.
    """
    fitted = (step for step in steps if isinstance(step, BlockTechnique))
    step = next((step for step in fitted if all(one.cut is None for one in step.resolve(job.model))), None)
    if step is None or len(job.calibration) < LEAST_ROWS or not job.model.stacks:
        return None

    def build(_: Path) -> dict[str, float]:
        errors = _errors(job, step)
        return {"quarter": errors[0], "half": errors[1]}

    inputs = job.step_inputs(step=step.entry(), rows=job.prints["calibration"], seed=job.seed)
    found = job.run.step("gain", inputs, build).value
    return expected_share(found["quarter"], found["half"])


def expected_share(quarter: float, half: float) -> float:
    """Return (e(n) - e(2n)) / e(n) from e(n/4) and e(n/2); 0 where more rows did not help.

    >>> round(expected_share(1 + 4 * 0.1, 1 + 2 * 0.1), 4)  # e(m) = 1 + 0.1 n / m
    0.0455
    """
    slope = max(0.0, quarter - half)
    return slope / 4 / (half - slope / 2) if half > slope / 2 else 1.0


def in_words(share: float | None, rows: int) -> str:
    """Say what twice the rows are expected to bring; nothing where that is not known."""
    if share is None:
        return ""
    if share < NOTICEABLE:
        return f"twice the {rows} calibration inputs would lower the divergence by less than {NOTICEABLE:.0%}: enough"
    return f"twice the {rows} calibration inputs are expected to lower the divergence by about {share:.0%}"


def _errors(job: Job, step: BlockTechnique) -> tuple[float, float]:
    """Return the mean output error of the middle block on rows left out, fitted to quarters and to halves."""
    stack = max(job.model.stacks, key=lambda stack: stack.num_parameters * stack.num_blocks)
    candidate = job.candidate()
    container = candidate.module.get_submodule(stack.name)
    index = stack.num_blocks // 2
    module = container.get_submodule(block_keys(container)[index])
    inside = [d for d in step.resolve(job.model) if (d.layer.stack, d.layer.block) == (stack.name, index)]
    with torch.no_grad(), job.progress.stage("what more rows would bring", 2 * 2) as advance:
        calls = _calls(job, candidate, module)
        targets = [call(module) for call in calls]
        errors: dict[int, list[float]] = {1: [], 2: []}
        for width in errors:
            for begin in (0, PARTS // 2):
                fitted = [i for i in range(len(calls)) if begin <= i % PARTS < begin + width]
                left = [i for i in range(len(calls)) if i not in set(fitted)]
                errors[width].append(_error(step, candidate, module, inside, calls, targets, fitted, left))
                advance(1)
    return sum(errors[1]) / 2, sum(errors[2]) / 2


def _error(
    step: BlockTechnique,
    candidate: Candidate,
    module: nn.Module,
    decisions: Sequence[Decision],
    calls: Sequence[Call],
    targets: Sequence[Any],
    fitted: Sequence[int],
    left: Sequence[int],
) -> float:
    """Return a block's output error on some samples after it was fitted to others; the block is left as it was."""
    name = next(name for name, part in candidate.module.named_modules() if part is module)
    by_parameter = {decision.parameter: decision for decision in decisions}

    def block(part: Sequence[int]) -> Block:
        samples = [calls[index] for index in part]
        wanted = [targets[index] for index in part]
        return Block.alone(name, module, samples, wanted, by_parameter, candidate)

    with candidate.held(module):
        before = {parameter: candidate.values(parameter).clone() for parameter in by_parameter}
        solved = block(fitted)
        step.solve(solved)
        error = block(left).output_error()
        for parameter, values in before.items():
            candidate.unset_quantized(parameter, values)
        solved.restore_weights()
    return error


class _Found(Exception):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def _calls(job: Job, candidate: Candidate, module: nn.Module) -> list[Call]:
    """Return what the original calls a block with, for each calibration sample."""

    def reach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Found(Call(args, kwargs))

    handle = module.register_forward_pre_hook(reach, with_kwargs=True)
    found = []
    try:
        for batch in job.calibration:
            try:
                job.source.forward(candidate.module, tensors_of(batch.inputs), job.task.output)
            except _Found as reached:
                found.append(reached.call)
    finally:
        handle.remove()
    return found
