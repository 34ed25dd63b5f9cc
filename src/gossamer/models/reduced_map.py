"""The map of a model once dimensions of it are cut, without looking at the model: what predictions are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from gossamer.models.dimensions import cut_shapes
from gossamer.models.roles import Dimension, LayerInfo, Member, ModelMap


def reduced_map(
    model: ModelMap, sizes: Mapping[Dimension, int], blocks: Mapping[Dimension, Sequence[int]] | None = None
) -> ModelMap:
    """Return the map of a model after dimensions were cut to other sizes, without looking at the model.

    `blocks` are the numbers of those that stay in a stack. Where that is found out later the first ones are described:
    they are usually alike.
    """
    blocks = blocks or {}
    for dimension, kept in blocks.items():
        model = _in_front(model, dimension, kept)
    depth = {dimension.stack: size for dimension, size in sizes.items() if dimension.kind == "layers"}
    fewer = {dimension.name: (size, dimension.size) for dimension, size in sizes.items() if dimension.kind == "experts"}
    left = depth | {name: size for name, (size, _) in fewer.items()}
    stored = {f"{layer.name}.weight": layer.shape[::-1] if layer.transposed else layer.shape for layer in model.layers}
    after = cut_shapes(stored, {one: size for one, size in sizes.items() if one.kind != "layers"}, missing=True)
    others = {name: removed for name, removed in _lost_values(sizes).items() if name not in stored}
    narrower = {
        member.parameter.rpartition(".")[0]: (one.size, size)
        for one, size in sizes.items()
        if one.kind == "width"
        for member in one.members
        if member.parameter not in stored and not member.parameter.endswith(".bias")
    }
    layers = tuple(
        _narrower_tokens(layer, *narrower[layer.name])
        if layer.name in narrower
        else _smaller_layer(layer, after, others, fewer)
        for layer in model.layers
        if not _goes(layer.name, left)
    )
    inside = {stack.name: stack for stack in model.stacks}
    lost = sum(layer.num_parameters for layer in model.layers) - sum(layer.num_parameters for layer in layers)
    attended = model.macs - sum(layer.macs for layer in model.layers)
    share = _attention_left(model, sizes, depth)
    stacks = tuple(
        replace(
            stack,
            num_blocks=depth.get(name, stack.num_blocks),
            num_parameters=sum(one.num_parameters for one in layers if one.stack == name and one.block == 0),
        )
        for name, stack in inside.items()
    )
    bytes_each = model.num_bytes / max(1, model.num_parameters)
    return replace(
        model,
        layers=layers,
        stacks=stacks,
        num_parameters=model.num_parameters - lost,
        num_bytes=round((model.num_parameters - lost) * bytes_each),
        macs=sum(layer.macs for layer in layers) + round(attended * share),
        dimensions=tuple(
            _smaller_dimension(one, sizes, left, blocks.get(one))
            for one in model.dimensions
            if not _goes(one.name, left)
        ),
        experts=tuple(
            replace(one, num_experts=left.get(one.name, one.num_experts))
            for one in model.experts
            if not _goes(one.name, left)
        ),
    )


def _in_front(model: ModelMap, dimension: Dimension, kept: Sequence[int]) -> ModelMap:
    """Return the map with the blocks of a stack that stay in front, under the numbers that they will have."""
    stack = dimension.stack
    order = [*kept, *(number for number in range(dimension.size) if number not in kept)]
    numbers = {before: after for after, before in enumerate(order)}

    def named(name: str) -> str:
        index, dot, rest = name.removeprefix(f"{stack}.").partition(".")
        inside = name.startswith(f"{stack}.") and index.isdigit()
        return f"{stack}.{numbers[int(index)]}{dot}{rest}" if inside else name

    def placed(member: Member) -> Member:
        return replace(member, parameter=named(member.parameter))

    def number(one: LayerInfo | Dimension) -> int | None:
        return numbers[one.block] if one.stack == stack and one.block is not None else one.block

    return replace(
        model,
        layers=tuple(
            replace(
                one,
                name=named(one.name),
                block=number(one),
                stack=named(one.stack) if one.stack is not None else None,
                tied_to=named(one.tied_to) if one.tied_to is not None else None,
                experts=named(one.experts) if one.experts is not None else None,
            )
            for one in model.layers
        ),
        stacks=tuple(replace(one, name=named(one.name)) for one in model.stacks),
        dimensions=tuple(
            replace(
                one,
                name=named(one.name),
                block=number(one),
                stack=named(one.stack),
                members=tuple(map(placed, one.members)),
                readers=tuple(map(named, one.readers)),
                buffers=tuple(map(placed, one.buffers)),
            )
            for one in model.dimensions
        ),
        experts=tuple(
            replace(one, name=named(one.name), routers=tuple(map(named, one.routers))) for one in model.experts
        ),
    )


def _lost_values(sizes: Mapping[Dimension, int]) -> dict[str, int]:
    """Return how many values every parameter other than a weight loses."""
    lost: dict[str, int] = {}
    for dimension, size in sizes.items():
        for member in dimension.members:
            if not member.parameter.endswith(".weight"):
                gone = (dimension.size - size) * member.unit * member.width
                lost[member.parameter] = lost.get(member.parameter, 0) + gone
    return lost


def _smaller_layer(
    layer: LayerInfo,
    after: Mapping[str, tuple[int, ...]],
    others: Mapping[str, int],
    fewer: Mapping[str, tuple[int, int]],
) -> LayerInfo:
    now = after[f"{layer.name}.weight"]
    shape = now[::-1] if layer.transposed else now
    before, left = prod(layer.shape), prod(shape)
    lost = before - left + sum(count for name, count in others.items() if name.rpartition(".")[0] == layer.name)
    count = layer.num_parameters - lost if layer.tied_to is None else layer.num_parameters
    if layer.name in fewer:  # what holds experts has parameters of its own, a row for each
        shape = (fewer[layer.name][0], *shape[1:])
    groups = shape[0] if 1 < layer.groups == layer.shape[0] else layer.groups  # one channel in each
    stay, were = fewer.get(layer.experts or "", (1, 1))  # those that stay share the tokens of all
    macs = round(layer.macs * left / max(1, before) * were / stay)
    return replace(layer, shape=shape, num_parameters=count, macs=macs, groups=groups)


def _narrower_tokens(layer: LayerInfo, before: int, size: int) -> LayerInfo:
    """Return a module that holds parameters of its own (a class token, positions), all as wide as the stream."""
    shape = (*layer.shape[:-1], size) if layer.shape[-1] == before else layer.shape
    return replace(layer, shape=shape, num_parameters=layer.num_parameters * size // before)


def _attention_left(model: ModelMap, sizes: Mapping[Dimension, int], depth: Mapping[str, int]) -> float:
    """Return the share of the products of attention that is left, by heads and blocks."""
    heads = [one for one in model.dimensions if one.kind == "heads"]
    before = sum(one.size for one in heads)
    cut = sum(one.size - sizes.get(one, one.size) for one in heads) / before if before else 0.0
    if before and all(one.block is not None for one in heads):
        gone = sum(one.size for one in heads if one.block is not None and one.block >= depth.get(one.stack, before))
        return 1 - cut - gone / before
    blocks = sum(stack.num_blocks for stack in model.stacks)
    left = sum(depth.get(stack.name, stack.num_blocks) for stack in model.stacks)
    return (1 - cut) * left / blocks if blocks else 1 - cut


def _smaller_dimension(
    dimension: Dimension, sizes: Mapping[Dimension, int], left: Mapping[str, int], blocks: Sequence[int] | None
) -> Dimension:
    """Return a dimension after cuts: members move up by what goes in front of them, or go with block or expert.

    `blocks` are its units that stay, where it is a stack of which they are known: those that cannot go move up too.
    """

    def moved(member: Member) -> Member:
        removed = sum(
            (one.size - size) * other.unit
            for one, size in sizes.items()
            for other in (*one.members, *one.buffers)
            if (other.parameter, other.axis) == (member.parameter, member.axis) and other.offset < member.offset
        )
        return replace(member, offset=member.offset - removed)

    return replace(
        dimension,
        size=sizes.get(dimension, dimension.size),
        held=dimension.held if blocks is None else tuple(map(blocks.index, dimension.held)),
        members=tuple(moved(one) for one in dimension.members if not _goes(one.parameter, left)),
        readers=tuple(reader for reader in dimension.readers if not _goes(reader, left)),
        buffers=tuple(moved(one) for one in dimension.buffers if not _goes(one.parameter, left)),
    )


def _goes(name: str, left: Mapping[str, int]) -> bool:
    """Say whether a name lies in a block of a stack, or an expert, of which there are fewer afterwards."""
    for holder, count in left.items():
        index = name.removeprefix(f"{holder}.").partition(".")[0]
        if name.startswith(f"{holder}.") and index.isdigit() and int(index) >= count:
            return True
    return False
