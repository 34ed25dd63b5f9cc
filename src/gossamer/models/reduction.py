"""Cut dimensions out of a candidate: a smaller module of the same class, its config rewritten, parameters sliced.

Where the model's class can be built from a config with the smaller numbers, it is: the module is the stock one, and so
is what opens its files. Where no config says it, the module at hand is made smaller in place, and the candidate is no
longer `stock`: only a runtime that holds a graph can hold it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.channel_config import channel_change
from gossamer.models.resized import buffers_left, put_buffers, tell_channels
from gossamer.models.roles import Dimension
from gossamer.models.stock import Change, Stock, build_empty, changed_config, shapes_of
from gossamer.models.width import head_sizes

WIDTHS_OF_HEADS = ("all_head_size", "split_size")  # where attentions hold the rows of all queries
Kept = Mapping[Dimension, Sequence[int]]  # units that stay, in order
SIZES = (  # where layers hold the sizes of a matrix, and of a convolution
    ("in_features", "out_features", "num_embeddings", "embedding_dim", "nf", "nx"),
    ("in_channels", "out_channels"),
)


@dataclass(frozen=True)
class Slice:
    """Say what a parameter of the smaller model is: one of the larger model's, at these indices of some axes."""

    parameter: str
    kept: Mapping[int, Tensor] = field(default_factory=dict)

    def of(self, values: Tensor) -> Tensor:
        """Return the values that stay."""
        for axis, indices in self.kept.items():
            values = values.index_select(axis, indices)
        return values.contiguous()


def slices(shapes: Mapping[str, tuple[int, ...]], kept: Kept) -> dict[str, Slice]:
    """Return what every parameter of the smaller model is, by its new name; blocks that stay close ranks."""
    gone: dict[str, dict[int, list[Tensor]]] = {}
    for dimension, units in kept.items():
        lost = torch.tensor(sorted(set(range(dimension.size)) - set(units)), dtype=torch.long)
        for member in dimension.members:
            indices = member.offset + lost[:, None] * member.unit + torch.arange(member.unit)
            gone.setdefault(member.parameter, {}).setdefault(member.axis, []).append(indices.flatten())
    found = {}
    for name, shape in shapes.items():
        axes = {}
        for axis, parts in gone.get(name, {}).items():
            stays = torch.ones(shape[axis], dtype=torch.bool)
            stays[torch.cat(parts)] = False
            axes[axis] = stays.nonzero().flatten()
        renamed = _renamed(name, kept)
        if renamed is not None:
            found[renamed] = Slice(name, axes)
    return found


def _renamed(name: str, kept: Kept) -> str | None:
    """Return the name that a parameter has once blocks or experts are gone; None where it goes with one of them."""
    for dimension, parts in kept.items():
        holder = _holder(dimension)
        if holder is not None and name.startswith(f"{holder}."):
            index, _, rest = name.removeprefix(f"{holder}.").partition(".")
            if not index.isdigit():
                continue
            if int(index) not in parts:
                return None
            return f"{holder}.{list(parts).index(int(index))}.{rest}"
    return name


def _holder(dimension: Dimension) -> str | None:
    """Return the name of what holds a dimension's units as parts with numbers for names, None for other kinds."""
    return {"layers": dimension.stack, "experts": dimension.name}.get(dimension.kind)


def reduced(candidate: Candidate, kept: Kept) -> Candidate:
    """Return the candidate without the units that do not stay; the one given is used up.

    Raises TechniqueError where something was rounded before (codes are not cut), and where a model that is read piece
    by piece has no config for its new shapes.

    >>> reduced(candidate, {dimension: [0, 2, 3]}).module.config.intermediate_size  # doctest: +SKIP
    3
    """
    if candidate.quantized:
        raise TechniqueError(
            f"{len(candidate.quantized)} parameters were rounded before this step, which cuts them",
            "put it before the steps that round",
        )
    kept = {dimension: units for dimension, units in kept.items() if len(units) < dimension.size}
    pieces = slices(shapes_of(candidate.module), kept)
    change = said_by_config(candidate.module, kept)
    if change is None and candidate.weights is not None:
        raise TechniqueError(
            f"no config of {type(candidate.module).__name__} says the smaller shapes, and it is read piece by piece",
            "give it enough --memory to be opened whole",
        )
    if change is None and any(one.kind == "experts" for one in kept):
        raise TechniqueError(
            f"{type(candidate.module).__name__} has one number of experts for all blocks, and a few would have others",
            "leave as many in each",
        )
    if change is None:
        shrink_in_place(candidate.module, kept)
        return replace(candidate, stock=False)
    assert isinstance(candidate.module, PreTrainedModel)
    module = build_empty(candidate.module, changed_config(candidate.module.config, change))
    if candidate.module.can_generate():
        module.generation_config = candidate.module.generation_config
    _copy_buffers(candidate.module, module)
    put_buffers(module, buffers_left(candidate.module, kept))

    def value(name: str) -> Tensor:
        return pieces[name].of(candidate.values(pieces[name].parameter))

    if candidate.weights is None:
        _fill(module, value)
        return replace(candidate, module=module)
    smaller = Candidate.streamed(candidate.source, module, value, candidate.weights.budget)
    return replace(
        smaller,
        dtype=candidate.dtype,
        applied=candidate.applied,
        routed=candidate.routed,
        fallbacks=candidate.fallbacks,
        widened=candidate.widened,
    )


