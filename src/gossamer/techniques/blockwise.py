"""One sweep over a model's blocks for everything that needs calibration: observe a block, solve it, pass on, remember.

A transformer is a stem, stacks of like blocks, and a head. The sweep holds the calibration samples as they are in front
of one block, and takes the blocks in order:

    calls = walker.calls(stack, i, outputs)       what the model really hands to block i, sample by sample
    technique.solve(block)                        observers share a forward pass; solvers are pure functions on tensors
    outputs = [block(call) for call in calls]     the errors made so far are in what the next block sees
    remember(block)                               codes and live activations on disk: a killed run goes on here

Two streams run side by side: `live` goes through the solved blocks, `reference` through the blocks as they were. Their
difference behind each block is the error so far; it is measured on NUM_GATED samples (all of them where a technique
fits a block's output to the reference). A block whose error is not finite, or that a solver made worse than plain
rounding does, is rounded plainly and reported.

Of a streamed candidate only the block at hand is in memory: its weights are read for a pass and given back, its codes
go to the run folder and are read from there when somebody asks. Left out as yet: samples spilled to disk, several
processes.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized
from gossamer.models.roles import ModelMap, Stack
from gossamer.models.walker import Call, Output, Stream, Walker, block_keys, hidden_states
from gossamer.techniques.base import Context, Decision, Technique
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.moments import Moments, has_moments, layer_inputs
from gossamer.techniques.routing import shrunk, tokens_needed, tokens_of_experts, told
from gossamer.techniques.sweep_memory import SweepMemory

SOLVED_VALUE_BYTES = 2  # of a weight of the block that is solved: its codes, and those of plain rounding
PASSED_VALUE_BYTES = SOLVED_VALUE_BYTES + 4  # of the block that samples pass: its value too
SHARED_INPUTS = frozenset(
    ("k", "v", "up", "expert_up")
)  # layers that read what another one (q, gate) reads: one set of moments
NUM_GATED = 4  # samples on which the error behind each block is measured
GATE_SLACK = 1.05  # a solved block may be so much worse than plain rounding, by the noise of few samples


def observe(layers: Mapping[str, nn.Module], passes: Iterator[Any]) -> dict[str, Moments]:
    """Return the moments of the inputs of some layers over some passes, which are run here.

    Layers that are given one and the same tensor (queries, keys and values) share one Moments. A layer that no pass
    reaches is missing in the result.
    """
    found: dict[str, Moments] = {}
    first: dict[tuple[int, str], str] = {}  # within one pass: input and patches -> the layer that counted it
    kept: list[Tensor] = []  # inputs of this pass stay alive, so that no id is given twice
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def note(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                values = inputs[0]
                kept.append(values)
                leader = first.setdefault((id(values), _patches(module)), name)
                if leader != name and found.setdefault(name, found[leader]) is found[leader]:
                    return
                rows = layer_inputs(module, values)
                if name not in found:
                    found[name] = Moments.empty(rows.shape[-1])
                found[name].add(rows)

            handle = layer.register_forward_pre_hook(note)
            hooks.callback(handle.remove)
        for _ in passes:
            first.clear()
            kept.clear()
    return found


def _patches(layer: nn.Module) -> str:
    """Return what tells apart how layers cut one input into rows."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    return f"{layer.kernel_size} {layer.stride} {layer.padding} {layer.dilation}"


