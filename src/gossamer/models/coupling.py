"""Which channels of a network go together: Torch-Pruning's dependency graph, read as classes of indices.

Torch-Pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, section 3.2) follows the autograd graph
of one forward pass, and says for each channel of a layer which indices of which other layers go with it. An atom is
one index of one axis of one parameter; what must go together is one class of atoms:

    (conv1.weight, 0, r)  (bn1.weight, 0, r)  (bn1.running_mean, 0, r)  (conv2.weight, 1, r)  ...

Said here besides what it says: a convolution in groups loses the same channels of each group, since its weight [O, I/g]
has one axis for all of them; norms over several channels, layers that it would cut by guess, and what the network gives
out cannot go. Its walk is bounded by a number of calls, the memory of its pass by dropping what a gradient would need.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from gossamer.errors import ModelError

Atom = tuple[str, int, int]  # parameter or buffer, axis, index
Axes = list[tuple[str, int, int]]  # of a layer: its parameter, axis, and what indices are counted modulo (0: nothing)
MAX_CALLS = 20_000_000  # of functions, while the graph is walked: some ten seconds
OUTPUT = "the network gives them out"


@dataclass
class Coupling:
    """Hold classes of atoms that go together, and for those that cannot go the reason with a layer's name."""

    classes: list[list[Atom]] = field(default_factory=list)
    refused: list[tuple[str, list[Atom]]] = field(default_factory=list)


def coupled(
    module: nn.Module, run: Callable[[nn.Module], Sequence[Tensor]], outputs: Sequence[str], tied: Sequence[str]
) -> Coupling:
    """Return what goes together in a network that `run` runs; `outputs` are layers whose outputs are the network's.

    `tied` are layers that share a parameter. Raises ModelError where the graph cannot be walked, or not within
    MAX_CALLS. Needs the package torch-pruning.
    """
    module = copy.deepcopy(module).eval()
    module.requires_grad_(True)
    names = {part: name for name, part in module.named_modules()}
    parameters = {id(value): name for name, value in module.named_parameters()}
    classes = _Classes()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_drop, _dropped), _bounded(MAX_CALLS):
            graph = _walked(module, run)
            for layer in [part for part in graph.module2node if isinstance(part, (_ConvNd, nn.Linear))]:
                _join(graph, layer, names, parameters, classes)
    except _TooLongError:
        raise ModelError("the network's graph is too large to be walked", "cut parts of it") from None
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
        raise ModelError(f"torch-pruning cannot follow it ({type(error).__name__}: {error})", "cut by hand") from error
    for name in outputs:
        classes.refuse(OUTPUT, [atom for atom in classes.known if atom[0] == f"{name}.weight" and atom[1] == 0])
    for name in tied:
        of_layer = [atom for atom in classes.known if atom[0].rpartition(".")[0] == name]
        classes.refuse(f"{name} shares a parameter with another layer", of_layer)
    return classes.found()


class _TooLongError(Exception):
    pass


class _Classes:
    """Join atoms into classes, some of them with a reason why they cannot go."""

    def __init__(self) -> None:
        self.known: dict[Atom, Atom] = {}  # atom -> another of its class, itself in one of them

    def first(self, atom: Atom) -> Atom:
        above = self.known.setdefault(atom, atom)
        while above != self.known[above]:
            self.known[atom] = self.known[above]  # halves the way for the next who asks
            atom, above = above, self.known[above]
        return above

    def join(self, one: Atom, other: Atom) -> None:
        self.known[self.first(one)] = self.first(other)

    def refuse(self, reason: str, atoms: Sequence[Atom]) -> None:
        for atom in atoms:
            self.join(atom, (reason, -1, 0))

    def found(self) -> Coupling:
        together: dict[Atom, list[Atom]] = {}
        for atom in list(self.known):
            together.setdefault(self.first(atom), []).append(atom)
        coupling = Coupling()
        for atoms in together.values():
            reasons = sorted(atom[0] for atom in atoms if atom[1] < 0)
            if reasons:
                coupling.refused.append((reasons[0], [atom for atom in atoms if atom[1] >= 0]))
            else:
                coupling.classes.append(atoms)
        return coupling


