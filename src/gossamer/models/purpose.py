"""Say what each layer is for: from the data flow of one pass, or, where nothing could be run, from shapes.

From the flow: the products under a softmax tell q and k, what the softmax weights mix is v, and who reads the mixture
is o; a layer that feeds all three is a fused qkv. Who reads an element-wise product of two layers is down, and the two
are gate (the one behind the activation) and up. Without a gate: a layer that widens, read by one that narrows back, is
up and down. What writes the model's output and feeds no layer is the head (as wide as the vocabulary) or a classifier.

From shapes: three linear layers of one parent with equal inputs are q, k, v and so on; names decide between equals.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from gossamer.models.dataflow import Flow
from gossamer.models.roles import LayerInfo, Role

MAX_NAMED = 6  # modules that a note names before it counts the rest
HINTS: dict[Role, tuple[str, ...]] = {
    "q": ("q", "query", "to_q", "q_proj", "q_lin", "wq"), "k": ("k", "key", "to_k", "k_proj", "k_lin", "wk"),
    "v": ("v", "value", "to_v", "v_proj", "v_lin", "wv"), "gate": ("gate_proj", "gate", "w1", "wi_0"),
    "up": ("up_proj", "up", "w3", "wi_1"),
}  # fmt: skip


def assign_roles(layers: Sequence[LayerInfo], flow: Flow | None) -> dict[str, Role]:
    """Return the role of every layer by name. Pure: reads shapes, ties, blocks, and the flow when there is one."""
    roles: dict[str, Role] = {layer.name: _role_of_kind(layer) for layer in layers}
    linears = {layer.name: layer for layer in layers if layer.kind == "linear"}
    if flow is not None:
        roles.update(_attention_roles(linears, flow))
        roles.update(_feed_forward_roles(linears, flow, roles))
    roles.update(_output_roles(layers, linears, flow, roles))
    roles.update(_roles_of_like_blocks(linears.values(), roles))
    silent = flow is None or not flow.feeds
    for name, role in _roles_from_shapes(list(linears.values())) if silent else ():
        if roles[name] == "linear":
            roles[name] = role
    return roles


def remarks(layers: Sequence[LayerInfo], flow: Flow | None) -> list[str]:
    """Return notes for the reader: layers without a role, parameters that no layer type covers, layers never run."""
    notes = []
    if unknown := [layer.name for layer in layers if layer.role == "linear" and layer.stack is not None]:
        notes.append(f"linear layers whose role in their block is not known: {named(unknown)}")
    others = [layer for layer in layers if layer.kind == "other" and layer.role != "router" and layer.num_parameters]
    if stacked := [layer for layer in others if len(layer.shape) == 3 and min(layer.shape) > 1]:
        shapes = ", ".join(sorted({"x".join(map(str, layer.shape)) for layer in stacked}))
        notes.append(
            f"stacked matrices ({shapes}) whose use is not understood, so that they stay as they are: "
            f"{named([layer.name or 'the model itself' for layer in stacked])}"
        )
    if others:
        count = sum(layer.num_parameters for layer in others)
        notes.append(
            f"{count} parameters are in modules that are no linear, convolution, embedding or norm: "
            f"{named([layer.name or 'the model itself' for layer in others])}"
        )
    if flow is not None:
        watched = [layer for layer in layers if layer.kind in ("linear", "conv", "embedding") and layer.experts is None]
        shared = {layer.tied_to for layer in layers}
        alone = [layer.name for layer in watched if layer.tied_to is None and f"{layer.name}.weight" not in shared]
        if idle := [name for name in alone if name not in flow.feeds]:
            notes.append(f"the example does not reach {named(idle)}")
    if experts := {(layer.experts, _expert_of(layer)) for layer in layers if layer.experts is not None}:
        reached = {(layer.experts, _expert_of(layer)) for layer in layers if layer.experts is not None and layer.macs}
        places = {holder for holder, _ in experts}
        told = f"{len(experts)} experts in {len(places)} blocks"
        notes.append(told if flow is None else f"{told}: the example's tokens are sent to {len(reached)} of them")
    return notes


def _expert_of(layer: LayerInfo) -> str:
    """Return which expert of its block a layer belongs to."""
    return layer.name.removeprefix(f"{layer.experts}.").partition(".")[0]


def named(names: Sequence[str]) -> str:
    """Return names as text: the first few, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _role_of_kind(layer: LayerInfo) -> Role:
    if layer.kind == "conv":
        return "convolution"
    return layer.kind


def _attention_roles(linears: dict[str, LayerInfo], flow: Flow) -> Iterator[tuple[str, Role]]:
    votes: dict[str, Role] = {}
    attended = {index for index, product in enumerate(flow.products) if product.values}
    for index in sorted(attended):
        product = flow.products[index]
        sides: dict[Role, frozenset[str]] = {"q": product.left, "k": product.right, "v": product.values}
        feeders: dict[str, list[Role]] = defaultdict(list)
        for role, names in sides.items():
            known = [name for name in names if name in linears]
            for name in known if len(known) <= 2 else ():  # more: the residual stream itself, no projection
                feeders[name].append(role)
        for name, found in feeders.items():
            # a later product of the same layer (DeBERTa's with positions) does not change what the first one said
            votes.setdefault(name, found[0] if len(found) == 1 else "qkv")
    for name, origin in flow.feeds.items():
        if name in linears and origin.mixed & attended:
            votes.setdefault(name, "o")
    yield from votes.items()