@dataclass
class Block:
    """Hold one block while it is solved: its calls, the decisions inside it, the reference outputs.

    `calls` are the live samples'; `targets` the reference's outputs for as many samples as are known.
    """

    name: str
    module: nn.Module
    calls: Sequence[Call]
    targets: Sequence[Output]
    decisions: Mapping[str, Decision]  # by parameter name
    candidate: Candidate
    passes: Callable[[], Iterator[Any]]
    seed: int = 0
    solved: dict[str, Quantized] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # parameters that got other plain values
    replaced: dict[str, Tensor] = field(default_factory=dict)  # and what they were before
    notes: list[str] = field(default_factory=list)
    routed: dict[str, list[int]] = field(default_factory=dict)  # what holds experts -> tokens that each was sent
    starved: dict[str, str] = field(default_factory=dict)  # parameters of experts that saw too few -> how many

    def moments(self) -> dict[str, Moments]:
        """Return the moments of each decided layer's input, by parameter, from one pass over the samples.

        A layer that no sample reaches (a starved expert), or whose error no second moment describes, is missing.
        """
        owners = {name: self.candidate.module.get_submodule(name.rpartition(".")[0]) for name in self.decisions}
        with self.in_memory():
            found = observe({name: layer for name, layer in owners.items() if has_moments(layer)}, self.passes())
        self.routed = tokens_of_experts([decision.layer for decision in self.decisions.values()], found)
        shrunk(found[name] for name, one in self.decisions.items() if one.layer.experts is not None and name in found)
        return found

    def enough(self, parameter: str, seen: Moments | None, otherwise: str) -> bool:
        """Say whether a layer's moments can be used; where not, note what is done `otherwise`."""
        layer, tokens = self.decisions[parameter].layer, 0 if seen is None else seen.num_tokens
        needed = tokens_needed(layer)
        if tokens >= needed:
            return True
        if layer.experts is None:
            self.notes.append(f"{parameter} saw no calibration token and was {otherwise}")
        else:
            self.starved[parameter] = f"{layer.name}: {tokens} of {needed} tokens, {otherwise}"
        return False

    def in_memory(self) -> AbstractContextManager[None]:
        """Keep the block's weights in memory while the `with` lasts (those of a whole model are never kept)."""
        return self.candidate.held(self.module) if self.calls else nullcontext()

    def weight(self, parameter: str) -> Tensor:
        """Return a parameter's present values, in its own shape."""
        return self.candidate.values(parameter)

    def set_quantized(self, parameter: str, codes: Quantized) -> None:
        """Put codes in place of a parameter."""
        self.solved[parameter] = codes
        self.candidate.set_quantized(parameter, codes)

    def set_weight(self, parameter: str, values: Tensor) -> None:
        """Put other plain values in place of a parameter, one that is not rounded here (a norm) or not yet."""
        if parameter not in self.replaced:
            self.replaced[parameter] = self.weight(parameter).clone()
        self.weights[parameter] = values.detach().float().clone()
        self.candidate.put_weight(parameter, partial(self.weights.__getitem__, parameter))

    def restore_weights(self) -> None:
        """Put back every value that `set_weight` replaced."""
        for parameter, values in self.replaced.items():
            self.candidate.put_weight(parameter, partial(_itself, values))
        self.weights.clear()
        self.replaced.clear()

    def output_error(self) -> float:
        """Return how far the block's outputs are from the targets, relative to each token's size (`token_error`)."""
        with self.in_memory():
            found = [hidden_states(call(self.module)) for call in self.calls[: len(self.targets)]]
        return relative_error(found, [hidden_states(target) for target in self.targets])


def _itself(values: Tensor) -> Tensor:
    return values


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the mean over samples of `token_error`."""
    return sum(float(token_error(a, b)) for a, b in zip(found, wanted, strict=True)) / len(wanted)


def token_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over tokens of |found - wanted|^2 / |wanted|^2, hidden states [B, T, H]; a scalar.

    Each token counts by its own size: what reads hidden states divides each by its norm first (a few tokens, often the
    first, are a thousand times larger than all others and would drown them). Pictures [B, C, H, W] count as one token.
    """
    axes = (-1,) if wanted.dim() == 3 else tuple(range(1, wanted.dim()))
    size = wanted.float().square().mean(axes)
    return (
        (found.float() - wanted.float()).square().mean(axes) / size.clamp(min=torch.finfo(torch.float32).tiny)
    ).mean()


def _moment_bytes(decision: Decision) -> int:
    """Return what the moments of a layer's input take, 0 where it shares another layer's."""
    return 0 if decision.layer.role in SHARED_INPUTS else 4 * torch.Size(decision.layer.shape[1:]).numel() ** 2