def _walked(module: nn.Module, run: Callable[[nn.Module], Sequence[Tensor]]) -> Any:
    from torch_pruning import DependencyGraph  # an extra

    def forward(network: nn.Module, _: Any) -> list[Tensor]:
        return [tensor for tensor in run(network) if tensor.grad_fn is not None]

    return DependencyGraph().build_dependency(module, example_inputs=None, forward_fn=forward, verbose=False)


def _join(
    graph: Any, layer: nn.Module, names: dict[nn.Module, str], parameters: dict[int, str], classes: _Classes
) -> None:
    """Join what goes with each output channel of a layer."""
    root = f"{names[layer]}.weight"
    assert isinstance(layer.weight, Tensor)
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    pruner = graph.get_pruner_of_module(layer)
    channels = pruner.get_out_channels(layer)
    if all((root, axis, number) in classes.known for number in range(channels)):
        return  # seen from another layer
    for item in graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(channels))):
        target = item.dep.target.module
        reason, axes, owner = None, [], names.get(target)
        if isinstance(target, nn.Parameter):
            owner, _, local = parameters[id(target)].rpartition(".")
            axes = [(local, item.dep.target.pruning_dim % target.dim(), 0)]
        elif owner is not None:
            reason, axes = _axes(target, writes=graph.is_out_channel_pruning_fn(item.dep.handler))
        elif "output" in type(target).__name__.lower():
            reason = OUTPUT
        for from_root, index in zip(item.root_idxs, item.idxs, strict=True):
            start = (root, axis, int(from_root))
            for local, along, modulus in axes:
                name = f"{owner}.{local}" if owner else local
                classes.join(start, (name, along, index % modulus if modulus else index))
            if reason is not None:
                classes.refuse(reason if reason is OUTPUT else f"{owner} {reason}", [start])
    if isinstance(layer, _ConvNd) and 1 < layer.groups < layer.out_channels:
        each = layer.out_channels // layer.groups
        for number in range(each, layer.out_channels):
            classes.join((root, axis, number), (root, axis, number % each))


def _axes(layer: nn.Module, *, writes: bool) -> tuple[str | None, Axes]:
    """Return why a layer's channels cannot go, or the axes of its parameters and buffers that they lie along."""
    if isinstance(layer, _ConvTransposeNd):
        return "is a transposed convolution", []
    if isinstance(layer, _ConvNd):
        if 1 < layer.groups == layer.out_channels:
            alike = layer.in_channels == layer.out_channels
            return (None, _held(layer, "weight", "bias")) if alike else ("reads several channels in each group", [])
        inputs = layer.in_channels // layer.groups
        return None, _held(layer, "weight", "bias") if writes else [("weight", 1, inputs)]
    if isinstance(layer, nn.Linear):
        return None, _held(layer, "weight", "bias") if writes else [("weight", 1, 0)]
    if isinstance(layer, (_BatchNorm, _InstanceNorm)):
        return None, _held(layer, "weight", "bias", "running_mean", "running_var")
    if isinstance(layer, nn.PReLU):
        return None, _held(layer, "weight") if layer.num_parameters > 1 else []
    if next(layer.parameters(), None) is None and not isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
        return None, []
    return f"({type(layer).__name__}) computes with several channels at once", []


def _held(layer: nn.Module, *names: str) -> Axes:
    return [(name, 0, 0) for name in names if getattr(layer, name, None) is not None]


def _drop(_: Tensor) -> None:
    return None


def _dropped(_: Any) -> Tensor:
    raise AssertionError("no gradient is asked for")


@contextmanager
def _bounded(calls: int) -> Iterator[None]:
    """Raise _TooLongError once so many functions were called while the `with` lasts."""
    left, before = calls, sys.getprofile()

    def count(_: Any, event: str, __: Any) -> None:
        nonlocal left
        left -= event == "call"
        if left < 0:
            raise _TooLongError

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
