"""Experts as ordinary layers: what holds the matrices of all experts of a block is taken apart, without a copy.

A mixture of experts sends each token x to a few of E small feed-forward networks. transformers 5 keeps the matrices of
all of them in stacked parameters and picks one by its first index, in the eager form that its experts interface
(`integrations/moe.py`) asks of every architecture:

    gate_up_proj [E, 2I, H]   or up_proj [E, I, H]   and   down_proj [E, H, I]     ([E, in, out] where `is_transposed`)

    gate, up = linear(x, gate_up_proj[e]).chunk(2)            y = linear(act(gate) * up, down_proj[e])

Here every matrix becomes a linear layer (`experts.3.gate_proj`) whose weight is a view of the stacked parameter. In the
parameter's place stands a `Stacked`, which answers `gate_up_proj[3]` with a `Matrix`: multiplied by x, through torch's
own dispatch, it runs these layers and puts their outputs side by side. The forward is the architecture's own (biases,
clamps, routing weights and all), and whatever works on a linear layer works on an expert: second moments of exactly
the tokens that the router sent there, codes, masks, weights read from disk when they are needed.

Layers are called what the checkpoint calls them, which transformers' conversion mapping tells (`3.w1` in Mixtral,
`3.gate_proj` in Qwen); where it tells nothing, `gate_proj`, `up_proj`, `down_proj`.

Left out: stacked matrices of models that do not follow the interface (Llama 4 multiplies all experts at once, JetMoE);
`map_model` names them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from gossamer.errors import ModelError
from gossamer.models.roles import Experts, Role

GATED, UNGATED, DOWN = "gate_up_proj", "up_proj", "down_proj"  # the names that the experts interface reads
MATMULS = (torch.matmul, torch.mm, Tensor.__matmul__, Tensor.matmul, Tensor.mm)
ROLES: dict[str, tuple[Role, ...]] = {
    GATED: ("expert_gate", "expert_up"), UNGATED: ("expert_up",), DOWN: ("expert_down",),
}  # fmt: skip
STACKS = {"expert_gate": (GATED,), "expert_up": (GATED, UNGATED), "expert_down": (DOWN,)}
OWN_NAMES = {GATED: ("gate_proj", "up_proj"), UNGATED: ("up_proj",), DOWN: ("down_proj",)}


class Expert(nn.Module):
    """Hold the linear layers of one expert; it is never called itself."""


@dataclass(frozen=True)
class Layout:
    """Say how one stacked parameter holds its layers.

    `layers` are their names within an expert, in the order of their output channels, which lie one after another or
    (`interleaved`) in turns; `transposed` matrices are [in, out]. `alone` says that a checkpoint may hold each layer
    under a name of its own, `experts.3.gate_proj.weight`, as transformers' conversion mapping reads it.
    """

    parameter: str
    layers: tuple[str, ...]
    roles: tuple[Role, ...]
    num_experts: int
    shape: tuple[int, ...]
    transposed: bool
    interleaved: bool
    alone: bool

    def piece(self, stacked: Tensor, expert: int, number: int) -> Tensor:
        """Return a layer's weight [out, in] as a view of the stacked parameter."""
        matrix = stacked[expert].t() if self.transposed else stacked[expert]
        return matrix[self.channels(number)]

    def channels(self, number: int) -> slice:
        """Return which output channels of the matrix a layer has."""
        if self.interleaved:
            return slice(number, None, len(self.layers))
        size = self.shape[2 if self.transposed else 1] // len(self.layers)
        return slice(number * size, (number + 1) * size)

    def names(self, experts: str) -> list[list[str]]:
        """Return the weights' names, expert by expert; `experts` is the name of the module that holds them."""
        prefix = f"{experts}." if experts else ""
        return [[f"{prefix}{e}.{layer}.weight" for layer in self.layers] for e in range(self.num_experts)]

    def assembled(self, experts: str, values: Callable[[str], Tensor]) -> Tensor:
        """Return the stacked parameter, made of the layers' weights, which `values` gives by name."""
        stacked: Tensor | None = None
        for expert, names in enumerate(self.names(experts)):
            for number, name in enumerate(names):
                weight = values(name)
                if stacked is None:
                    stacked = torch.empty(self.shape, dtype=weight.dtype)
                self.piece(stacked, expert, number).copy_(weight)
        assert stacked is not None
        return stacked


@dataclass(frozen=True)
class SwiGlu:
    """Say what gated experts compute between their layers: G sigmoid(alpha G) (U + beta), clamped to +-limit first.

    G is clamped from above only. `interleaved`: gate and up lie in turns in the stack.
    """

    alpha: float
    beta: float
    limit: float | None
    interleaved: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the product."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