class BlockTechnique(Technique):
    """A technique that solves one block at a time from calibration samples: `solve` is all that it adds."""

    samples: int = Field(128, ge=1, description="calibration samples that are used, evenly spread over those given")

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
                found[parameter] = quantize_weight(
                    weight, decision.weight, scale="mse", transposed=transposed, name=parameter
                )
        return found

    def without_samples(self, weight: Tensor, transposed: bool) -> Tensor:
        """Return what becomes of a weight before it is rounded plainly: itself, unless the recipe takes some out."""
        del transposed
        return weight

    @property
    def fits_outputs(self) -> bool:
        """Say whether `solve` wants the reference outputs of every sample."""
        return False

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the samples, and of the block at hand: while they pass it, or while it is solved."""
        places: dict[tuple[str | None, int | None], list[Decision]] = {}
        for decision in self.resolve(model):
            places.setdefault((decision.layer.stack, decision.layer.block), []).append(decision)
        largest = 0
        for (stack, _), decisions in places.items():
            values = sum(decision.layer.num_parameters for decision in decisions) if stack is not None else 0
            moments = sum(_moment_bytes(decision) for decision in decisions)
            largest = max(largest, PASSED_VALUE_BYTES * values + (moments if stack is not None else 0))
            for decision in decisions:  # moments of layers that were solved are given back
                rows, inputs = decision.layer.shape[0], torch.Size(decision.layer.shape[1:]).numel()
                # their factor in float64, and the rows with their codes and what is subtracted from them
                solve = 8 * inputs**2 + 16 * rows * inputs
                largest = max(largest, SOLVED_VALUE_BYTES * values + max(moments, 4 * inputs**2) + solve)
                moments -= _moment_bytes(decision)
        samples = min(self.samples, num_samples) * sample_bytes
        return max(largest, super().working_bytes(model, num_samples, sample_bytes)) + 2 * samples

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with every decided layer solved, block after block."""
        decisions = self.resolve(model)
        again = [decision.parameter for decision in decisions if decision.parameter in candidate.quantized]
        if again:
            raise TechniqueError(
                f"{len(again)} parameters were rounded by an earlier step: {', '.join(again[:3])}",
                "name them under `ignore` in one of the two steps",
            )
        Sweep(self, candidate, model, context, decisions).run()
        candidate.applied.append(self.entry())
        return candidate


