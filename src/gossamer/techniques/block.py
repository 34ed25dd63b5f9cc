"""One block while it is solved: what it is called with, what may be changed in it, and what its output is held against.

A solver asks a Block for moments and weights and gives it codes or other values; the sweep asks it how far its output
is from the reference's. Where samples, files and devices are, and which process solves what, is the Block's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models.candidate import Candidate
from gossamer.models.moved import moved
from gossamer.models.quantized import Quantized
from gossamer.models.walker import Call, Output, hidden_states
from gossamer.run.device import CPU
from gossamer.run.team import ALONE, Team
from gossamer.techniques.base import Decision
from gossamer.techniques.quantize.moments import Moments, has_moments, layer_inputs
from gossamer.techniques.routing import shrunk, tokens_needed, tokens_of_experts
from gossamer.techniques.sweep_gates import check_inputs, overflow
from gossamer.techniques.sweep_precision import BFLOAT16, FLOAT32, NUM_TRIED, computing
from gossamer.techniques.sweep_shared import Share, share_of, shared_codes, shared_tensors, summed


class _AllSeen(Exception):  # not an error: nothing that the pass would still compute is looked at
    pass


def observe(
    layers: Mapping[str, nn.Module], passes: Iterable[Callable[[], Any]], device: torch.device = CPU
) -> dict[str, Moments]:
    """Return the moments of the inputs of some layers, on a device, over some passes, which are run here.

    Layers that are given one and the same tensor (queries, keys and values) share one Moments. A layer that no pass
    reaches is missing in the result. Passes end where the last of the layers is given its input, if the first of them
    gave each layer one input (experts may be given none, others several).
    """
    found: dict[str, Moments] = {}
    first: dict[tuple[int, str], str] = {}  # within one pass: input and patches -> the layer that counted it
    kept: list[Tensor] = []  # inputs of this pass stay alive, so that no id is given twice
    given: list[str] = []  # in this pass
    last: str | None = None

    def note(module: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
        values = inputs[0]
        kept.append(values)
        given.append(name)
        leader = first.setdefault((id(values), _patches(module)), name)
        if leader == name or found.setdefault(name, found[leader]) is not found[leader]:
            rows = layer_inputs(module, values)
            if name not in found:
                found[name] = Moments.empty(rows.shape[-1], device)
            found[name].add(rows.to(device))
        if name == last:
            raise _AllSeen

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(note, name=name)).remove)
        for number, run in enumerate(passes):
            with suppress(_AllSeen):
                run()
            if number == 0 and sorted(given) == sorted(layers):
                last = given[-1]
            for seen in (first, kept, given):
                seen.clear()
    return found


def _patches(layer: nn.Module) -> str:
    """Return what tells apart how layers cut one input into rows."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    return f"{layer.kernel_size} {layer.stride} {layer.padding} {layer.dilation}"


