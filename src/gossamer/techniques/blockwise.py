"""One sweep over a model's blocks for everything that needs calibration: observe a block, solve it, pass on, remember.

A transformer is a stem, stacks of like blocks, and a head. The sweep holds the calibration samples as they are in front
of one block, and takes the blocks in order:

    calls = walker.calls(stack, i, outputs)       what the model really hands to block i, sample by sample
    technique.solve(block)                        observers share a forward pass; solvers are pure functions on tensors
    outputs = [block(call) for call in calls]     the errors made so far are in what the next block sees
    remember(block)                               codes and live activations on disk: a killed run goes on here

Two streams run side by side: `live` goes through the solved blocks, `reference` through the blocks as they were. Their
difference behind each block is the error so far; it is measured on NUM_GATED samples (all of them where a technique
fits a block's output to the reference). Where it is not finite, worse than plain rounding's or far from what was
expected, the next safer option is taken and reported (`sweep_gates.py`).

Of a streamed candidate only the block at hand is in memory: its weights are read for a pass and given back, its codes
go to the run folder and are read from there when somebody asks. So do samples that do not fit (`sweep_samples.py`).
Passes that observe and hand on may compute in bfloat16 (`sweep_precision.py`). Several processes share the samples and
the layers of each block, and find what one would (`sweep_shared.py`). What a technique sees of a block: `block.py`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from pydantic import Field
from torch import Tensor

from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized
from gossamer.models.roles import ModelMap
from gossamer.run.device import CPU
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, Decision, Technique, check_not_rounded
from gossamer.techniques.block import Block
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.layers import num_inputs
from gossamer.techniques.sweep_gates import MORE_DAMPING
from gossamer.techniques.sweep_precision import CalibrationDtype

CODE_BYTES = 2  # of a weight of the block that is solved: its codes, and those of plain rounding
CHANGED_BYTES = 8  # of a weight that gets another value: that, and what it was
MAX_TOGETHER = 1 << 22  # weights of a layer up to which it is solved beside others: all their rows are in memory
TOKENS = frozenset(("input_ids", "decoder_input_ids"))
FEWEST_SAMPLES, MOST_SAMPLES = 32, 64  # where a recipe does not say how many
# for each input of the widest layer, that its moments are taken from: of SmolLM2-135M (1536 inputs, 4 bits by GPTQ) KL
# to the original is 0.1005 with 11 of them, 0.1003 with 21
TOKENS_OF_AN_INPUT = 10
# layers that read what another one (q, gate) reads: one set of moments
SHARED_INPUTS = frozenset(("k", "v", "up", "expert_up"))


def _tokens(batch: Batch) -> int:
    """Return how many tokens a batch has, 0 where that is not known (pictures, sound); of two stacks the fewer."""
    return min((values.size for name, values in batch.inputs.items() if name in TOKENS), default=0)


def moment_bytes(decision: Decision) -> int:
    """Return what the moments of a layer's input take, 0 where it shares another layer's."""
    return 0 if decision.layer.role in SHARED_INPUTS else 4 * num_inputs(decision.layer) ** 2


class BlockTechnique(Technique):
    """A technique that solves one block at a time from calibration samples: `solve` is all that it adds.

    `value_bytes` is what it keeps of each weight of a block until the block is done, `row_bytes` what solving takes for
    each weight of the layer at hand.
    """

    value_bytes: ClassVar[int] = CODE_BYTES
    row_bytes: ClassVar[int] = 20

    samples: int | None = Field(
        None,
        ge=1,
        description="calibration samples that are used, evenly spread over those given; empty: 64, or fewer where "
        "moments of inputs are all that is wanted and come from enough tokens (at least 32)",
    )
    calibration_dtype: CalibrationDtype = Field(
        "auto",
        description="what samples pass blocks in: bfloat16 where that is faster and cannot be told, or as set",
    )

    learned_value_bytes: ClassVar[int] = 0  # on the device, for each weight of a block that learns from its output

    @abstractmethod
    def solve(self, block: Block) -> None:
        """Replace the decided parameters of a block by `block.set_quantized`, others by `block.set_weight`.

        Layers outside of all blocks come last, as one Block without calls and targets.
        """

    def plain_codes(self, block: Block, parameters: Iterable[str] | None = None) -> dict[str, Quantized]:
        """Return round-to-nearest codes for a block's decided parameters (default: all of them).

        What a solver falls back to, and what its blocks are compared with.
        """
        found = {}
        for parameter in block.decisions if parameters is None else parameters:
            decision = block.decisions[parameter]
            if decision.weight is not None:
                transposed = decision.layer.transposed
                weight = self.without_samples(block.weight(parameter), transposed)
                codes = quantize_weight(weight, decision.weight, scale="mse", transposed=transposed, name=parameter)
                found[parameter] = codes.to(CPU)
        return found

    def without_samples(self, weight: Tensor, transposed: bool) -> Tensor:
        """Return what becomes of a weight before it is rounded plainly: itself, unless the recipe takes some out."""
        del transposed
        return weight

    @property
    def fits_outputs(self) -> bool:
        """Say whether `solve` wants the reference outputs of every sample: then no second process can have some."""
        return False

    @property
    def layer_by_layer(self) -> bool:
        """Say whether `solve` looks at each layer by itself, so that processes may have some each."""
        return False

    def num_samples(self, batches: Sequence[Batch], decisions: Iterable[Decision]) -> int:
        """Return how many of the calibration batches are used.

        Where a recipe leaves that open: as many as have TOKENS_OF_AN_INPUT tokens for each input of the widest layer,
        if each layer is solved from the moments of its own input (of an expert nobody knows how many tokens it sees).
        """
        most = min(MOST_SAMPLES if self.samples is None else self.samples, len(batches))
        layers = [decision.layer for decision in decisions]
        tokens = sum(_tokens(batch) for batch in batches) / max(1, len(batches))
        moments_alone = self.layer_by_layer and not self.fits_outputs and all(layer.experts is None for layer in layers)
        if self.samples is not None or not moments_alone or not tokens:
            return most
        widest = max((num_inputs(layer) for layer in layers), default=0)
        return min(most, max(FEWEST_SAMPLES, math.ceil(TOKENS_OF_AN_INPUT * widest / tokens)))

    @property
    def takes_widths(self) -> bool:
        """Say whether `solve` rounds to the grids of its decisions, so that a block may be given wider ones."""
        return False

    def with_more_damping(self) -> Self | None:
        """Return the technique with ten times the damping; None where it has none."""
        damping = getattr(self, "damping", None)
        return None if damping is None else self.model_copy(update={"damping": MORE_DAMPING[1] * damping})

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the samples, and of the block at hand: while they pass it, or while it is solved."""
        places: dict[tuple[str | None, int | None], list[Decision]] = {}
        for decision in self.resolve(model):
            places.setdefault((decision.layer.stack, decision.layer.block), []).append(decision)
        largest = 0
        for (stack, _), decisions in places.items():
            values = sum(decision.layer.num_parameters for decision in decisions) if stack is not None else 0
            moments = sum(moment_bytes(decision) for decision in decisions)
            # moments twice: a sum over the samples so far, and that of the chunk at hand
            passing = (self.value_bytes + 4) * values + (2 * moments if stack is not None else 0)
            largest = max(largest, passing, self.solving_bytes(decisions, values, sample_bytes))
        streams = 4 if self.fits_outputs else 2  # in front and behind; those of the original too
        samples = min(self.samples or MOST_SAMPLES, num_samples) * sample_bytes
        return max(largest, super().working_bytes(model, num_samples, sample_bytes)) + streams * samples

    def solving_bytes(self, decisions: Sequence[Decision], values: int, sample_bytes: int) -> int:
        """Return the bytes that solving some layers takes, `values` weights of which are of one block."""
        del sample_bytes
        largest, moments = 0, sum(moment_bytes(decision) for decision in decisions)
        for decision in decisions:  # moments of layers that were solved are given back
            rows, inputs = decision.layer.shape[0], num_inputs(decision.layer)
            # their factor in float64, and a weight, its rows with their codes and what is subtracted from them
            solve = 8 * inputs**2 + self.row_bytes * rows * inputs
            largest = max(largest, self.value_bytes * values + max(moments, 4 * inputs**2) + solve)
            moments -= moment_bytes(decision)
        return largest

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with every decided layer solved, block after block."""
        decisions = self.resolve(model)
        check_not_rounded(candidate, decisions)
        from gossamer.techniques.sweep import Sweep  # a sweep is made of what stands here

        Sweep(self, candidate, model, context, decisions).run()
        candidate.applied.append(self.entry())
        return candidate
