"""Heads of attentions whose queries, keys and values come out of one layer: how they lie in it is tried out.

    one after another    q0 q1 .. | k0 k1 .. | v0 v1 ..      GPT-2, Phi-3; queries may share keys and values
    head by head         q0 k0 v0 | q1 k1 v1 | ..            GPT-NeoX

Nothing in the layer tells the order, so one attention of each kind loses heads as either order says, in a copy: the
right one computes what the attention with these heads masked does (`channel_trials.py`).

Left out, and named as not understood: one head of keys and values for all queries (there is nothing to cut), shared
ones that lie head by head (Falcon), and attentions that are handed numbers of each head from outside (BLOOM's alibi).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from gossamer.models.channel_trials import proven
from gossamer.models.dataflow import Flow, evaluating, tensors_in
from gossamer.models.dimensions import columns_of, dimension_of, products_of, rows_of
from gossamer.models.roles import Dimension, LayerInfo
from gossamer.models.stock import Shapes, shapes_of

Forward = Callable[[nn.Module, dict[str, Tensor]], Any]


class _Seen(Exception):  # not an error: it carries the call out of the model's forward
    pass


def find_fused_heads(
    module: nn.Module,
    layers: Sequence[LayerInfo],
    flow: Flow | None,
    example: Mapping[str, Tensor] | None,
    forward: Forward | None,
    held: Callable[[nn.Module], AbstractContextManager[None]],
) -> dict[str, Dimension]:
    """Return the heads of attentions with one layer for queries, keys and values, by that layer's name.

    >>> find_fused_heads(gpt2, layers, flow, example, None, held)["transformer.h.0.attn.c_attn"].size  # doctest: +SKIP
    12
    """
    if flow is None or example is None:
        return {}
    known = {layer.name: layer for layer in layers if layer.kind == "linear" and layer.stack is not None}
    shapes = shapes_of(module)
    proposed: dict[str, list[Dimension]] = {}
    for name, found in products_of(known, flow).items():
        *sides, key, value = next(iter(found))
        if len(found) == 1 and all(len(side) == 1 for side in sides) and len(set(sides)) == 2 and sides[3] != sides[0]:
            proposed[name] = list(_orders(known[name], known[sides[3][0]], key, value, shapes))
    kinds: dict[tuple[Any, ...], int | None] = {}  # what attentions are like -> which of the orders is theirs
    found_heads = {}
    for name, orders in proposed.items():
        if not orders:
            continue
        attention = module.get_submodule(orders[0].name)
        kind = (type(attention), known[name].shape, *(one.size for one in orders))
        if kind not in kinds:
            kinds[kind] = _tried(module, attention, orders, example, forward, held)
        if (order := kinds[kind]) is not None:
            found_heads[name] = orders[order]
    return found_heads


def _orders(qkv: LayerInfo, o: LayerInfo, key: int, value: int, shapes: Shapes) -> Iterator[Dimension]:
    """Yield the heads as each order has them, where the shapes allow it."""
    rows, inputs = qkv.shape[0], o.shape[1]
    if not key or not value or inputs % value or (rows - inputs // value * key) % (key + value):
        return
    heads = inputs // value
    groups = (rows - heads * key) // (key + value)
    if groups < 2 or heads % groups:
        return
    shared = heads // groups
    parts = ((0, shared * key), (heads * key, key), ((heads + groups) * key, value))
    fused = [member for first, unit in parts for member in rows_of(qkv, shapes, groups, unit, first, groups * unit)]
    yield dimension_of("heads", qkv, groups, [*fused, columns_of(o, shared * value)], [o], [qkv, o])
    if shared == 1:
        turns = rows_of(qkv, shapes, groups, 2 * key + value, 0, rows)
        yield dimension_of("heads", qkv, groups, [*turns, columns_of(o, value)], [o], [qkv, o])


def _tried(
    module: nn.Module,
    attention: nn.Module,
    orders: Sequence[Dimension],
    example: Mapping[str, Tensor],
    forward: Forward | None,
    held: Callable[[nn.Module], AbstractContextManager[None]],
) -> int | None:
    """Return which of the orders holds, or None where none does."""
    call = _call_of(module, attention, example, forward)
    if call is None:
        return None

    def run(tried: nn.Module) -> list[Tensor]:
        args, kwargs = copy.deepcopy(call)  # a cache grows with every call
        return [next(tensors_in(tried(*args, **kwargs)))]

    with held(attention):
        alone = _copied(attention)
    if alone is None:
        return None
    return next((n for n, order in enumerate(orders) if proven(alone, [_inside(order)], run)[0]), None)


def _inside(order: Dimension) -> Dimension:
    """Return a dimension with names as they are within the attention."""
    prefix = f"{order.name}."
    members = tuple(replace(one, parameter=one.parameter.removeprefix(prefix)) for one in order.members)
    return replace(order, members=members, readers=tuple(name.removeprefix(prefix) for name in order.readers))


def _call_of(
    module: nn.Module, attention: nn.Module, example: Mapping[str, Tensor], forward: Forward | None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return what a pass hands to an attention; the pass ends there. None where it is not copied or not reached."""
    calls = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        with suppress(TypeError, RuntimeError):
            calls.append(copy.deepcopy((args, kwargs)))
        raise _Seen

    hook = attention.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(module), suppress(_Seen):
            forward(module, dict(example)) if forward is not None else module(**example)
    finally:
        hook.remove()
    return calls[0] if calls else None


def _copied(module: nn.Module) -> nn.Module | None:
    """Return a copy without what hangs on a module (where it is read piece by piece: all of the model).

    None for code of a user's own that does not let itself be copied.
    """
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(part, name, getattr(part, name)) for part in module.modules() for name in names]
    for part, name, hooks in kept:
        setattr(part, name, type(hooks)())
    try:
        return copy.deepcopy(module)
    except (TypeError, RuntimeError):
        return None
    finally:
        for part, name, hooks in kept:
            setattr(part, name, hooks)
