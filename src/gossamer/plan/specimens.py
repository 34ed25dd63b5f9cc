"""Small models to be timed in place of the whole one: a few of its blocks in a row, cut and rounded as in a recipe.

A block's time depends on its sizes and formats, not on its values, so one kind of block is timed once for all blocks of
that kind, and each place that can be cut (channels, heads) for itself. A runtime that holds no parts of models (PyTorch
folders) is given the whole model with every block cut alike.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models.candidate import Candidate
from gossamer.models.reduction import reduced
from gossamer.models.roles import Cut, Dimension, LayerInfo, ModelMap
from gossamer.models.source import Source
from gossamer.models.walker import Call, block_keys, hidden_states
from gossamer.plan.job import Job, tensors_of
from gossamer.runtimes.base import ExportRequest, Runtime
from gossamer.tasks.base import Arrays
from gossamer.techniques.base import Decision
from gossamer.techniques.quantize.grid import quantize_weight

NUM_BLOCKS = 3  # in a row: their weights do not all stay in the cache that a single block's would
INPUT = "x"
RANGE = 4.0  # of inputs with calibrated ranges: the time does not depend on it
MAX_SIZES = 12  # of a place that are told apart


@dataclass(frozen=True)
class BlockKind:
    """Describe blocks that are alike: their stack, which ones, and what can be cut in each, by place.

    `places` has for `ffn` or `heads attention` the dimension of each block, in the order of `blocks`.
    """

    stack: str
    blocks: tuple[int, ...]
    places: Mapping[str, tuple[Dimension, ...]]


@dataclass(frozen=True)
class Specimen:
    """Hold a model to be timed, the request for it, and in how many blocks it is cut."""

    candidate: Candidate
    inputs: Arrays
    request: ExportRequest
    num_blocks: int


def block_kinds(model: ModelMap, runtime: Runtime) -> list[BlockKind]:
    """Return the kinds of blocks in which the runtime can hold something smaller, each with its places."""
    inside: dict[tuple[str, int], dict[str, Dimension]] = defaultdict(dict)
    for one in model.dimensions if not model.experts else ():
        if one.block is not None and len(one.readers) == 1 and sizes_of(one, model, runtime)[:-1]:
            inside[one.stack, one.block][place_of(one)] = one
    alike: dict[Any, list[int]] = defaultdict(list)
    for (stack, block), places in inside.items():
        shapes = tuple((layer.path, layer.shape) for layer in layers_of(model, stack, block))
        alike[stack, shapes, tuple((place, one.size) for place, one in sorted(places.items()))].append(block)
    return [
        BlockKind(
            stack, tuple(blocks), {place: tuple(inside[stack, block][place] for block in blocks) for place, _ in places}
        )
        for (stack, _, places), blocks in alike.items()
    ]


def place_of(one: Dimension) -> str:
    """Return what tells the dimensions of one block apart, the same in all blocks: `ffn mlp`, `heads attention`."""
    parts = one.name.removeprefix(f"{one.stack}.").split(".")[1:]
    return " ".join([one.kind, ".".join(parts)]).strip()


def layers_of(model: ModelMap, stack: str, block: int) -> list[LayerInfo]:
    """Return the layers of one block."""
    return [layer for layer in model.layers if (layer.stack, layer.block) == (stack, block)]


def sizes_of(one: Dimension, model: ModelMap, runtime: Runtime) -> list[int]:
    """Return the sizes that a dimension may have in a runtime, at most MAX_SIZES of them, the whole one last.

    Where one number of the config holds the size of several dimensions, they are thought to be cut alike.
    """
    step = max(1, one.size // MAX_SIZES)
    step = step // 16 * 16 or step  # kernels work on 16 values at a time
    counted = range(step, one.size, step)
    smaller = [size for size in counted if runtime.cut_refusal(Cut(one, size)) is None]
    if runtime.needs_config and not all(len(each.readers) == 1 for each in said_together(one, model)):
        smaller = []
    return [*smaller, one.size]


def said_together(one: Dimension, model: ModelMap) -> list[Dimension]:
    """Return the dimensions whose size the same numbers of the config hold, itself among them."""
    return [each for each in model.dimensions if each.attributes == one.attributes and each.kind == one.kind]


class Workshop:
    """Make specimens of one kind of block of a job: uncut or with one place cut, as it is or in another format."""

    def __init__(self, job: Job, kind: BlockKind) -> None:
        self.job = job
        self.kind = kind
        self.original = job.candidate()
        self.chained = job.runtime.holds_layers
        self.taken = kind.blocks[:NUM_BLOCKS] if self.chained else kind.blocks
        container = self.original.module.get_submodule(kind.stack)
        keys = block_keys(container)
        self.prefixes = {block: f"{kind.stack}.{keys[block]}" for block in self.taken}
        self.calls = self._calls() if self.chained else []

    def specimen(self, place: str | None, size: int, decisions: Sequence[Decision]) -> Specimen:
        """Return the blocks with one place cut to a size (None: uncut), their layers rounded as decided."""
        cut = dict.fromkeys(self.kind.places[place][: len(self.taken)], range(size)) if place is not None else {}
        if not self.chained:
            candidate = reduced(self.job.candidate(), cut) if cut else self.job.candidate()
            return Specimen(candidate, self.job.latency_inputs, self.job.request(), len(self.taken))
        blocks = [copy.deepcopy(self.original.module.get_submodule(prefix)) for prefix in self.prefixes.values()]
        chain = _Chain(blocks, self.calls)
        candidate = Candidate(source=_source(chain), module=chain)
        if cut:
            candidate = reduced(candidate, {self._inside(one): units for one, units in cut.items()})
        blank = copy.deepcopy(candidate.module)  # blocks that differ in their values alone share one exported graph
        with torch.no_grad():
            for values in blank.parameters():
                values.zero_()
        candidate = replace(candidate, source=_source(blank))
        self._round(candidate, decisions)
        inputs = {INPUT: _hidden(self.calls[0]).numpy()}
        request = self.job.request()
        request = ExportRequest(self.job.task, inputs, axes={}, outputs=request.outputs[:1], cache=request.cache)
        return Specimen(candidate, inputs, request, len(self.taken))

    def _inside(self, one: Dimension) -> Dimension:
        """Return a dimension as the chain has it."""
        assert one.block is not None
        before, after = f"{self.prefixes[one.block]}.", f"blocks.{self.taken.index(one.block)}."
        members = tuple(
            replace(member, parameter=after + member.parameter.removeprefix(before)) for member in one.members
        )
        return replace(one, stack="blocks", members=members, readers=())

    def _round(self, candidate: Candidate, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            layer = decision.layer
            if layer.stack == self.kind.stack and layer.block in self.taken and decision.weight is not None:
                name = f"blocks.{self.taken.index(layer.block)}.{layer.path}"
                values = candidate.values(f"{name}.weight")
                codes = quantize_weight(values, decision.weight, transposed=layer.transposed, name=name)
                candidate.set_quantized(f"{name}.weight", codes)
                if decision.activation is not None:
                    ends = {"low": -RANGE, "high": RANGE} if decision.activation.kind == "static" else {}
                    candidate.activations[name] = decision.activation.model_copy(update=ends)

    def _calls(self) -> list[Call]:
        """Return what each of the blocks is called with for the request whose latency is the goal's."""
        found: dict[int, Call] = {}
        with ExitStack() as hooks, torch.inference_mode(mode=False), torch.no_grad():
            for block, prefix in self.prefixes.items():

                def note(_: nn.Module, args: Any, kwargs: Any, block: int = block) -> None:
                    found.setdefault(block, Call(args, kwargs))

                module = self.original.module.get_submodule(prefix)
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            inputs = tensors_of(self.job.latency_inputs)
            self.job.source.forward(self.original.module, inputs, self.job.task.output)
        return [found[block] for block in self.taken]


class _Chain(nn.Module):
    """Call blocks one after another as the model calls each, with the hidden states of the one before."""

    def __init__(self, blocks: Sequence[nn.Module], calls: Sequence[Call]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.calls = list(calls)

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states behind the last block."""
        for block, call in zip(self.blocks, self.calls, strict=True):
            x = hidden_states(_with_hidden(call, x)(block))
        return x


def _hidden_name(call: Call) -> str:
    return "hidden_states" if "hidden_states" in call.kwargs else next(iter(call.kwargs))


def _hidden(call: Call) -> Tensor:
    values = call.args[0] if call.args else call.kwargs[_hidden_name(call)]
    assert isinstance(values, Tensor)
    return values


def _with_hidden(call: Call, x: Tensor) -> Call:
    """Return the call with other hidden states."""
    if call.args:
        return Call((x, *call.args[1:]), call.kwargs)
    return Call((), {**call.kwargs, _hidden_name(call): x})


def _source(chain: nn.Module) -> Source:
    return Source.open(chain, forward=lambda module, inputs: module(inputs[INPUT]), name="blocks")