class Stacked:
    """Stand in the place of a stacked parameter: `stacked[3]` is the matrix of expert 3."""

    def __init__(self, experts: nn.Module, layout: Layout) -> None:
        self.experts = experts
        self.layout = layout

    @property
    def shape(self) -> torch.Size:
        """Return the stacked parameter's shape."""
        return torch.Size(self.layout.shape)

    def __getitem__(self, expert: Any) -> Matrix:
        return Matrix(self, int(expert))

    def layers(self, expert: int) -> list[nn.Module]:
        """Return the layers of one expert that this parameter held."""
        part = self.experts.get_submodule(str(expert))
        return [part.get_submodule(name) for name in self.layout.layers]


class Matrix:
    """Stand for one expert's matrix: what multiplies by it runs the expert's layers."""

    def __init__(self, stacked: Stacked, expert: int) -> None:
        self.stacked = stacked
        self.expert = expert

    def float(self) -> Matrix:
        """Return itself: weights are float32 wherever they are looked at."""
        return self

    def __rmatmul__(self, inputs: Tensor) -> Tensor:
        return self.multiplied(torch.matmul, (inputs, self), {})

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer torch: it asks whatever stands among the operands of one of its functions."""
        matrix = next(value for value in args if isinstance(value, Matrix))
        return matrix.multiplied(func, args, kwargs or {})

    def multiplied(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Return the product with the tokens in `args`, each layer's channels where the matrix has them."""
        layout = self.stacked.layout
        turned = func in MATMULS
        bias = [*args[2:], *kwargs.values()]
        known = (func is nn.functional.linear or turned) and len(args) > 1 and args[1] is self
        if not known or turned != layout.transposed:
            raise ModelError(
                f"{layout.parameter} of {type(self.stacked.experts).__name__} is used by "
                f"{getattr(func, '__name__', func)} in a way that is not known of experts",
                "report the architecture; until then name its experts under `ignore`",
            )
        outputs = [layer(args[0]) for layer in self.stacked.layers(self.expert)]
        if len(outputs) == 1:
            found: Tensor = outputs[0]
        elif layout.interleaved:
            found = torch.stack(outputs, -1).flatten(-2)
        else:
            found = torch.cat(outputs, -1)
        return found if not bias or bias[0] is None else found + bias[0]


def take_apart(module: nn.Module) -> None:
    """Give every expert of a model layers of its own, in place; nothing happens to a model without stacked experts.

    The weights share the memory that they had. The model computes the same, in its eager form.
    """
    found = {name: part for name, part in module.named_modules() if _follows_interface(part)}
    if not found:
        return
    mapping = get_model_conversion_mapping(module, add_legacy=False) if isinstance(module, PreTrainedModel) else []
    converters = [converter for converter in mapping if isinstance(converter, WeightConverter)]
    for name, part in found.items():
        for expert in range(_num_experts(part)):
            part.register_module(str(expert), Expert())
        for parameter in (GATED, UNGATED, DOWN):
            if isinstance(part._parameters.get(parameter), Tensor):
                _take_apart(part, name, parameter, converters)
        _run_as(part, "eager")


def _take_apart(part: nn.Module, name: str, parameter: str, converters: Sequence[WeightConverter]) -> None:
    stacked = part._parameters.pop(parameter)
    assert stacked is not None
    alone = _names_alone(name, parameter, converters)
    layout = Layout(
        parameter=parameter,
        layers=alone or OWN_NAMES[parameter],
        roles=ROLES[parameter],
        num_experts=len(stacked),
        shape=tuple(stacked.shape),
        transposed=bool(part.is_transposed),
        interleaved=parameter == GATED and not part.is_concatenated,
        alone=alone is not None,
    )
    for expert in range(layout.num_experts):
        for number, layer in enumerate(layout.layers):
            weight = layout.piece(stacked.detach(), expert, number)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=stacked.requires_grad)
            part.get_submodule(str(expert)).register_module(layer, linear)
    setattr(part, parameter, Stacked(part, layout))


