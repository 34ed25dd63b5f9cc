"""The sweep itself: blocks in order, two streams of samples side by side, what is found remembered.

`blockwise.py` tells what it is for, `block.py` holds what a technique sees of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.attention import fused_attention
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.models.roles import ModelMap, Stack
from gossamer.models.spilled import Lazy, tensors_changed
from gossamer.models.walker import Call, Output, Stream, Walker, block_keys
from gossamer.run.device import CPU, in_main_memory, whole_float32
from gossamer.techniques.base import Context, Decision
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.routing import told
from gossamer.techniques.sweep_device import memory_errors
from gossamer.techniques.sweep_gates import (
    NUM_GATED,
    Found,
    expected_error,
    is_finite,
    layer_error,
    layer_inputs_of,
    original_is_broken,
    solved_is_broken,
    weight_error,
    wider,
)
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
        count = technique.num_samples(batches, decisions)
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
        self.error = 0.0  # behind the block before

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
            self._take_in(remembered, self._block_at(stack, index, []).name)
            elsewhere |= {remembered["device"]} - {self.device.type}
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
            self._record(block)
            self.memory.save(stack.name, index, block, finding)
        self._take_in(finding, block.name)
        if number + 1 < len(places) or self._outside():
            with block.in_memory(), computing(self.dtype, self.device):
                live.outputs = self._passed(places, number, LIVE, block.calls, block)
        plain = "" if finding["plain"] is None else f" (plain rounding {finding['plain']:.2e})"
        notes = "".join(f"; {note}" for note in finding["notes"])
        notes += told(finding["routed"], finding["starved"])
        passes = f"passes in {self.dtype}" + ("" if self.device.type == "cpu" else f" on {self.device}")
        seconds = time.monotonic() - began
        self.context.progress.say(
            f"{block.name}: error {finding['error']:.2e}{plain}{notes}, {passes}, {seconds:.1f} s"
        )

    def _passed(
        self, places: Sequence[tuple[Stack, int]], number: int, of: str, calls: Sequence[Call], block: Block
    ) -> Sequence[Output]:
        """Return what becomes of samples in a block: in memory if the calls are, else in the run folder's files.

        Raises ModelError where the model as it was gives NaN or infinities, TechniqueError where the solved block does.
        """

        def outputs() -> Iterator[Output]:
            for position, call in enumerate(calls):
                output = tensors_changed(full_precision(block.output(call)), in_main_memory)
                if not is_finite(output):
                    if of == REFERENCE:
                        raise original_is_broken(block.name, block.module, call.on(self.device))
                    raise solved_is_broken(block.name, self.technique.name, self.share.numbers[position])
                yield output

        return self.memory.passed(places, number, of, outputs(), share=self.share, spilled=isinstance(calls, Lazy))

    def _solve(self, block: Block) -> dict[str, Any]:
        """Solve a block; where a gate does not hold, take the next safer option (`sweep_gates.py`) and note it."""
        streamed = self.candidate.weights is not None  # then the values are read again
        before = {parameter: self.candidate.values(parameter) for parameter in block.inside if not streamed}
        before = {parameter: values.clone() for parameter, values in before.items()}
        found = self._at_width(block, before)
        widened: dict[str, QuantSpec] = {}
        grids: dict[str, QuantSpec | None] = {
            parameter: decision.weight for parameter, decision in block.inside.items()
        }
        while found.beyond_expected and (wide := self._wider(block)):
            shown = ", ".join(sorted({f"{(grids | widened)[name]} to {spec}" for name, spec in wide.items()}))
            block.notes.append(f"{found.in_words}, so its grids were widened from {shown}")
            widened |= wide
            self._undo(block, before)
            found = self._at_width(block, before)
        if not math.isfinite(found.error):
            raise TechniqueError(
                f"the outputs of {block.name} are not finite after {self.technique.name}",
                "the model overflows in float32: look at its weights with `gossamer inspect`",
            )
        if found.beyond_expected:
            block.notes.append(f"warning: {found.in_words}")
        kept = {parameter: spec.model_dump() for parameter, spec in widened.items()}
        told_of = {
            "notes": block.notes,
            "dtype": block.dtype,
            "device": self.device.type,
            "routed": block.routed,
            "starved": block.starved,
        }
        return {"error": found.error, "plain": found.plain, "expected": found.expected, "widened": kept, **told_of}

    def _at_width(self, block: Block, before: Mapping[str, Tensor]) -> Found:
        """Solve a block on the grids that it has, again with more damping where that failed, or round it plainly."""
        plain, weights = self._plainly(block)
        plain_error = self._error_of(block, plain, before) if plain else None
        expected = expected_error(self.error, weights.values())
        block.dtype = self._dtype(block, plain_error)
        found = Found(self._tried(block, self.technique), plain_error, expected)
        safer = self.technique.with_more_damping()
        if found.beyond_plain and safer is not None:
            self._undo(block, before)
            again = replace(found, error=self._tried(block, safer))
            with_more = f"with ten times the damping {again.error:.2e}"
            block.notes.append(f"{self.technique.name} gave {found.error:.2e}, {with_more}")
            found = again
        if plain_error is not None and found.beyond_plain:
            block.notes.append(f"{self.technique.name} gave {found.error:.2e}, so it was rounded plainly")
            block.restore_weights()
            block.starved.clear()  # all are rounded like these now
            for parameter, codes in plain.items():
                block.set_quantized(parameter, codes)
            found = replace(found, error=plain_error)
        return found

    def _plainly(self, block: Block) -> tuple[dict[str, Quantized], dict[str, float]]:
        """Return plain rounding's codes of all layers in a block, and what they do to each weight."""
        mine = {parameter: codes.to(CPU) for parameter, codes in self.technique.plain_codes(block).items()}
        errors = {parameter: weight_error(block.weight(parameter), codes) for parameter, codes in mine.items()}
        told_of = {parameter: error for theirs in block.team.gathered(errors) for parameter, error in theirs.items()}
        # in one order everywhere: sums must agree between processes
        return shared_codes(block.team, mine), {name: told_of[name] for name in block.inside if name in told_of}

    def _error_of(self, block: Block, codes: Mapping[str, Quantized], before: Mapping[str, Tensor]) -> float:
        """Return the error behind a block with some codes in it, which are taken out again."""
        for parameter, found in codes.items():
            self.candidate.set_quantized(parameter, found)
        error = block.output_error(NUM_GATED)
        for parameter in codes:
            self.candidate.unset_quantized(parameter, before.get(parameter))
        return error

    def _tried(self, block: Block, technique: BlockTechnique) -> float:
        """Solve a block, and return the error behind it."""
        noted, block.notes = block.notes, []  # what others know already is not exchanged again
        technique.solve(block)
        block.exchange()
        block.notes = list(dict.fromkeys([*noted, *block.notes]))
        return block.output_error(NUM_GATED)

    def _undo(self, block: Block, before: Mapping[str, Tensor]) -> None:
        """Put a block back as it was before it was solved."""
        block.restore_weights()
        for parameter in block.solved:
            self.candidate.unset_quantized(parameter, before.get(parameter))
        for found in (block.solved, block.starved, block.routed):
            found.clear()

    def _wider(self, block: Block) -> dict[str, QuantSpec]:
        """Give the layers of a block the next width that the files can hold, and return which got one."""
        found: dict[str, QuantSpec] = {}
        for parameter, decision in block.inside.items() if self.technique.takes_widths else ():
            spec = wider(decision.weight, decision.layer, self.context.holds) if decision.weight is not None else None
            if spec is not None:
                found[parameter] = spec
        block.inside = _with_grids(block.inside, found)
        block.decisions = _with_grids(block.decisions, found)
        return found

    def _take_in(self, finding: Mapping[str, Any], name: str) -> None:
        """Go on behind a block: what the next one starts from, and what the report tells of this one."""
        self.dtype, self.error = finding["dtype"], finding["error"]
        self.candidate.fallbacks += [f"{name}: {note}" for note in finding["notes"]]
        for parameter, spec in finding["widened"].items():
            self.candidate.widened[parameter] = QuantSpec.model_validate(spec)
        self._note_experts(finding)

    def _record(self, block: Block) -> None:
        """Tell the journal what was done in a block instead of what was asked."""
        if self.memory.run is not None:
            for note in block.notes:
                self.memory.run.record("fallback", step=self.technique.name, block=block.name, note=note)

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
        finding = self.memory.load("", 0, rest)
        if finding is None:
            self._solve_rest(rest)
            self._record(rest)
            finding = {"notes": rest.notes}
            self.memory.save("", 0, rest, finding)
        for note in finding["notes"]:
            self.context.progress.say(f"{rest.name}: {note}")
            self.candidate.fallbacks.append(f"{rest.name}: {note}")

    def _solve_rest(self, rest: Block) -> None:
        """Solve layers outside of blocks; one that comes out worse than by plain rounding is rounded plainly."""
        streamed = self.candidate.weights is not None
        before = {parameter: self.candidate.values(parameter) for parameter in rest.inside if not streamed}
        before = {parameter: values.clone() for parameter, values in before.items()}
        plain, weights = self._plainly(rest)
        inputs = layer_inputs_of(rest, NUM_GATED) if plain else {}
        self.technique.solve(rest)
        rest.exchange()
        for parameter, expected in weights.items():
            weight = before[parameter] if not streamed else self.candidate.plain_value(parameter)
            bias = f"{parameter.rpartition('.')[0]}.bias"
            error, of_plain = (
                layer_error(rest.team, inputs.get(parameter, ()), weight, codes, shift)
                for codes, shift in ((rest.solved[parameter], rest.moved(bias)), (plain[parameter], None))
            )
            found = Found(error, of_plain, expected_error(0.0, [expected]))
            if found.beyond_plain:
                rest.notes.append(f"{parameter}: {self.technique.name} gave {error:.2e}, so it was rounded plainly")
                rest.restore_weights([bias])
                rest.set_quantized(parameter, plain[parameter])
                found = replace(found, error=of_plain)
            if found.beyond_expected:
                rest.notes.append(f"warning: {parameter}: {found.in_words}")


def _with_grids(decisions: Mapping[str, Decision], found: Mapping[str, QuantSpec]) -> dict[str, Decision]:
    """Return decisions with other grids for some of them."""
    return {
        parameter: replace(one, weight=found[parameter]) if parameter in found else one
        for parameter, one in decisions.items()
    }
