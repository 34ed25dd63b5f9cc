"""What of a sweep lies on the GPU that it computes on: one block, one sample, and what solves the block.

    observe     the block's weights in float32, a sample, the moments twice: a sum so far, and that of the chunk at hand
    solve       the moments that are left, two float64 copies of one layer's while its factor is found, then its rows
    pass on     the weights, a sample

Everything else stays in main memory: the model, the samples between two blocks, codes. Weights and calls are copied to
the GPU for a pass, outputs are copied back; the stem, and what stands behind the blocks, compute on the CPU. So peak
memory on the GPU follows the largest block and the longest sample, not the model, and not the number of samples.

What a solver takes for one weight at its peak (`SOLVED_BYTES`) is counted in its source: the rows, their copy with one
row for each channel, codes, and the three temporaries of a search for scales. Nothing here was measured on a GPU yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gossamer.errors import TechniqueError, first_line
from gossamer.models.roles import ModelMap
from gossamer.techniques.base import Decision
from gossamer.techniques.blockwise import MAX_TOGETHER, BlockTechnique, moment_bytes

VALUE_BYTES = 4
FACTOR_BYTES = 2 * 8 + 4  # of a second moment while it is factored: two copies in float64, and the factor
SOLVED_BYTES = 24
RESERVED_BYTES = 256 << 20  # what the libraries of a GPU keep for themselves


def device_bytes(step: BlockTechnique, model: ModelMap, sample_bytes: int) -> dict[str, int]:
    """Return about how much each stage of a sweep takes on a GPU at its peak; `sample_bytes` is one sample in a block.

    Raises RecipeError where the step does not fit the model.
    """
    blocks = {stack.name: stack.num_parameters for stack in model.stacks}
    places: dict[tuple[str | None, int | None], list[Decision]] = {}
    for decision in step.resolve(model):
        places.setdefault((decision.layer.stack, decision.layer.block), []).append(decision)
    found = dict.fromkeys(("observe", "solve", "pass on"), 0)
    for (stack, _), decisions in places.items():
        passed = VALUE_BYTES * blocks[stack] + sample_bytes if stack is not None else 0
        moments = sum(moment_bytes(decision) for decision in decisions)
        learned = step.learned_value_bytes * sum(decision.layer.num_parameters for decision in decisions)
        found["observe"] = max(found["observe"], passed + 2 * moments)
        found["pass on"] = max(found["pass on"], passed)
        found["solve"] = max(found["solve"], passed + learned if learned else 0)
        together: Counter[int] = Counter()  # rows of small layers with as many inputs: some are solved side by side
        for decision in decisions:
            if decision.layer.num_parameters <= MAX_TOGETHER:
                together[_inputs(decision)] += decision.layer.shape[0]
        for decision in decisions:  # moments of layers that were solved are given back
            inputs = _inputs(decision)
            rows = max(decision.layer.shape[0], together[inputs])
            alone = max(moments, VALUE_BYTES * inputs**2) + FACTOR_BYTES * inputs**2 + SOLVED_BYTES * rows * inputs
            found["solve"] = max(found["solve"], alone)
            moments -= moment_bytes(decision)
    return {stage: RESERVED_BYTES + count for stage, count in found.items()}


def _inputs(decision: Decision) -> int:
    return torch.Size(decision.layer.shape[1:]).numel()


@contextmanager
def memory_errors(label: str, device: torch.device) -> Iterator[None]:
    """Raise TechniqueError, which says what to do, where a device runs out of memory while the `with` lasts."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TechniqueError(
            f"{label} ran out of memory on {device}: {first_line(error)}",
            "give shorter calibration rows, or use --device cpu; the same command goes on behind the last block",
        ) from error