class Sweep:
    """Take a technique over a candidate's blocks, and remember each finished one in the run folder if there is one."""

    def __init__(
        self,
        technique: BlockTechnique,
        candidate: Candidate,
        model: ModelMap,
        context: Context,
        decisions: Sequence[Decision],
    ) -> None:
        self.technique = technique
        self.candidate = candidate
        self.context = context
        self.decisions = {decision.parameter: decision for decision in decisions}
        self.place = {d.parameter: (d.layer.stack, d.layer.block) for d in decisions}
        used = {stack for stack, _ in self.place.values()}
        self.stacks = [stack for stack in model.stacks if stack.name in used]
        batches = context.calibration
        count = min(technique.samples, len(batches))
        if count < technique.rows_needed():
            raise TechniqueError(
                f"{technique.name} needs {technique.rows_needed()} calibration samples, {count} were given",
                "give more rows with --data",
            )
        picked = [batches[index * len(batches) // count] for index in range(count)]
        samples = [{name: torch.from_numpy(values) for name, values in batch.inputs.items()} for batch in picked]
        source, output = candidate.source, context.task.output
        self.walker = Walker(candidate.module, lambda module, inputs: source.forward(module, inputs, output), samples)
        applied = [*candidate.applied, technique.entry()]
        self.memory = SweepMemory(context.run, {**context.identity, "applied": applied})

    def run(self) -> None:
        """Solve the blocks in order, then what stands outside of them; goes on where a killed run stopped."""
        places = [(stack, index) for stack in self.stacks for index in range(stack.num_blocks)]
        live, reference = Stream(), Stream()
        with (
            self.candidate.simulated(),
            torch.no_grad(),
            self.context.progress.stage(f"{self.technique.name}: blocks", len(places) + 1) as advance,
        ):
            passed = self._resume(places, live, reference)
            advance(passed)
            for number in range(passed, len(places)):
                stack, index = places[number]
                self._block(stack, index, live, reference)
                if index == stack.num_blocks - 1:
                    live.finish(stack.name)
                    reference.finish(stack.name)
                self.memory.save_streams(places, number, live, reference)
                advance(1)
            self._rest(live)
            self.memory.forget_streams(places)
            advance(1)

    def _resume(self, places: Sequence[tuple[Stack, int]], live: Stream, reference: Stream) -> int:
        """Put back what an earlier run finished; return how many blocks were passed, their codes in place."""
        passed = self.memory.load_streams(places, live, reference)
        if passed == 0 and places and self.memory.solved_all(places, bool(self._outside())):
            passed = len(places)  # killed behind the sweep: nothing but codes is needed
        for stack, index in places[:passed]:
            remembered = self.memory.load(stack.name, index, self._block_at(stack, index, []))
            assert remembered is not None, f"{stack.name} {index} was passed, but its codes are gone"
            self._note_experts(remembered)
        return passed

    def _block_at(self, stack: Stack, index: int, calls: Sequence[Call]) -> Block:
        container = self.candidate.module.get_submodule(stack.name)
        key = block_keys(container)[index]
        module = container.get_submodule(key)
        inside = {p: d for p, d in self.decisions.items() if self.place[p] == (stack.name, index)}
        passes = lambda: (call(module) for call in calls)  # noqa: E731
        return Block(f"{stack.name}.{key}", module, calls, [], inside, self.candidate, passes, self.context.seed)

    def _block(self, stack: Stack, index: int, live: Stream, reference: Stream) -> None:
        began = time.monotonic()
        count = len(self.walker.samples)
        gated = count if self.technique.fits_outputs else min(NUM_GATED, count)
        block = self._block_at(stack, index, list(self.walker.calls(stack, index, live)))
        # every call is found before any output is replaced
        wanted = list(self.walker.calls(stack, index, reference, gated))
        with block.in_memory():
            reference.outputs = [call(block.module) for call in wanted]
        block.targets = reference.outputs
        finding = self.memory.load(stack.name, index, block)
        if finding is None:
            finding = self._solve(block)
            self.memory.save(stack.name, index, block, finding)
        with block.in_memory():
            live.outputs = [call(block.module) for call in block.calls]
        plain = "" if finding["plain"] is None else f" (plain rounding {finding['plain']:.2e})"
        notes = "".join(f"; {note}" for note in finding["notes"])
        notes += told(finding["routed"], finding["starved"])
        self._note_experts(finding)
        seconds = time.monotonic() - began
        self.context.progress.say(f"{block.name}: error {finding['error']:.2e}{plain}{notes}, {seconds:.1f} s")

    def _solve(self, block: Block) -> dict[str, Any]:
        """Solve a block, compare with plain rounding on the gated samples, and fall back where that is better."""
        streamed = self.candidate.weights is not None  # then the values are read again
        before = {parameter: block.weight(parameter) for parameter in block.decisions if not streamed}
        before = {parameter: values.clone() for parameter, values in before.items()}
        gate = replace(block, calls=block.calls[:NUM_GATED], targets=block.targets[:NUM_GATED])
        plain_error = None
        plain = self.technique.plain_codes(block)
        if plain:
            for parameter, codes in plain.items():
                self.candidate.set_quantized(parameter, codes)
            plain_error = gate.output_error()
            for parameter in plain:
                self.candidate.unset_quantized(parameter, before.get(parameter))
        self.technique.solve(block)
        error = gate.output_error()
        if plain_error is not None and not (math.isfinite(error) and error <= GATE_SLACK * plain_error):
            block.notes.append(f"{self.technique.name} gave {error:.2e}, so it was rounded plainly")
            block.restore_weights()
            block.starved.clear()  # all are rounded like these now
            for parameter, codes in plain.items():
                block.set_quantized(parameter, codes)
            error = plain_error
        if not math.isfinite(error):
            raise TechniqueError(
                f"the outputs of {block.name} are not finite after {self.technique.name}",
                "the model overflows in float32: look at its weights with `gossamer inspect`",
            )
        found = {"error": error, "plain": plain_error, "notes": block.notes}
        return {**found, "routed": block.routed, "starved": block.starved}

    def _note_experts(self, finding: Mapping[str, Any]) -> None:
        """Hand on to the report how many tokens each expert of a block saw."""
        for name, counts in finding["routed"].items():
            starved = [words for words in finding["starved"].values() if words.startswith(f"{name}.")]
            self.candidate.routed[name] = {"tokens": list(counts), "starved": starved}

    def _outside(self) -> dict[str, Decision]:
        return {parameter: d for parameter, d in self.decisions.items() if self.place[parameter][0] is None}

    def _rest(self, live: Stream) -> None:
        """Solve the decided layers outside of all blocks from one pass with the blocks' outputs replayed."""
        outside = self._outside()
        if not outside:
            return
        passes = lambda: self.walker.replay(live)  # noqa: E731
        rest = Block("layers outside of blocks", self.candidate.module, [], [], outside, self.candidate, passes)
        if self.memory.load("", 0, rest) is None:
            self.technique.solve(rest)
            self.memory.save("", 0, rest, {"notes": rest.notes})
