"""What a network holds of its channels besides parameters: buffers of norms, and the sizes that layers know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from gossamer.models.roles import Dimension


def buffers_left(module: nn.Module, kept: Mapping[Dimension, Sequence[int]]) -> dict[str, Tensor]:
    """Return what is left of the buffers that dimensions run along, by name.

    >>> buffers_left(resnet, {dimension: [0, 2]})["bn1.running_mean"].shape  # doctest: +SKIP
    torch.Size([2])
    """
    gone: dict[str, list[Tensor]] = {}
    for one, units in kept.items():
        lost = torch.tensor(sorted(set(range(one.size)) - set(units)), dtype=torch.long)
        for member in one.buffers:
            indices = member.offset + lost[:, None] * member.unit + torch.arange(member.unit)
            gone.setdefault(member.parameter, []).append(indices.flatten())
    found = {}
    for name, parts in gone.items():
        values = module.get_buffer(name)
        stays = torch.ones(len(values), dtype=torch.bool)
        stays[torch.cat(parts)] = False
        found[name] = values[stays].clone()
    return found


def put_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give buffers other values, of other shapes too."""
    for name, tensor in values.items():
        owner, _, local = name.rpartition(".")
        module.get_submodule(owner)._buffers[local] = tensor


def tell_channels(module: nn.Module, dimensions: Iterable[Dimension]) -> None:
    """Write into layers how many channels their parameters have."""
    owners = {member.parameter.rpartition(".")[0] for one in dimensions for member in (*one.members, *one.buffers)}
    for name in owners:
        layer = module.get_submodule(name)
        if isinstance(layer, _ConvNd):
            layer.groups = min(layer.groups, len(layer.weight))  # where each channel was a group of its own
            layer.out_channels, layer.in_channels = len(layer.weight), layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, (_BatchNorm, _InstanceNorm)):
            held = [*layer.parameters(recurse=False), *(b for b in layer.buffers(recurse=False) if b.dim())]
            layer.num_features = len(held[0])
        elif isinstance(layer, nn.PReLU):
            layer.num_parameters = len(layer.weight)
