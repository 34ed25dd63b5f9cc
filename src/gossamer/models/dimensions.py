"""What can be cut out of a model without a mask: dimensions that run through several parameters, and go together.

    ffn     channels of a feed-forward network: rows of up and gate with their biases, columns of down
    heads   heads of an attention: rows of q, k, v, columns of o; queries that share keys and values go with them
    layers  whole blocks of a stack
    experts whole experts of a block, with their rows of its router
    vocabulary  rows of the embedding, the head and its bias, one for each token (`embeddings.py`)

They are read from the roles that the data flow showed, not from a list of architectures. Whether the model's own class
can be built with fewer units is tried on its config (`stock.py`): where it holds one number for all blocks, the same
number must go everywhere; parameters that follow the same number (T5's position bias has a column for each head) are
found as what still differs, and go with them. Where no number says it, only runtimes that hold a graph can hold it.

Heads whose queries, keys and values come out of one layer are found by trial (`fused_heads.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from math import prod
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gossamer.models.dataflow import Flow
from gossamer.models.embeddings import find_vocabulary
from gossamer.models.purpose import named
from gossamer.models.roles import Cuttable, Dimension, Experts, LayerInfo, Member, Stack
from gossamer.models.stock import Change, Fit, Shapes, Stock, shapes_of

EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k", "moe_top_k", "num_selected_experts", "top_k_experts")


def find_dimensions(
    module: nn.Module,
    layers: Sequence[LayerInfo],
    stacks: Sequence[Stack],
    flow: Flow | None,
    fused: Mapping[str, Dimension] | None = None,
    experts: Sequence[Experts] = (),
) -> tuple[tuple[Dimension, ...], list[str]]:
    """Return the dimensions of a model whose layers have roles, and notes on what is not understood.

    `fused` are the heads of attentions with one layer for queries, keys and values, by its name.

    >>> find_dimensions(model, layers, stacks, flow)[0][0].size  # doctest: +SKIP
    1536
    """
    notes: list[str] = []
    shapes = shapes_of(module)
    inside = [*_networks(layers, shapes, notes), *_attentions(layers, shapes, flow, fused or {}, notes)]
    stock = Stock(module) if isinstance(module, PreTrainedModel) else None
    found = [*_said_by_config(stock, shapes, inside, notes), *_depths(module, stock, shapes, stacks)]
    found += _experts(module, stock, shapes, layers, experts, notes)
    found += find_vocabulary(stock, shapes) if stock is not None else ()
    deep = {one.stack for one in found if one.kind == "layers"}
    if whole := [stack.name or "the model itself" for stack in stacks if stack.name not in deep]:
        notes.append(f"stacks whose blocks cannot be fewer (shared, or the config does not count them): {named(whole)}")
    return tuple(found), notes


def cut_shapes(shapes: Shapes, sizes: Mapping[Dimension, int], *, missing: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters after dimensions were cut to other sizes; some may be `missing` among them.

    >>> cut_shapes({"up.weight": (8, 4)}, {dimension: 2})  # doctest: +SKIP
    {'up.weight': (2, 4)}
    """
    found = {name: list(shape) for name, shape in shapes.items()}
    for dimension, size in sizes.items():
        for member in dimension.members:
            if missing and member.parameter not in found:
                continue
            found[member.parameter][member.axis] -= (dimension.size - size) * member.unit
    return {name: tuple(shape) for name, shape in found.items()}


def _networks(layers: Sequence[LayerInfo], shapes: Shapes, notes: list[str]) -> Iterator[Dimension]:
    """Yield the feed-forward networks of blocks: the n-th up and gate of a parent belong to its n-th down."""
    unknown: list[str] = []
    for inside in _by_place(layers).values():
        downs = inside["down"]
        for number, down in enumerate(downs):
            written = [inside[role][number] for role in ("gate", "up") if len(inside[role]) == len(downs)]
            channels = down.shape[1]
            members = [member for layer in written for member in rows_of(layer, shapes, channels, 1)]
            wide = sum(layer.shape[0] for layer in written)
            if not written or wide % channels or len(inside["up"]) != len(downs) or len(down.shape) != 2:
                unknown.append(down.name)
                continue
            members.append(columns_of(down, 1))
            yield dimension_of("ffn", down, channels, members, [down], [*written, down])
    if unknown:
        notes.append(f"feed-forward networks whose channels are not understood, so that none is cut: {named(unknown)}")


