"""How much memory a run may take, and whether a model is opened whole or read piece by piece.

whole        original and candidate side by side in float32, and what runs them
piece by piece      a share of the memory for weights; the rest is for the block at hand and what solves it

Calibration samples get what is left beside that. Those that do not fit lie in files, so a step needs memory for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gossamer.errors import RuntimeUnavailable, TechniqueError
from gossamer.measure.machine import memory_bytes
from gossamer.measure.memory import resident_bytes
from gossamer.models.source import Source
from gossamer.run.atomic import check_space, readable_bytes
from gossamer.run.device import free_bytes
from gossamer.run.team import Team
from gossamer.runtimes.base import Runtime
from gossamer.techniques.base import Technique
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.sweep_device import device_bytes

if TYPE_CHECKING:
    from gossamer.plan.job import Job

WHOLE_COPIES = 2.3  # original and candidate in float32, activations and codes
SHARE_OF_FREE = 0.9  # of what is free, when the user set no limit
SHARE_OF_WEIGHTS = 0.15  # of the memory, for weights that are kept beside the block at hand
LEAST_BUDGET = 32 << 20
GIB = float(1 << 30)


def check_fits(job: Job, steps: Sequence[Technique]) -> None:
    """Raise TechniqueError when a step needs more memory than the user granted, naming the step and both sizes.

    Only for models that are read piece by piece: one that is opened whole was found to fit.
    """
    if job.budget is None:
        return
    limit = memory_limit(job.memory)
    needs = {step.label(): needed_bytes(job, step) for step in steps}
    worst = max(needs, key=lambda label: needs[label])
    if needs[worst] > limit:
        raise TechniqueError(
            f"{worst} needs about {needs[worst] / GIB:.1f} GiB for {job.source.name}; "
            f"{limit / GIB:.1f} GiB may be used",
            "raise --memory, give shorter calibration rows, or round without data: quantize",
        )
    share = f"about {needs[worst] / GIB:.1f} of {limit / GIB:.1f} GiB"
    job.progress.say(f"{job.source.name} is read piece by piece: {share}, for {worst}")
    for step in steps:
        if isinstance(step, BlockTechnique):
            # of each sample what is in front of a block, and behind
            count = step.num_samples(job.calibration, step.resolve(job.model))
            together = 2 * count * _sample_bytes(job)
            if together > limit - needs[step.label()]:
                check_space(job.run.folder, together)
                job.progress.say(f"samples of {step.name} lie in {job.run.folder}: {readable_bytes(together)}")


def memory_of_one(memory: int | None, team: Team) -> int | None:
    """Return the bytes that this process may use of what was granted to all on this machine; the same for every one."""
    return memory if team.size == 1 else int(team.everywhere(memory_limit(memory))) // team.local_size


def needed_bytes(job: Job, step: Technique) -> int:
    """Return about how much memory a step takes at its peak, the process and the weights that are kept included.

    One calibration sample is in memory with it: all others may lie in files.
    """
    # a sweep counts a sample twice, in front of a block and behind; what passes is there once
    sample = _sample_bytes(job) + _passing_bytes(job) // 2
    work = step.working_bytes(job.model, min(1, len(job.calibration)), sample)
    return resident_bytes() + (job.budget or 0) + work


def device_needs(job: Job, step: BlockTechnique) -> dict[str, int]:
    """Return about how much each stage of a sweep takes on the GPU of a job at its peak; nothing on the CPU."""
    if job.device.type == "cpu":
        return {}
    return device_bytes(step, job.model, _sample_bytes(job) + _passing_bytes(job))


def device_limit(job: Job) -> int:
    """Return the bytes that may be used on the GPU of a job: most of what is free; 0 on the CPU."""
    return 0 if job.device.type == "cpu" else int(SHARE_OF_FREE * free_bytes(job.device))


def samples_memory(job: Job, step: Technique) -> int | None:
    """Return how many bytes the calibration samples of a step may take together, beside the block at hand.

    Asked when the candidate is there: a model that is opened whole is in memory by then. None: no limit was set, and
    the model was opened whole.
    """
    if job.budget is None and job.memory is None:
        return None
    return max(0, memory_limit(job.memory) - needed_bytes(job, step))


def _sample_bytes(job: Job) -> int:
    """Return what the longest calibration sample takes between two blocks, its mask included."""
    width = max((layer.shape[-1] for layer in job.model.layers if layer.kind == "norm"), default=1)
    return 4 * _tokens(job) * (2 * width + _tokens(job))


def _passing_bytes(job: Job) -> int:
    """Return what the longest calibration sample takes more while it passes a block: outputs of layers, attention."""
    outputs: Counter[tuple[str, int | None]] = Counter()
    for layer in job.model.layers:
        if layer.stack is not None:
            outputs[layer.stack, layer.block] += layer.shape[0]
    heads = getattr(job.source.config, "num_attention_heads", 0)
    scores = 3 * heads * _tokens(job) if isinstance(heads, int) else 0  # as they are, masked, and as shares
    return 4 * _tokens(job) * (max(outputs.values(), default=0) + scores)


def _tokens(job: Job) -> int:
    """Return the length of the longest calibration sample; of a model that is opened whole only a GPU has to know."""
    samples = job.calibration if job.budget is not None or job.device.type != "cpu" else ()
    return max((batch.inputs[next(iter(batch.inputs))].size for batch in samples), default=0)


def memory_limit(memory: int | None) -> int:
    """Return the bytes that may be used: what the user granted, or most of what is free."""
    return memory if memory is not None else int(SHARE_OF_FREE * memory_bytes()[1]) + resident_bytes()


def weights_budget(source: Source, runtime: Runtime, memory: int | None) -> int | None:
    """Return how many bytes of weights may stay in memory, or None when the model is opened whole.

    Raises RuntimeUnavailable when it does not fit and the runtime opens models whole.
    """
    needed, limit = whole_bytes(source), memory_limit(memory)
    if needed <= limit:
        return None
    if not runtime.streams:
        raise RuntimeUnavailable(
            f"{source.name} needs about {needed / GIB:.1f} GiB to be opened whole, as {runtime.name} does; "
            f"{limit / GIB:.1f} GiB may be used",
            "raise --memory, or use --runtime torch, which goes through a model piece by piece",
        )
    return streamed_budget(memory)


def whole_bytes(source: Source) -> int:
    """Return about how much memory a run takes with the model opened whole; 0 for one that cannot be otherwise."""
    if source.shards is None:
        return 0
    return resident_bytes() + int(WHOLE_COPIES * 4 * source.shards.num_values)


def streamed_budget(memory: int | None) -> int:
    """Return how many bytes of the weights of a model that is read piece by piece may stay in memory."""
    return max(LEAST_BUDGET, int(SHARE_OF_WEIGHTS * (memory_limit(memory) - resident_bytes())))