def layouts(module: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Yield the name of each module that holds experts taken apart, with the layout of each parameter it had."""
    for name, part in module.named_modules():
        for value in _places(part).values():
            yield name, value.layout


def find_experts(module: nn.Module) -> list[Experts]:
    """Return what holds experts, with the layers beside it that say where a token goes (its routers).

    That is what was taken apart, and lists of like modules with a layer beside them that gives one number for each.
    A layer that gives one number for all (the gate of a shared expert) counts among the routers.
    """
    found = []
    for name, part in module.named_modules():
        places = _places(part)
        if places:
            count = sum(isinstance(child, Expert) for child in part.children())
        elif isinstance(part, (nn.ModuleList, nn.ModuleDict)) and len(part) > 1 and _all_alike(part):
            count = len(part)
        else:
            continue
        beside = dict(_single_matrices(module, name))
        if places or count in beside.values():
            routers = tuple(layer for layer, rows in beside.items() if rows in (1, count))
            alone = all(place.layout.alone for place in places.values())
            swiglu = swiglu_of(part)
            found.append(
                Experts(name, count, routers, stacked=bool(places), alone=alone, gated_by_silu=swiglu is not None)
            )
    return found


def _single_matrices(module: nn.Module, experts: str) -> Iterator[tuple[str, int]]:
    """Yield (layer, rows) for each neighbour of the experts that is, or holds, exactly one matrix."""
    parent, _, own = experts.rpartition(".")
    for key, child in module.get_submodule(parent).named_children() if experts else ():
        matrices = [(name, value) for name, value in child.named_parameters(key) if value.dim() == 2]
        if key != own and len(matrices) == 1:
            name = matrices[0][0].rpartition(".")[0]
            yield f"{parent}.{name}" if parent else name, len(matrices[0][1])


def _all_alike(part: nn.Module) -> bool:
    shapes = [{name: value.shape for name, value in child.named_parameters()} for child in part.children()]
    return bool(shapes[0]) and all(other == shapes[0] for other in shapes)


def swiglu_of(part: nn.Module) -> SwiGlu | None:
    """Return what experts taken apart compute between their layers, found by trying it, or None for anything else.

    Their own constants are tried: numbers that the module holds.
    """
    gated = _places(part).get(GATED)
    if gated is None or getattr(part, "has_post_expert_norm", False):
        return None
    line = torch.linspace(-12.0, 12.0, 25)
    gate, up = (grid.reshape(-1, 1) for grid in torch.meshgrid(line, line, indexing="ij"))
    apply: Any = getattr(part, "_apply_gate", None)
    with torch.no_grad():
        found = apply(torch.cat([gate, up], -1)) if callable(apply) else None  # of one channel: both layouts are this
    numbers = [value for value in vars(part).values() if isinstance(value, float) and value > 0]
    for alpha, limit, beta in itertools.product([1.0, *numbers], [None, *numbers], [0.0, 1.0]):
        tried = SwiGlu(alpha, beta, limit, gated.layout.interleaved)
        if isinstance(found, Tensor) and torch.allclose(found, tried(gate, up), rtol=1e-5, atol=1e-5):
            return tried
    return None


@contextmanager
def stacked_again(module: nn.Module, implementation: str = "batched_mm") -> Iterator[nn.Module]:
    """Yield the model with its stacked parameters as they were, copies of the layers' present values.

    For whoever needs the architecture's own modules: exporters, which cannot follow a loop over experts.
    `implementation` is the one of the experts interface that runs meanwhile.
    """
    taken = [(part, dict(part._modules), _places(part)) for part in module.modules() if _places(part)]
    for part, _, places in taken:
        for key, value in places.items():
            values = value.layout.assembled("", partial(_own, part))
            delattr(part, key)
            part.register_parameter(key, nn.Parameter(values, requires_grad=False))
        for name in [name for name, child in part._modules.items() if isinstance(child, Expert)]:
            del part._modules[name]
        _run_as(part, implementation)
    try:
        yield module
    finally:
        for part, children, places in taken:
            for key, value in places.items():
                del part._parameters[key]
                setattr(part, key, value)
            part._modules.update(children)
            _run_as(part, "eager")


def _places(part: nn.Module) -> dict[str, Stacked]:
    return {key: value for key, value in vars(part).items() if isinstance(value, Stacked)}


def _own(part: nn.Module, name: str) -> Tensor:
    return part.get_parameter(name).detach()


def _run_as(part: nn.Module, implementation: str) -> None:
    config: Any = part.config
    config._experts_implementation = implementation


def _follows_interface(part: nn.Module) -> bool:
    """Say whether a module holds stacked experts that transformers' experts interface runs."""
    asked = all(
        isinstance(getattr(part, flag, None), bool) for flag in ("is_transposed", "is_concatenated", "has_gate")
    )
    held = [part._parameters.get(name) for name in (GATED, UNGATED, DOWN)]
    stacks = [value for value in held if isinstance(value, Tensor)]
    return asked and len(stacks) >= 2 and all(value.dim() == 3 for value in stacks) and "0" not in part._modules


def _num_experts(part: nn.Module) -> int:
    down = part._parameters[DOWN]
    assert down is not None
    return len(down)


def _names_alone(name: str, parameter: str, converters: Sequence[WeightConverter]) -> tuple[str, ...] | None:
    """Return what a checkpoint calls the layers of a stacked parameter, or None where it holds them stacked only."""
    for converter in converters:
        simple = all(
            (isinstance(step, MergeModulelist) and step.dim == 0) or (isinstance(step, Concatenate) and step.dim == 1)
            for step in converter.operations
        )
        if not simple:
            continue
        backwards = converter.reverse_transform()
        first, pattern = backwards.rename_source_key(f"{name}.{parameter}")
        if pattern is None:
            continue
        targets = backwards.target_patterns
        weights = [first.replace(targets[0], target, 1) for target in targets]
        prefix, suffix = f"{name}.*.", ".weight"
        fits = all(weight.startswith(prefix) and weight.endswith(suffix) for weight in weights)
        if fits and len(weights) == len(OWN_NAMES[parameter]):
            names = tuple(weight.removeprefix(prefix).removesuffix(suffix) for weight in weights)
            return names if not any("." in layer for layer in names) else None
    return None
