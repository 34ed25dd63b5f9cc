"""The sweep itself: blocks in order, two streams of samples side by side, what is found remembered.

`blockwise.py` tells what it is for, and holds what a technique sees of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gossamer.errors import TechniqueError
from gossamer.models.attention import fused_attention
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap, Stack
from gossamer.models.spilled import Lazy, tensors_changed
from gossamer.models.walker import Call, Output, Stream, Walker, block_keys
from gossamer.run.device import in_main_memory, whole_float32
from gossamer.techniques.base import Context, Decision
from gossamer.techniques.blockwise import Block, BlockTechnique
from gossamer.techniques.routing import told
from gossamer.techniques.sweep_device import memory_errors
from gossamer.techniques.sweep_memory import LIVE, REFERENCE, SweepMemory
from gossamer.techniques.sweep_precision import (
    BFLOAT16,
    FLOAT32,
    allowed_drift,
    computing,
    full_precision,
    worth_trying,
)
from gossamer.techniques.sweep_samples import Samples
from gossamer.techniques.sweep_shared import owners_of, share_of, shared_codes

NUM_GATED = 4  # samples on which the error behind each block is measured
GATE_SLACK = 1.05  # a solved block may be so much worse than plain rounding, by the noise of few samples


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
        if context.team.size > 1 and technique.fits_outputs:
            raise TechniqueError(
                f"{technique.name} looks at all samples at once: {context.team.size} processes cannot share them",
                "start one process, without torchrun",
            )
        self.share = share_of(count, context.team)
        picked = [batches[number * len(batches) // count] for number in self.share.numbers]
        samples = [{name: torch.from_numpy(values) for name, values in batch.inputs.items()} for batch in picked]
        source, output = candidate.source, context.task.output
        self.walker = Walker(candidate.module, lambda module, inputs: source.forward(module, inputs, output), samples)
        applied = [*candidate.applied, technique.entry()]
        self.memory = SweepMemory(context.run, {**context.identity, "applied": applied}, context.team)
        self.device = context.device
        self.samples = Samples(context.samples_memory, self.memory.scratch, pinned=self.device.type != "cpu")
        self.dtype = FLOAT32  # of the passes of the block before

    def run(self) -> None:
        """Solve the blocks in order, then what stands outside of them; goes on where a killed run stopped."""
        places = [(stack, index) for stack in self.stacks for index in range(stack.num_blocks)]
        live, reference = Stream(), Stream()
        with (
            self.candidate.simulated(),
            fused_attention(self.candidate.module),
            whole_float32(self.device),
            memory_errors(self.technique.label(), self.device),
            torch.no_grad(),
            self.context.progress.stage(f"{self.technique.name}: blocks", len(places) + 1) as advance,
        ):
            passed = self._resume(places, live, reference)
            advance(passed)
            for number in range(passed, len(places)):
                stack, index = places[number]
                self._block(places, number, live, reference)
                if index == stack.num_blocks - 1:
                    live.finish(stack.name)
                    reference.finish(stack.name)
                self.memory.forget_streams(places, number - 1)
                advance(1)
            self._rest(live)
            self.memory.forget_streams(places)
            advance(1)

    def _resume(self, places: Sequence[tuple[Stack, int]], live: Stream, reference: Stream) -> int:
        """Put back what an earlier run finished; return how many blocks were passed, their codes in place."""
        if self.memory.solved_all(places, bool(self._outside())):
            passed = len(places)  # nothing but codes is needed
        else:
            passed = self.memory.load_streams(places, live, reference, self.share)
        elsewhere: set[str] = set()
        for stack, index in places[:passed]:
            remembered = self.memory.load(stack.name, index, self._block_at(stack, index, []))
            assert remembered is not None, f"{stack.name} {index} was passed, but its codes are gone"
            self.dtype = remembered["dtype"]
            elsewhere |= {remembered["device"]} - {self.device.type}
            self._note_experts(remembered)
        if elsewhere and passed < len(places):  # what is finished stays: it is as good, but for the last bits
            self.context.progress.say(
                f"{self.technique.name}: {passed} blocks are finished, some of them on {', '.join(sorted(elsewhere))}, "
                f"and {self.device.type} goes on: last bits may differ from those of one device alone"
            )
        return passed

    def _block_at(self, stack: Stack, index: int, calls: Sequence[Call]) -> Block:
        container = self.candidate.module.get_submodule(stack.name)
        key = block_keys(container)[index]
        module = container.get_submodule(key)
        inside = {p: d for p, d in self.decisions.items() if self.place[p] == (stack.name, index)}
        device = self.device
        passes = lambda part: (partial(call.on(device), module) for call in calls[part.start : part.stop])  # noqa: E731
        return self._of(f"{stack.name}.{key}", module, calls, inside, passes)

    def _of(
        self,
        name: str,
        module: nn.Module,
        calls: Sequence[Call],
        inside: Mapping[str, Decision],
        passes: Callable[[range], Iterable[Callable[[], Any]]],
    ) -> Block:
        team = self.context.team
        owners = owners_of(inside.values(), team, split=self.technique.layer_by_layer)
        mine = {parameter: decision for parameter, decision in inside.items() if owners[parameter] == team.rank}
        return Block(
            name, module, calls, [], mine, inside, self.candidate, passes, self.share, owners, team,
            self.context.seed, self.device,
        )  # fmt: skip

    def _block(self, places: Sequence[tuple[Stack, int]], number: int, live: Stream, reference: Stream) -> None:
        began = time.monotonic()
        stack, index = places[number]
        count = len(self.walker.samples)
        gated = count if self.technique.fits_outputs else self.share.first(NUM_GATED)
        find = partial(self.walker.calls, stack, index)
        block = self._block_at(stack, index, self.samples.calls(find, live, count + gated))
        # every call is found before any output is replaced
        wanted = self.samples.calls(partial(find, count=gated), reference, count + gated)
        with block.in_memory():
            reference.outputs = self._passed(places, number, REFERENCE, wanted, block)
        block.targets = reference.outputs
        finding = self.memory.load(stack.name, index, block)
        if finding is None:
            finding = self._solve(block)
            self.memory.save(stack.name, index, block, finding)
        self.dtype = finding["dtype"]
        if number + 1 < len(places) or self._outside():
            with block.in_memory(), computing(self.dtype, self.device):
                live.outputs = self._passed(places, number, LIVE, block.calls, block)
        plain = "" if finding["plain"] is None else f" (plain rounding {finding['plain']:.2e})"
        notes = "".join(f"; {note}" for note in finding["notes"])
        notes += told(finding["routed"], finding["starved"])
        self._note_experts(finding)
        passes = f"passes in {self.dtype}" + ("" if self.device.type == "cpu" else f" on {self.device}")
        seconds = time.monotonic() - began
        self.context.progress.say(
            f"{block.name}: error {finding['error']:.2e}{plain}{notes}, {passes}, {seconds:.1f} s"
        )

    def _passed(
        self, places: Sequence[tuple[Stack, int]], number: int, of: str, calls: Sequence[Call], block: Block
    ) -> Sequence[Output]:
        """Return what becomes of samples in a block: in memory if the calls are, else in the run folder's files."""
        outputs = (tensors_changed(full_precision(block.output(call)), in_main_memory) for call in calls)
        return self.memory.passed(places, number, of, outputs, share=self.share, spilled=isinstance(calls, Lazy))

    def _solve(self, block: Block) -> dict[str, Any]:
        """Solve a block, compare with plain rounding on the gated samples, and fall back where that is better."""
        streamed = self.candidate.weights is not None  # then the values are read again
        before = {parameter: self.candidate.values(parameter) for parameter in block.inside if not streamed}
        before = {parameter: values.clone() for parameter, values in before.items()}
        plain_error = None
        plain = shared_codes(block.team, self.technique.plain_codes(block))
        if plain:
            for parameter, codes in plain.items():
                self.candidate.set_quantized(parameter, codes)
            plain_error = block.output_error(NUM_GATED)
            for parameter in plain:
                self.candidate.unset_quantized(parameter, before.get(parameter))
        block.dtype = self._dtype(block, plain_error)
        self.technique.solve(block)
        block.exchange()
        error = block.output_error(NUM_GATED)
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
        found = {"error": error, "plain": plain_error, "notes": block.notes, "dtype": block.dtype}
        found["device"] = self.device.type
        return {**found, "routed": block.routed, "starved": block.starved}

    def _note_experts(self, finding: Mapping[str, Any]) -> None:
        """Hand on to the report how many tokens each expert of a block saw."""
        told_of = finding["starved"]
        starved = [told_of[parameter] for parameter in self.decisions if parameter in told_of]  # the same after a kill
        for name, counts in finding["routed"].items():
            mine = [words for words in starved if words.startswith(f"{name}.")]
            self.candidate.routed[name] = {"tokens": list(counts), "starved": mine}

    def _dtype(self, block: Block, plain_error: float | None) -> str:
        """Return what the passes that observe this block and hand its outputs on compute in."""
        wanted = self.technique.calibration_dtype
        if not block.team.everywhere(worth_trying(wanted, self.device)):
            return FLOAT32 if wanted == "auto" else wanted
        return BFLOAT16 if block.drift() <= allowed_drift(plain_error) else FLOAT32

    def _outside(self) -> dict[str, Decision]:
        return {parameter: d for parameter, d in self.decisions.items() if self.place[parameter][0] is None}

    def _rest(self, live: Stream) -> None:
        """Solve the decided layers outside of all blocks from one pass with the blocks' outputs replayed."""
        outside = self._outside()
        if not outside:
            return
        passes = lambda part: (partial(self.walker.replay, live, position) for position in part)  # noqa: E731
        rest = self._of("layers outside of blocks", self.candidate.module, [], outside, passes)
        rest.dtype = self.dtype
        if self.memory.load("", 0, rest) is None:
            self.technique.solve(rest)
            rest.exchange()
            self.memory.save("", 0, rest, {"notes": rest.notes})
