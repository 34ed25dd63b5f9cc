"""Channels of convolutional networks that can be cut: dimensions found in what goes together, then tried out.

    coupling.py          classes of indices that go together, from Torch-Pruning's dependency graph
    here                 classes alike are the units of one Dimension: the same axes, in the same steps
    channel_trials.py    some of each are cut: what does not compute what the masked network does is refused
    channel_config.py    which numbers of config.json say the sizes, where there is a config

A residual stream is one dimension over all blocks that add to it; of a concatenation each input is one, at an offset of
the weight that reads it; of a flattened picture a unit is as many columns as there are pixels. Whatever cannot go is
named with the reason. Left out: networks with attention, whose channels are their hidden width, and what is read piece
by piece, where no graph is recorded.

Needs the extra torch-pruning; without it nothing is found, and a note says so.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.errors import ModelError
from gossamer.models.channel_config import said_by_numbers
from gossamer.models.channel_trials import proven
from gossamer.models.coupling import OUTPUT, Atom, Coupling, coupled
from gossamer.models.dataflow import Flow, tensors_in
from gossamer.models.purpose import named
from gossamer.models.roles import Dimension, LayerInfo, Member

INSTALL = 'pip install "gossamer[torch-pruning]"'
MAX_RUNS = 8  # of units with the same members in other places: more are an order that no offset says


def find_channels(
    module: nn.Module,
    layers: Sequence[LayerInfo],
    flow: Flow | None,
    example: Mapping[str, Tensor] | None,
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None,
    others: Sequence[Dimension],
) -> tuple[list[Dimension], list[str]]:
    """Return the channels of a convolutional network that can be cut, and notes on what cannot.

    `others` are dimensions that are known: what runs along their axes is left to them.

    >>> find_channels(resnet, layers, flow, example, None, [])[0][0].size  # doctest: +SKIP
    64
    """
    convolutions = [layer.name for layer in layers if layer.kind == "conv"]
    if not convolutions or flow is None or example is None:
        return [], []
    if reason := _refusal(module, flow):
        return [], [f"channels of convolutions ({named(convolutions)}) are not cut: {reason}"]
    inputs = _noise(example)

    def run(network: nn.Module) -> list[Tensor]:
        given = {
            name: values.to(next(network.parameters()).dtype) if values.is_floating_point() else values
            for name, values in inputs.items()
        }
        result = forward(network, given) if forward is not None else network(**given)
        return [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]

    outputs = sorted(frozenset().union(*(origin.layers for origin in flow.outputs)))
    owners = {layer.tied_to.rpartition(".")[0] for layer in layers if layer.tied_to is not None}
    tied = sorted({layer.name for layer in layers if layer.tied_to is not None} | owners)
    try:
        coupling = coupled(module, run, outputs, tied)
    except ModelError as error:
        return [], [f"channels of convolutions ({named(convolutions)}) are not cut: {error}"]
    found, reasons = _dimensions(coupling, layers, others)
    found, failed = proven(module, found, run)
    for reason, names in failed.items():
        reasons[reason] += names
    if isinstance(module, PreTrainedModel):
        found = said_by_numbers(module, found)
    return found, [
        f"channels of {named(list(dict.fromkeys(names)))} are not cut: {reason}"
        for reason, names in reasons.items()
        if reason != OUTPUT
    ]


def _refusal(module: nn.Module, flow: Flow) -> str | None:
    if flow.products:
        return "they are the hidden width of a network with attention"
    if importlib.util.find_spec("torch_pruning") is None:
        return f"what goes together is found by torch-pruning: {INSTALL}"
    if any(parameter.is_meta for parameter in module.parameters()):
        return "what goes together is found in a pass through the whole model, which is read piece by piece"
    return None


def _noise(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the example with noise in place of numbers: zeros would hide what is wrong."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(values.shape, generator=draw).to(values) if values.is_floating_point() else values
        for name, values in example.items()
    }


def _dimensions(
    coupling: Coupling, layers: Sequence[LayerInfo], others: Sequence[Dimension]
) -> tuple[list[Dimension], dict[str, list[str]]]:
    """Return classes that are alike as dimensions, and the names of layers by the reason why their channels stay."""
    known = {layer.name: layer for layer in layers if layer.kind in ("conv", "linear")}
    order = {name: number for number, name in enumerate(known)}
    reasons: dict[str, list[str]] = defaultdict(list)
    for reason, atoms in coupling.refused:
        reasons[reason] += _writers(atoms, known)
    taken = {(member.parameter, member.axis) for one in others for member in one.members}
    alike: dict[tuple[tuple[str, int, int], ...], list[list[Atom]]] = defaultdict(list)
    for atoms in coupling.classes:
        counts: dict[tuple[str, int], int] = defaultdict(int)
        for parameter, axis, _ in atoms:
            counts[parameter, axis] += 1
        alike[tuple(sorted((*place, count) for place, count in counts.items()))].append(sorted(atoms))
    found: list[Dimension] = []
    for axes, classes in alike.items():
        writers = sorted(_writers(classes[0], known), key=order.__getitem__)
        readers = [f"{name}.weight" for name in known if any(place[:2] == (f"{name}.weight", 1) for place in axes)]
        if not writers or any(place[:2] in taken for place in axes):
            continue
        runs = _runs(sorted(classes, key=lambda atoms: min(a for a in atoms if a[0] == f"{writers[0]}.weight")))
        if not readers:
            reasons["no layer reads them through a weight"] += writers
        elif len(runs) > MAX_RUNS or (len(runs) > 1 and min(map(len, runs)) < 2):
            reasons["they are read in an order that no offset says"] += writers
        elif len(classes) < 2:
            reasons["all of them go together"] += writers
        else:
            found += [_dimension(known, writers, readers, run, len(runs) > 1) for run in runs]
    return sorted(found, key=lambda one: order[one.name.partition("[")[0]]), reasons


def _writers(atoms: Iterable[Atom], known: Mapping[str, LayerInfo]) -> list[str]:
    """Return the layers whose outputs are among some atoms."""
    places = {parameter.removesuffix(".weight") for parameter, axis, _ in atoms if axis == 0}
    return [name for name in known if name in places]


Lists = dict[tuple[str, int], list[int]]


def _by_axis(atoms: Sequence[Atom]) -> Lists:
    found: Lists = defaultdict(list)
    for parameter, axis, index in atoms:
        found[parameter, axis].append(index)
    return found


def _runs(classes: Sequence[list[Atom]]) -> list[list[Lists]]:
    """Return classes in runs: from one to the next each block of neighbouring indices moves on by its own length."""
    runs: list[list[Lists]] = []
    for lists in map(_by_axis, classes):
        if runs and all(_follows(runs[-1][-1][place], indices) for place, indices in lists.items()):
            runs[-1].append(lists)
        else:
            runs.append([lists])
    return runs


def _follows(before: Sequence[int], after: Sequence[int]) -> bool:
    expected = [index + length for start, length in _blocks(before) for index in range(start, start + length)]
    return expected == list(after)


def _blocks(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return the neighbouring indices among sorted ones as (first, how many)."""
    blocks: list[tuple[int, int]] = []
    for index in indices:
        if blocks and sum(blocks[-1]) == index:
            blocks[-1] = (blocks[-1][0], blocks[-1][1] + 1)
        else:
            blocks.append((index, 1))
    return blocks


def _dimension(
    known: Mapping[str, LayerInfo], writers: Sequence[str], readers: Sequence[str], run: Sequence[Lists], part: bool
) -> Dimension:
    first = known[writers[0]]
    members = []
    for (parameter, axis), indices in run[0].items():
        width = prod(known[parameter.removesuffix(".weight")].shape[2:]) if parameter in readers and axis == 1 else 1
        members += [Member(parameter, axis, length, start, width) for start, length in _blocks(indices)]
    buffers = [one for one in members if one.parameter.rpartition(".")[2] in ("running_mean", "running_var")]
    start = run[0][f"{first.name}.weight", 0][0]
    places = {(known[name].stack, known[name].block) for name in writers}
    stack = first.stack or first.name.partition(".")[0]
    return Dimension(
        kind="channels",
        name=f"{first.name}[{start}:{start + len(run)}]" if part else first.name,
        stack=stack,
        block=first.block if len(places) == 1 else None,
        size=len(run),
        members=tuple(one for one in members if one not in buffers),
        readers=tuple(readers),
        buffers=tuple(buffers),
    )