def _feed_forward_roles(
    linears: dict[str, LayerInfo], flow: Flow, roles: dict[str, Role]
) -> Iterator[tuple[str, Role]]:
    for name, origin in flow.feeds.items():
        if name not in linears or roles[name] != "linear":
            continue
        for index in origin.gated:
            gate, up = flow.gates[index]
            if gate in linears and up in linears and linears[gate].shape == linears[up].shape:
                yield from ((gate, "gate"), (up, "up"), (name, "down"))
        if origin.gated or len(origin.layers) != 1:
            continue
        (feeder,) = origin.layers
        if feeder not in linears or roles[feeder] != "linear":
            continue
        wide, narrow = linears[feeder], linears[name]
        same_block = (wide.stack, wide.block) == (narrow.stack, narrow.block) and wide.stack is not None
        returns = wide.shape[1] == narrow.shape[0]
        # a fused gate and up writes twice what down reads
        if (
            same_block
            and returns
            and wide.shape[0] in (narrow.shape[1], 2 * narrow.shape[1])
            and wide.shape[0] >= wide.shape[1]
        ):
            yield from ((feeder, "up"), (name, "down"))


def _output_roles(
    layers: Sequence[LayerInfo], linears: dict[str, LayerInfo], flow: Flow | None, roles: dict[str, Role]
) -> Iterator[tuple[str, Role]]:
    embeddings = {f"{layer.name}.weight": layer for layer in layers if layer.kind == "embedding"}
    vocabulary = max((layer.shape[0] for layer in embeddings.values()), default=0)
    written = (
        set() if flow is None else {name for origin in flow.outputs if origin.steps == 0 for name in origin.layers}
    )
    consumed = frozenset() if flow is None else flow.consumed()
    free = [layer for layer in linears.values() if layer.stack is None and layer.name not in consumed]
    for layer in free:
        if layer.tied_to in embeddings or layer.shape[0] == vocabulary:
            yield layer.name, "head"
        elif layer.name in written or (flow is None and layer is free[-1] and layer is list(linears.values())[-1]):
            yield layer.name, "classifier"


def _roles_of_like_blocks(linears: Iterable[LayerInfo], roles: dict[str, Role]) -> Iterator[tuple[str, Role]]:
    """Yield for layers that the pass did not reach the role of the same path in the other blocks of their stack."""
    by_path: dict[tuple[str | None, str], Counter[Role]] = defaultdict(Counter)
    inside = [layer for layer in linears if layer.stack is not None]
    for layer in inside:
        if roles[layer.name] != "linear":
            by_path[layer.stack, layer.path][roles[layer.name]] += 1
    for layer in inside:
        found = by_path.get((layer.stack, layer.path))
        if roles[layer.name] == "linear" and found is not None and len(found) == 1:
            yield layer.name, next(iter(found))


def _roles_from_shapes(linears: list[LayerInfo]) -> Iterator[tuple[str, Role]]:
    """Yield roles within each block from the order and shapes of its linear layers."""
    inside = [layer for layer in linears if layer.stack is not None]
    for _, block in groupby(inside, key=lambda layer: (layer.stack, layer.block)):
        waiting = list(block)
        while waiting:
            found = _pattern(waiting)
            yield from ((layer.name, role) for layer, role in found)
            waiting = waiting[max(len(found), 1) :]


def _pattern(layers: list[LayerInfo]) -> list[tuple[LayerInfo, Role]]:
    """Return the roles of the first few layers when together they have a known shape, else nothing."""
    shapes = [layer.shape for layer in layers]
    siblings = [layer.name.rpartition(".")[0] for layer in layers]
    first = layers[0]
    if len(layers) >= 4 and len(set(siblings[:3])) == 1 and len({shape[1] for shape in shapes[:3]}) == 1:
        widths = Counter(shape[0] for shape in shapes[:3])
        if (
            shapes[3][1] in widths
            and shapes[3][0] == first.shape[1]
            and (len(widths) == 1 or siblings[3] == siblings[0])
        ):
            return [*_tie_broken(layers[:3], ("q", "k", "v")), (layers[3], "o")]
    if len(layers) >= 3 and shapes[0] == shapes[1] == shapes[2][::-1] and len(set(siblings[:3])) == 1:
        return [*_tie_broken(layers[:2], ("gate", "up")), (layers[2], "down")]
    if len(layers) >= 2 and first.shape[0] == 3 * first.shape[1] and shapes[1] == (first.shape[1],) * 2:
        return [(first, "qkv"), (layers[1], "o")]
    if len(layers) >= 2 and shapes[0] == shapes[1][::-1] and first.shape[0] > first.shape[1]:
        return [(first, "up"), (layers[1], "down")]
    return []


def _tie_broken(layers: list[LayerInfo], roles: tuple[Role, ...]) -> list[tuple[LayerInfo, Role]]:
    """Return equals with their roles: by name when every name says one, else in the order given."""
    by_name = {role: layer for layer in layers for role in roles if layer.name.rpartition(".")[2] in HINTS[role]}
    chosen = [by_name[role] for role in roles] if len(by_name) == len(roles) else layers
    return list(zip(chosen, roles, strict=True))