def products_of(known: Collection[str], flow: Flow | None) -> dict[str, dict[tuple[Any, ...], None]]:
    """Return the distinct products of each q: layers of its sides and of o among those known, and head sizes."""
    seen: dict[str, dict[tuple[Any, ...], None]] = defaultdict(dict)
    for number, product in enumerate(flow.products if flow is not None else ()):
        sides = tuple(
            tuple(sorted(name for name in side if name in known))
            for side in (product.left, product.right, product.values)
        )
        assert flow is not None
        readers = tuple(name for name, origin in flow.feeds.items() if number in origin.mixed and name in known)
        if sides[0]:
            seen[sides[0][0]][(*sides, readers, product.key_size, product.value_size)] = None
    return seen


def _attentions(
    layers: Sequence[LayerInfo],
    shapes: Shapes,
    flow: Flow | None,
    fused: Mapping[str, Dimension],
    notes: list[str],
) -> Iterator[Dimension]:
    """Yield the attentions that one pass showed: with a q, k, v and o of its own each, or fused ones that are known."""
    known = {layer.name: layer for layer in layers if layer.kind == "linear" and layer.stack is not None}
    unknown: list[str] = []
    for q, found in products_of(known, flow).items():
        if q in fused:
            yield fused[q]
            continue
        # several products of one q: with positions, say, whose layers would have to go along
        parts = next(iter(found)) if len(found) == 1 else ()
        dimension = _attention([known[side[0]] for side in parts[:4]], parts, shapes) if _is_plain(parts) else None
        if dimension is None:
            unknown.append(q)
        else:
            yield dimension
    if unknown:
        notes.append(f"attentions whose heads are not understood, so that none is cut: {named(unknown)}")


def _is_plain(parts: tuple[Any, ...]) -> bool:
    """Say whether an attention has four layers of its own: q, k, v and o."""
    sides = parts[:4]
    return bool(sides) and all(len(side) == 1 for side in sides) and len(set(sides)) == 4


def _attention(layers: Sequence[LayerInfo], parts: tuple[Any, ...], shapes: Shapes) -> Dimension | None:
    """Return the heads of one attention, in groups that share keys and values; None where shapes do not say them."""
    q, k, v, o = layers
    key, value = parts[4:]
    if not key or not value or k.shape[0] % key or q.shape[0] % key:
        return None
    groups, heads = k.shape[0] // key, q.shape[0] // key
    if heads % groups or v.shape[0] != groups * value or o.shape[1] != heads * value:
        return None
    shared = heads // groups
    members = [*rows_of(q, shapes, groups, shared * key), *rows_of(k, shapes, groups, key)]
    members += [*rows_of(v, shapes, groups, value), columns_of(o, shared * value)]
    return dimension_of("heads", q, groups, members, [o], [q, k, v, o])


def _by_place(layers: Sequence[LayerInfo]) -> dict[tuple[str, int | None, str | None], dict[str, list[LayerInfo]]]:
    """Return up, gate and down layers, those of experts too, by block and by what holds experts, in order."""
    found: dict[tuple[str, int | None, str | None], dict[str, list[LayerInfo]]] = {}
    for layer in layers:
        role = layer.role.removeprefix("expert_")
        if role in ("up", "gate", "down") and layer.stack is not None and layer.tied_to is None:
            found.setdefault((layer.stack, layer.block, layer.experts), defaultdict(list))[role].append(layer)
    return found


def rows_of(
    layer: LayerInfo, shapes: Shapes, size: int, unit: int, first: int = 0, count: int | None = None
) -> list[Member]:
    """Return a layer's outputs (of them `count` from `first` on) as members; its bias goes too.

    There are several runs of them where it writes several tensors.
    """
    axis, stop = 1 if layer.transposed else 0, layer.shape[0] if count is None else first + count
    runs = [Member(f"{layer.name}.weight", axis, unit, offset) for offset in range(first, stop, size * unit)]
    if f"{layer.name}.bias" in shapes:
        runs += [replace(run, parameter=f"{layer.name}.bias", axis=0) for run in runs]
    return runs


def columns_of(layer: LayerInfo, unit: int) -> Member:
    """Return a layer's inputs as a member."""
    return Member(f"{layer.name}.weight", 0 if layer.transposed else 1, unit)


def dimension_of(
    kind: Cuttable,
    place: LayerInfo,
    size: int,
    members: Sequence[Member],
    readers: Sequence[LayerInfo],
    layers: Sequence[LayerInfo],
) -> Dimension:
    """Return the dimension of some layers, in the block of one of them, named by what their names have in common."""
    assert place.stack is not None
    parts = zip(*(layer.name.split(".") for layer in layers), strict=False)
    name = ".".join(first for first, *_ in takewhile(lambda each: len(set(each)) == 1, parts))
    names = tuple(f"{one.name}.weight" for one in readers)
    return Dimension(kind, name, place.stack, place.block, size, tuple(members), names)