@dataclass
class Block:
    """Hold one block while it is solved: its calls, the decisions inside it, the reference outputs.

    `calls` are the live samples'; `targets` the reference's outputs for as many samples as are known. Both lie in main
    memory (or in files), as does what is put in place of parameters; weights, moments and outputs that are asked for
    are on `device`.
    """

    name: str
    module: nn.Module
    calls: Sequence[Call]
    targets: Sequence[Output]
    decisions: Mapping[str, Decision]  # by parameter name: what is solved here
    inside: Mapping[str, Decision]  # and all that any process solves
    candidate: Candidate
    passes: Callable[[range], Iterable[Callable[[], Any]]]
    share: Share
    owners: Mapping[str, int]
    team: Team
    seed: int = 0
    device: torch.device = CPU
    dtype: str = FLOAT32  # of the passes that observe and hand on
    solved: dict[str, Quantized] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # parameters that got other plain values
    replaced: dict[str, Tensor] = field(default_factory=dict)  # and what they were before
    notes: list[str] = field(default_factory=list)
    routed: dict[str, list[int]] = field(default_factory=dict)  # what holds experts -> tokens that each was sent
    starved: dict[str, str] = field(default_factory=dict)  # parameters of experts that saw too few -> how many

    @classmethod
    def alone(
        cls,
        name: str,
        module: nn.Module,
        calls: Sequence[Call],
        targets: Sequence[Output],
        decisions: Mapping[str, Decision],
        candidate: Candidate,
    ) -> Block:
        """Return a block that this process solves by itself, outside of a sweep."""
        passes = lambda part: (partial(call, module) for call in calls[part.start : part.stop])  # noqa: E731
        share, owners = share_of(len(calls), ALONE), dict.fromkeys(decisions, 0)
        return cls(name, module, calls, targets, decisions, decisions, candidate, passes, share, owners, ALONE)

    def moments(self) -> dict[str, Moments]:
        """Return the moments of each decided layer's input, by parameter, from one pass over the samples.

        A layer that no sample reaches (a starved expert), or whose error no second moment describes, is missing. Every
        process takes part, whatever it solves itself.
        """
        owners = {name: self.candidate.module.get_submodule(name.rpartition(".")[0]) for name in self.inside}
        layers = {name: layer for name, layer in owners.items() if has_moments(layer)}
        if not layers:
            return {}  # no pass for nothing
        with self.in_memory(), computing(self.dtype, self.device):
            observed = lambda part: observe(layers, self.passes(part), self.device)  # noqa: E731
            found = summed(self.team, self.share, observed, self.owners, self.device)
        for name, seen in found.items():
            check_inputs(self.name, self.inside[name].layer.name, seen)
        self.routed = tokens_of_experts([decision.layer for decision in self.inside.values()], found)
        shrunk(found[name] for name, one in self.decisions.items() if one.layer.experts is not None and name in found)
        return found

    def enough(self, parameter: str, seen: Moments | None, otherwise: str) -> bool:
        """Say whether a layer's moments can be used; where not, note what is done `otherwise`."""
        layer, tokens = self.decisions[parameter].layer, 0 if seen is None else seen.num_tokens
        needed = tokens_needed(layer)
        if seen is not None and tokens >= needed:
            if wrong := overflow(seen):
                self.notes.append(f"{parameter} was {otherwise}: {wrong}")
            return not wrong
        if layer.experts is None:
            self.notes.append(f"{parameter} saw no calibration token and was {otherwise}")
        else:
            self.starved[parameter] = f"{layer.name}: {tokens} of {needed} tokens, {otherwise}"
        return False

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Keep the block's weights in memory, where samples pass it, while the `with` lasts; they must not change.

        Those of a whole model are never kept, nor moved.
        """
        if not self.calls:
            yield
            return
        with self.candidate.held(self.module), moved(self.module, self.device):
            yield

    def output(self, call: Call, weights: Mapping[str, Tensor] | None = None) -> Output:
        """Return what the block answers to a call, while it is in memory; with other values for some parameters."""
        return call.on(self.device)(self.module, weights)

    def weight(self, parameter: str) -> Tensor:
        """Return a parameter's present values, in its own shape."""
        return self.candidate.values(parameter).to(self.device)

    def set_quantized(self, parameter: str, codes: Quantized) -> None:
        """Put codes in place of a parameter."""
        self.solved[parameter] = codes.to(CPU)
        self.candidate.set_quantized(parameter, self.solved[parameter])

    def set_weight(self, parameter: str, values: Tensor) -> None:
        """Put other plain values in place of a parameter, one that is not rounded here (a norm) or not yet."""
        if parameter not in self.replaced:
            self.replaced[parameter] = self.candidate.values(parameter).clone()
        self.weights[parameter] = values.detach().float().cpu().clone()
        self.candidate.put_weight(parameter, partial(self.weights.__getitem__, parameter))

    def exchange(self) -> None:
        """Put what other processes have solved in place here too, and take in their notes and counts of tokens."""
        if self.team.size == 1:
            return
        for parameter, values in shared_tensors(self.team, self.weights).items():
            if parameter not in self.weights:
                self.set_weight(parameter, values)
        self.solved, mine = {}, self.solved
        for parameter, codes in shared_codes(self.team, mine).items():
            self.set_quantized(parameter, codes)
        self.notes = [note for notes in self.team.gathered(self.notes) for note in notes]
        # each counted for the layers that it owns, and has zeros for the others
        told = self.team.gathered(self.routed)
        self.routed = {
            name: [max(counts) for counts in zip(*(one[name] for one in told), strict=True)] for name in self.routed
        }
        starved = {parameter: words for one in self.team.gathered(self.starved) for parameter, words in one.items()}
        self.starved = {parameter: starved[parameter] for parameter in self.inside if parameter in starved}

    def moved(self, parameter: str) -> Tensor | None:
        """Return by how much `set_weight` changed a parameter; None where it did not."""
        return self.weights[parameter] - self.replaced[parameter] if parameter in self.replaced else None

    def restore_weights(self, parameters: Iterable[str] | None = None) -> None:
        """Put back what `set_weight` replaced: all of it, or of some parameters."""
        for parameter in list(self.replaced if parameters is None else parameters):
            if parameter in self.replaced:
                self.candidate.put_weight(parameter, partial(_itself, self.replaced.pop(parameter)))
                del self.weights[parameter]

    def output_error(self, count: int | None = None) -> float:
        """Return how far the block's outputs are from the targets, relative to each token's size (`token_error`).

        On the first `count` of all samples, or as many as have targets.
        """
        here = len(self.targets) if count is None else self.share.first(count)
        with self.in_memory():
            pairs = zip(self.calls[:here], self.targets[:here], strict=True)
            return self._mean(
                token_error(hidden_states(self.output(call)), hidden_states(target).to(self.device))
                for call, target in pairs
            )

    def drift(self) -> float:
        """Return how far the block's outputs in bfloat16 are from those in float32, on NUM_TRIED samples."""
        errors = []
        with self.in_memory():
            for call in self.calls[: self.share.first(NUM_TRIED)]:
                exact = hidden_states(self.output(call))
                try:
                    with computing(BFLOAT16, self.device):
                        errors.append(token_error(hidden_states(self.output(call)), exact))
                except RuntimeError:  # the model's own code mixes dtypes in a way that autocast does not see
                    errors.append(torch.tensor(torch.inf))
        return self._mean(errors)

    def _mean(self, errors: Iterable[Tensor]) -> float:
        """Return the mean over the samples of all processes, added in the order of the samples."""
        told = self.team.gathered(
            [[number, float(error)] for number, error in zip(self.share.numbers, errors, strict=False)]
        )
        values: list[float] = [error for _, error in sorted(pair for theirs in told for pair in theirs)]
        return sum(values) / len(values)


def _itself(values: Tensor) -> Tensor:
    return values


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
