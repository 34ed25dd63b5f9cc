"""The width of a residual stream: every axis of every parameter that runs along its channels, and goes together.

A second pass (`dataflow.py`) follows every layer, norms too, and every parameter that stands outside of layers (a class
token, positions). What is added to, multiplied with, normalised from or read from something has the same channels as
it: axes are joined wherever one layer's output reaches another layer's input,

    embedding [V, H]    o, down [H, I]    norm [H]    q, k, v, up, gate, head [O, H]    patches [H, C, P, P]

and those joined with what o and down write are one dimension. Heads keep their size: rows of q, k and v are joined with
nothing but columns of o. Whether a config says it is tried out (`stock.py`): most classes derive the size of a head
from the hidden size, and only those that also take `head_dim` can be narrower with heads as they are.

Left out, with a note: streams that are read in pieces (concatenated, as between stages of Swin), and streams that the
model gives back as they are (an encoder without a head).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.models.dataflow import follow
from gossamer.models.dimensions import cut_shapes
from gossamer.models.purpose import named
from gossamer.models.roles import Dimension, LayerInfo, Member
from gossamer.models.stock import Change, Shapes, Stock, shapes_of

Axis = tuple[int, int]  # identity of a parameter, axis
WRITERS = frozenset(("o", "down", "expert_down"))
EXPERTS = frozenset(("expert_up", "expert_gate", "expert_down"))
SIZES_TRIED = 128  # of those that a config may take


def find_widths(
    module: nn.Module,
    layers: Sequence[LayerInfo],
    example: Mapping[str, Tensor],
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None,
) -> tuple[tuple[Dimension, ...], list[str]]:
    """Return the widths of a model's residual streams (one, or one for each half of it), and notes on what is unclear.

    >>> find_widths(model, layers, example, None)[0][0].size  # doctest: +SKIP
    768
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return (), ["widths are not looked for in a model that is read piece by piece: raise --memory to cut them"]
    known = {layer.name: layer for layer in layers if layer.kind != "other"}
    alone = {
        name: value
        for name, value in module.named_parameters()
        if name.rpartition(".")[0] not in known and value.dim() > 0
    }
    flow = follow(module, {name: module.get_submodule(name) for name in known}, example, forward, parameters=alone)
    axes = _Axes(module, known, alone)
    torn: dict[str, str] = {}  # what a layer reads in pieces -> the layer
    for name, origin in flow.feeds.items():
        for feeder in origin.layers:
            if not axes.join(axes.output(feeder), axes.input(name)):
                torn[feeder] = name
    axes.join_experts(known.values())
    given = {axes.root(axes.output(name)) for origin in flow.outputs[:1] for name in origin.layers}
    notes: list[str] = []
    found = []
    for root in dict.fromkeys(axes.root(axes.output(layer.name)) for layer in known.values() if layer.role in WRITERS):
        one = _dimension(module, known, axes, root)
        unclear = [
            f"{feeder}, read by {reader}" for feeder, reader in torn.items() if axes.root(axes.output(feeder)) == root
        ]
        if root in given:
            notes.append(f"the model gives back the residual stream of {one.name} itself, so that its width is not cut")
        elif unclear:
            notes.append(
                f"the residual stream of {one.name} is read in pieces, so that it is not cut: {named(unclear)}"
            )
        else:
            found.append(one)
    return tuple(_said_by_config(module, found)), notes