def _said_by_config(
    stock: Stock | None, shapes: Shapes, inside: Sequence[Dimension], notes: list[str]
) -> Iterator[Dimension]:
    """Yield the dimensions with the numbers of the config that hold their sizes: by stack, or one for all stacks."""
    by_stack: dict[tuple[str, str, int], list[Dimension]] = defaultdict(list)
    for dimension in inside:
        by_stack[dimension.kind, dimension.stack, dimension.size].append(dimension)
    left: dict[str, list[Dimension]] = defaultdict(list)
    for (kind, _, _), alike in by_stack.items():
        fit = _smaller(stock, shapes, alike)
        if fit is not None and not fit.differs:
            yield from _told(alike, stock, fit)
        else:
            left[kind] += alike
    for alike in left.values():
        sizes = {one.size for one in alike}
        fit = _smaller(stock, shapes, alike) if len(sizes) == 1 else None
        if fit is None:
            yield from alike if stock is None else [replace(one, attributes=()) for one in alike]
        elif not fit.differs:
            yield from _told(alike, stock, fit)
        else:
            together = _joined(alike, fit, shapes)
            known = {member.parameter for one in alike for member in one.members}
            if together is not None:
                yield together
            elif others := [name for name in fit.differs if name not in known]:
                kind = alike[0].kind
                notes.append(f"{named(others)} follow the number of {kind} in another way, so that no {kind} are cut")
            else:
                yield from (replace(one, attributes=()) for one in alike)


def _told(alike: Sequence[Dimension], stock: Stock | None, fit: Fit) -> list[Dimension]:
    """Return dimensions with the numbers that say their size, and which sizes the config takes."""
    assert stock is not None
    size, trial = alike[0].size, _trial(alike[0].size)
    sizes = None
    if alike[0].kind == "heads":  # configs want some numbers to divide others
        assert trial is not None
        sizes = tuple(number for number in range(1, size) if stock.accepts(_scaled(stock, fit, number, trial)))
    return [replace(one, attributes=fit.change.names(), sizes=sizes) for one in alike]


def _scaled(stock: Stock, fit: Fit, number: int, trial: int) -> Change:
    """Return the change that says `number` units where `fit` says `trial`; numbers that were only said stay."""
    scaled = {
        path: value if stock.number(path) in (None, value) else value * number // trial
        for path, value in fit.change.numbers.items()
    }
    return Change(scaled, fit.change.kept_blocks)