def said_by_config(module: nn.Module, kept: Kept) -> Change | None:
    """Return the change of a module's config that says what stays; None where its class has no such config."""
    if not isinstance(module, PreTrainedModel):
        return None
    shapes = shapes_of(module)
    wanted = {name: piece_shape(shapes[piece.parameter], piece) for name, piece in slices(shapes, kept).items()}
    if any(one.kind == "channels" for one in kept):
        return channel_change(module, wanted, {one: len(units) for one, units in kept.items()})
    numbers: dict[int, int] = {}
    pinned: int | None = None
    for dimension, units in kept.items():
        numbers[dimension.size] = len(units)
        for unit in {member.unit for member in dimension.members} if dimension.kind == "heads" else ():
            least = min(member.unit for member in dimension.members)
            numbers[dimension.size * unit // least] = len(units) * unit // least
            pinned = least
    blocks = {one.size: list(units) for one, units in kept.items() if one.kind == "layers"}
    stock = Stock(module)
    said = [size for one in kept if one.kind == "width" for size in head_sizes(stock, one.size)]
    fit = stock.fit(wanted, numbers, pinned=pinned, said=said, kept_blocks=blocks)
    return fit.change if fit is not None and not fit.differs else None


def piece_shape(shape: tuple[int, ...], piece: Slice) -> tuple[int, ...]:
    """Return the shape of a slice of a parameter of some shape."""
    return tuple(len(piece.kept[axis]) if axis in piece.kept else size for axis, size in enumerate(shape))


def _fill(module: nn.Module, value: Callable[[str], Tensor]) -> None:
    """Give every parameter of an empty module its values; those that are tied stay one."""
    made: dict[int, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        for local, empty in list(part._parameters.items()):
            if empty is not None:
                name = f"{prefix}.{local}" if prefix else local
                if id(empty) not in made:
                    made[id(empty)] = nn.Parameter(value(name).clone(), requires_grad=False)
                part._parameters[local] = made[id(empty)]


def _copy_buffers(before: nn.Module, after: nn.Module) -> None:
    """Copy the buffers that are part of the weights (not those that a class computes from its config)."""
    old, saved = dict(before.named_buffers()), before.state_dict().keys()
    with torch.no_grad():
        for name, buffer in after.named_buffers():
            if name in saved and name in old and old[name].shape == buffer.shape:
                buffer.copy_(old[name])


def shrink_in_place(module: nn.Module, kept: Kept) -> None:
    """Take units out of a module that no config describes afterwards."""
    cut = {piece.parameter: piece for piece in slices(shapes_of(module), kept).values() if piece.kept}
    put_buffers(module, buffers_left(module, kept))
    tied: dict[int, nn.Parameter] = {}
    for prefix, part in list(module.named_modules()):
        for local, before in list(part._parameters.items()):
            piece = cut.get(f"{prefix}.{local}" if prefix else local)
            if before is not None and piece is not None:
                if id(before) not in tied:
                    tied[id(before)] = nn.Parameter(piece.of(before.detach()), requires_grad=False)
                part._parameters[local] = tied[id(before)]
                if local == "weight":
                    _tell_sizes(part, before, tied[id(before)])
    tell_channels(module, [one for one in kept if one.kind == "channels"])
    for dimension, units in kept.items():
        if dimension.kind == "heads":
            _tell_heads(module, dimension, len(units))
    for dimension, blocks in kept.items():
        if dimension.kind == "layers":
            parent, _, name = dimension.stack.rpartition(".")
            stack = module.get_submodule(dimension.stack)
            members = dict(stack.named_children())
            setattr(module.get_submodule(parent), name, type(stack)([members[str(index)] for index in blocks]))


def _tell_heads(module: nn.Module, dimension: Dimension, size: int) -> None:
    """Write the new number of heads where an attention holds the old one; it gets a config of its own to read from."""
    units = [member.unit for member in dimension.members]
    counts = {dimension.size * unit // min(units): size * unit // min(units) for unit in units}
    widths = {dimension.size * unit: size * unit for unit in units}
    owners = {member.parameter.rpartition(".")[0].rpartition(".")[0] for member in dimension.members}
    for part in map(module.get_submodule, owners):
        for name, value in _heads_in(part):
            if value in counts:
                setattr(part, name, counts[value])
        for name in WIDTHS_OF_HEADS:
            if getattr(part, name, None) in widths:
                setattr(part, name, widths[getattr(part, name)])
        config = getattr(part, "config", None)
        if isinstance(config, PreTrainedConfig):
            own = copy.copy(config)
            for name, value in _heads_in(config):
                if value in counts:
                    setattr(own, name, counts[value])
            vars(part)["config"] = own


def _heads_in(holder: object) -> Iterator[tuple[str, int]]:
    """Yield the numbers that count heads (not their sizes) of what holds some."""
    for name, value in list(vars(holder).items()):
        if "head" in name and "dim" not in name and "size" not in name and type(value) is int:
            yield name, value


def _tell_sizes(part: nn.Module, before: Tensor, after: Tensor) -> None:
    """Write a layer's new sizes where it holds the old ones."""
    if isinstance(part, nn.LayerNorm | nn.RMSNorm):
        part.normalized_shape = tuple(after.shape)
    for axis, old in enumerate(before.shape):
        for name in SIZES[before.dim() > 2]:
            if getattr(part, name, None) == old and after.shape[axis] != old and _axis_of(part, name, before) == axis:
                setattr(part, name, after.shape[axis])


def _axis_of(part: nn.Module, name: str, weight: Tensor) -> int:
    """Return the axis of a layer's weight that one of its numbers counts."""
    outputs_first = not hasattr(part, "nf")  # GPT-2's Conv1D has its inputs first
    counts_outputs = name in ("out_features", "num_embeddings", "nf", "out_channels")
    return 0 if counts_outputs == outputs_first else 1