class _Axes:
    """Join axes of parameters that run along the same channels."""

    def __init__(self, module: nn.Module, layers: Mapping[str, LayerInfo], alone: Mapping[str, Tensor]) -> None:
        self.module, self.layers, self.alone = module, layers, alone
        self._parents: dict[Axis, Axis] = {}
        self._sizes: dict[Axis, int] = {}
        for name in layers:
            bias, weight = self._parameter(name, "bias"), self._parameter(name, "weight")
            if bias is not None and weight is not None:
                self.join((id(bias), 0), self.output(name), sizes=(bias.shape[0], self.size(self.output(name))))

    def _parameter(self, name: str, local: str) -> Tensor | None:
        return self.module.get_submodule(name)._parameters.get(local)

    def size(self, axis: Axis) -> int:
        """Return how many channels an axis has."""
        return self._sizes[axis]

    def output(self, name: str) -> Axis:
        """Return the axis of what a layer writes, or the last one of a parameter that stands alone."""
        if name in self.alone:
            return self._noted(self.alone[name], self.alone[name].dim() - 1)
        layer, weight = self.layers[name], self._parameter(name, "weight")
        assert weight is not None
        last = layer.kind == "embedding" or layer.transposed
        return self._noted(weight, weight.dim() - 1 if last else 0)

    def input(self, name: str) -> Axis:
        """Return the axis of what a layer reads; an embedding reads no channels, and its rows stand for that."""
        layer, weight = self.layers[name], self._parameter(name, "weight")
        assert weight is not None
        if layer.kind == "norm" or layer.transposed or layer.kind == "embedding":
            return self._noted(weight, 0)
        return self._noted(weight, 1)

    def _noted(self, parameter: Tensor, axis: int) -> Axis:
        self._sizes[id(parameter), axis] = parameter.shape[axis]
        return id(parameter), axis

    def join(self, one: Axis, other: Axis, sizes: tuple[int, int] | None = None) -> bool:
        """Say that two axes are one; False where their sizes say that they are not."""
        first, second = sizes or (self._sizes[one], self._sizes[other])
        if first != second:
            return False
        self._parents[self.root(one)] = self.root(other)
        return True

    def join_experts(self, layers: Any) -> None:
        """Join the experts of a stack, some of which no token of the example reached."""
        like: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for layer in layers:
            if layer.role in EXPERTS:
                like[layer.stack, layer.role, layer.shape].append(layer.name)
        for first, *others in like.values():
            for name in others:
                self.join(self.input(first), self.input(name))
                self.join(self.output(first), self.output(name))

    def root(self, axis: Axis) -> Axis:
        """Return the axis that stands for all that are joined with this one."""
        while (parent := self._parents.get(axis, axis)) != axis:
            axis = parent
        return axis

    def members(self, root: Axis) -> Iterator[Member]:
        """Yield every axis that is joined with this one, under each name that its parameter has."""
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            for axis in range(parameter.dim()):
                if self.root((id(parameter), axis)) == root:
                    yield Member(name, axis)


def _dimension(module: nn.Module, layers: Mapping[str, LayerInfo], axes: _Axes, root: Axis) -> Dimension:
    members = tuple(axes.members(root))
    known = {f"{layer.name}.weight": layer for layer in layers.values()}
    readers = [
        member.parameter
        for member in members
        if (layer := known.get(member.parameter)) is not None
        and layer.kind == "linear"
        and layer.experts is None
        and member.axis == (0 if layer.transposed else 1)
    ]
    stacks = dict.fromkeys(
        layer.stack for layer in layers.values() if layer.stack and axes.root(axes.output(layer.name)) == root
    )
    name = ", ".join(stack for stack in stacks if stack)
    return Dimension("width", name, next(iter(stacks), None) or "", None, axes.size(root), members, tuple(readers))


def _said_by_config(module: nn.Module, found: Sequence[Dimension]) -> Iterator[Dimension]:
    """Yield widths with the numbers of the config that hold them: each by itself, or one for all of a size."""
    if not isinstance(module, PreTrainedModel):
        yield from found
        return
    stock, shapes = Stock(module), shapes_of(module)
    by_size: dict[int, list[Dimension]] = defaultdict(list)
    for one in found:
        told = _told(stock, shapes, [one])
        if told is None:
            by_size[one.size].append(one)
        else:
            yield told[0]
    for alike in by_size.values():
        told = _told(stock, shapes, alike) if len(alike) > 1 else None
        yield from told or [replace(one, attributes=()) for one in alike]


def _told(stock: Stock, shapes: Shapes, alike: Sequence[Dimension]) -> list[Dimension] | None:
    """Return widths with the numbers that hold them; None where no config says them narrower, heads as they are."""
    size = alike[0].size
    for trial in (size // part for part in (2, 3) if size % part == 0 and size > part):
        wanted = cut_shapes(shapes, dict.fromkeys(alike, trial))
        fit = stock.fit(wanted, {size: trial}, said=head_sizes(stock, size))
        if fit is None or fit.differs:
            continue
        step = max(1, size // SIZES_TRIED)

        def change(number: int, numbers: Mapping[Any, int] = fit.change.numbers, trial: int = trial) -> Change:
            return Change({path: number if value == trial else value for path, value in numbers.items()})

        takes = tuple(number for number in range(step, size, step) if stock.accepts(change(number)))
        return [replace(one, attributes=fit.change.names(), sizes=takes) for one in alike]
    return None


def head_sizes(stock: Stock, width: int) -> tuple[int, ...]:
    """Return what a head's size may be where a config leaves it open: the width by a number of heads."""
    heads = {number for path, number in stock.numbers.items() if number and "head" in path[-1]}
    return tuple(sorted({width // number for number in heads if width % number == 0}))