def _smaller(stock: Stock | None, shapes: Shapes, alike: Sequence[Dimension]) -> Fit | None:
    """Return how the config says that these dimensions of one size are smaller, or how near it comes."""
    size = alike[0].size
    smaller = _trial(size)
    if stock is None or smaller is None:
        return None
    multiples = {member.unit for one in alike for member in one.members}
    numbers = {size: smaller}
    if alike[0].kind == "heads":  # a config may count queries, keys, or all their rows
        unit = min(multiples)
        numbers |= {size * multiple // unit: smaller * multiple // unit for multiple in multiples}
    pinned = min(multiples) if alike[0].kind == "heads" else None
    return stock.fit(cut_shapes(shapes, dict.fromkeys(alike, smaller)), numbers, pinned=pinned)


def _trial(size: int) -> int | None:
    """Return a smaller size that a config is likely to take: half where that is whole, else the next divisor."""
    return next((size // part for part in (2, 3, 5, 7, 11, 13) if size % part == 0 and size > part - 1), None)


def _joined(alike: Sequence[Dimension], fit: Fit, shapes: Shapes) -> Dimension | None:
    """Return one dimension for all, with the parameters that follow the same number; None where others differ."""
    first, smaller = alike[0], _trial(alike[0].size)
    extra = _followers(fit, shapes, first.size, smaller) if smaller is not None else None
    if extra is None:
        return None
    members = tuple(dict.fromkeys((*(member for one in alike for member in one.members), *extra)))
    readers = tuple(reader for one in alike for reader in one.readers)
    name = ", ".join(sorted({one.stack for one in alike}))
    return Dimension(first.kind, name, first.stack, None, first.size, members, readers, fit.change.names())


def _experts(
    module: nn.Module,
    stock: Stock | None,
    shapes: Shapes,
    layers: Sequence[LayerInfo],
    experts: Sequence[Experts],
    notes: list[str],
) -> Iterator[Dimension]:
    """Yield the experts of each block: what follows their number (routers, biases) is what differs without them."""
    alike: dict[int, list[Experts]] = defaultdict(list)
    for one in experts:
        alike[one.num_experts].append(one)
    for count, ones in alike.items():
        smaller = _trial(count)
        if stock is None or smaller is None or not all(one.stacked for one in ones):
            notes.append(f"experts that no config counts, so that none is cut: {named([one.name for one in ones])}")
            continue
        wanted = {name: shape for name, shape in shapes.items() if not _of_expert(name, ones, smaller)}
        fit = stock.fit(wanted, {count: smaller})
        followers = _followers(fit, shapes, count, smaller) if fit is not None else None
        if fit is None or followers is None or not fit.change.numbers:
            notes.append(f"experts whose number the config does not say, so that none is cut: {named([ones[0].name])}")
            continue
        asked = [stock.number(path) or 1 for path in stock.numbers if path[-1] in EXPERTS_OF_A_TOKEN]
        least = max((number for number in asked if number <= count), default=1)
        for one in ones:
            parent = f"{one.name.rpartition('.')[0]}."
            place = next(layer for layer in layers if layer.experts == one.name)
            members = tuple(member for member in followers if member.parameter.startswith(parent))
            buffers = [
                name
                for name, values in module.named_buffers()
                if name.startswith(parent) and values.dim() and len(values) == count
            ]
            yield Dimension(
                "experts", one.name, place.stack or "", place.block, count, members,
                attributes=fit.change.names(), sizes=tuple(range(least, count)),
                buffers=tuple(Member(name, 0) for name in buffers),
            )  # fmt: skip


def _of_expert(name: str, experts: Sequence[Experts], first: int) -> bool:
    """Say whether a parameter is one of an expert's from number `first` on."""
    for one in experts:
        if name.startswith(f"{one.name}."):
            number = name.removeprefix(f"{one.name}.").partition(".")[0]
            return number.isdigit() and int(number) >= first
    return False


def _followers(fit: Fit, shapes: Shapes, size: int, smaller: int) -> list[Member] | None:
    """Return the axes that follow a number of the config beside those known; None where something differs otherwise."""
    found = []
    for name, (wanted, got) in fit.differs.items():
        if wanted is None or got is None or len(wanted) != len(got):
            return None
        axes = [axis for axis, (ours, theirs) in enumerate(zip(wanted, got, strict=True)) if ours != theirs]
        if len(axes) != 1 or shapes[name][axes[0]] != size or got[axes[0]] != smaller:
            return None
        stacked = prod(shapes[name]) // size if not name.endswith(".weight") else 1  # biases of all experts, say
        found.append(Member(name, axes[0], width=stacked))
    return found


def _depths(module: nn.Module, stock: Stock | None, shapes: Shapes, stacks: Iterable[Stack]) -> Iterator[Dimension]:
    """Yield the stacks whose blocks can be fewer; a block that alone holds a parameter stays."""
    for stack in stacks:
        inside: dict[int, set[str]] = defaultdict(set)
        keys = _keys(module, stack)
        for name in shapes:
            for index, key in enumerate(keys):
                if name.startswith(f"{stack.name}.{key}."):
                    inside[index].add(name.removeprefix(f"{stack.name}.{key}."))
        common = set.intersection(*inside.values()) if inside else set()
        held = tuple(index for index, names in inside.items() if names - common)
        if len(held) == stack.num_blocks or stack.num_blocks < 2 or keys != [str(n) for n in range(len(keys))]:
            continue
        dimension = Dimension("layers", stack.name, stack.name, None, stack.num_blocks, held=held)
        fit = None
        if stock is not None:
            kept = list(range(stack.num_blocks - 1))
            wanted = {name: shape for name, shape in shapes.items() if not name.startswith(f"{stack.name}.{keys[-1]}.")}
            numbers = {stack.num_blocks: stack.num_blocks - 1}
            fit = stock.fit(wanted, numbers, kept_blocks={stack.num_blocks: kept})
        if fit is not None and not fit.differs:
            yield replace(dimension, attributes=fit.change.names())
        elif stock is None:
            yield dimension


def _keys(module: nn.Module, stack: Stack) -> list[str]:
    container = module.get_submodule(stack.name)
    return [key for key, child in container.named_children() if next(child.parameters(), None) is not None]
