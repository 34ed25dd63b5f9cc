"""Which layer is what: roles and stacks of like blocks, found by structure, not by a list of architectures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gossamer.models.words import Words

Role = Literal[
    "embedding",
    "positions",
    "q",
    "k",
    "v",
    "o",
    "qkv",
    "up",
    "gate",
    "down",
    "expert_up",
    "expert_gate",
    "expert_down",
    "router",
    "norm",
    "head",
    "classifier",
    "convolution",
    "linear",
    "adapter",
    "other",
]

EXPERT_ROLES = frozenset(("expert_up", "expert_gate", "expert_down"))


@dataclass(frozen=True)
class LayerInfo:
    """Describe one leaf module that owns parameters.

    `name` is the module's name, `shape` that of its weight as [out, in...] (a Conv1D's stored [in, out] is turned),
    `block` the index of the block that it belongs to within `stack`, `tied_to` the parameter whose storage it shares
    (only on the later one), `macs` the multiply-accumulates of one example request. `num_parameters` counts a tied
    tensor on the earlier layer only, so that the sum over layers is the model's total. `experts` is the name of the
    module that holds the experts which the layer is a part of; roles `expert_...` are those of stacked experts, which a
    runtime may hold otherwise than layers that were always on their own.
    """

    name: str
    kind: Literal["linear", "conv", "embedding", "norm", "other"]
    role: Role
    shape: tuple[int, ...]
    num_parameters: int
    transposed: bool = False
    stack: str | None = None
    block: int | None = None
    tied_to: str | None = None
    macs: int = 0
    experts: str | None = None
    path: str = "layer"  # for several stacks of like blocks: the name relative to its block
    groups: int = 1  # of a convolution: each reads its own part of the channels


@dataclass(frozen=True)
class Stack:
    """Describe a run of like blocks: the name of their list, how many there are, parameters of one."""

    name: str
    num_blocks: int
    num_parameters: int
    kind: str


@dataclass(frozen=True)
class Experts:
    """Describe what holds the experts of a block: its name, how many there are, and the layers that choose among them.

    `stacked`: the architecture keeps their matrices in stacked parameters; `alone`: a checkpoint may hold them one by
    one all the same, under names that transformers merges when it opens it; `gated_by_silu`: they are gated networks
    with SiLU or a relative of it (`experts.SwiGlu`), for which runtimes have operators.
    """

    name: str
    num_experts: int
    routers: tuple[str, ...]
    stacked: bool
    alone: bool
    gated_by_silu: bool = False


Cuttable = Literal["ffn", "heads", "layers", "experts", "width", "vocabulary", "channels"]
CUTTABLE: tuple[Cuttable, ...] = ("ffn", "heads", "layers", "experts", "width", "vocabulary", "channels")


@dataclass(frozen=True)
class Member:
    """Name an axis of a parameter that a dimension runs along: unit i has the `unit` indices from offset + i * unit.

    `width` is how many values of a row one index of the axis has: those of the window, for a convolution that reads.
    """

    parameter: str
    axis: int
    unit: int = 1
    offset: int = 0
    width: int = 1


@dataclass(frozen=True)
class Dimension:
    """Describe what can be cut only in all of its members at once: `size` units, and the axes that they lie along.

    `readers` are the weights whose inputs are the units (down, o). `attributes` are the numbers of config.json that
    hold the size, one for all dimensions of that kind that name them; empty where no config can say another size, so
    that only a runtime that holds a graph can hold it; None where there is no config. `sizes` are those that the config
    accepts (None: any). Blocks of a stack have no members: whole names go, as those of experts do, whose members are
    rows of their router. `held` are units that cannot go (a block that holds what others read). `buffers` are axes of
    buffers that it runs along (what a norm has seen).
    """

    kind: Cuttable | Literal["rank"]
    name: str
    stack: str
    block: int | None
    size: int
    members: tuple[Member, ...] = ()
    readers: tuple[str, ...] = ()
    attributes: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None
    held: tuple[int, ...] = ()
    buffers: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Cut:
    """Say what a dimension is cut to: `size` of its units stay.

    `alike` says that all dimensions whose size the same numbers of config.json hold are cut to the same size.
    """

    dimension: Dimension
    size: int
    alike: bool = True

    def __str__(self) -> str:
        return f"{self.dimension.size} to {self.size} {self.dimension.kind}"


@dataclass(frozen=True)
class ModelMap:
    """Describe a model: every layer with its role, the stacks of blocks, totals in parameters, bytes and MACs."""

    layers: tuple[LayerInfo, ...]
    stacks: tuple[Stack, ...]
    num_parameters: int
    num_bytes: int
    macs: int
    notes: tuple[str, ...] = field(default=())
    experts: tuple[Experts, ...] = field(default=())
    dimensions: tuple[Dimension, ...] = field(default=())
    words: Words | None = field(default=None, compare=False)  # what it reads, where that is known

    def layer(self, name: str) -> LayerInfo:
        """Return the layer of that module name."""
        return next(layer for layer in self.layers if layer.name == name)
