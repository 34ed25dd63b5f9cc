"""Put two thin linear layers in place of one whose weight has a low rank, in a candidate and in the map of a model.

    y = W x + b,   W = U D   [O, I] = [O, R] [R, I]        becomes    name.0: x -> D x        name.1: z -> U z + b

U and D share the singular values of W: both are of one size, which is what rounding them wants. No config says such a
layer, so that a candidate with one is no longer `stock`: only a runtime that holds a graph can hold it.

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gossamer.models.candidate import Candidate
from gossamer.models.quantized import rows_of
from gossamer.models.roles import LayerInfo, ModelMap


class Factored(nn.Sequential):
    """Two linear layers in the place of one."""

    def __init__(self, up_OR: Tensor, down_RI: Tensor, bias_O: Tensor | None) -> None:
        (outputs, rank), inputs = up_OR.shape, down_RI.shape[1]
        with torch.device("meta"):  # the values that are drawn there are not wanted
            down = nn.Linear(inputs, rank, bias=False)
            up = nn.Linear(rank, outputs, bias=bias_O is not None)
        down.weight = nn.Parameter(down_RI, requires_grad=False)
        up.weight = nn.Parameter(up_OR, requires_grad=False)
        if bias_O is not None:
            up.bias = nn.Parameter(bias_O, requires_grad=False)
        super().__init__(down, up)

    @property
    def weight(self) -> Tensor:
        """Return the weight of the second layer: some classes look at a layer's dtype there (T5)."""
        return self[1].get_parameter("weight")


def factors(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (U [O, R], D [R, I]), float32, the factors of a weight that has this rank (else the nearest that have it).

    >>> up, down = factors(torch.ones(2, 3), 1)
    >>> (up @ down).round().tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    left_OK, size_K, right_KI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    root_R = size_K[:rank].sqrt()
    return (left_OK[:, :rank] * root_R).float().contiguous(), (root_R[:, None] * right_KI[:rank]).float().contiguous()


def factored(candidate: Candidate, ranks: Mapping[str, tuple[int, bool]]) -> Candidate:
    """Return the candidate with two layers in the place of each named one: its rank, whether it is stored [in, out]."""
    for name, (rank, turned) in ranks.items():
        parent, _, local = name.rpartition(".")
        layer = candidate.module.get_submodule(name)
        bias = layer._parameters.get("bias")
        up_OR, down_RI = factors(rows_of(layer.get_parameter("weight").detach(), turned), rank)
        pair = Factored(up_OR, down_RI, None if bias is None else bias.detach().clone())
        candidate.module.get_submodule(parent).register_module(local, pair.train(layer.training))
    return replace(candidate, stock=False)


def factored_map(model: ModelMap, ranks: Mapping[str, int]) -> ModelMap:
    """Return the map of a model with two layers in the place of each named one; nothing of it can be cut any more."""
    layers: list[LayerInfo] = []
    for layer in model.layers:
        layers += _pair(layer, ranks[layer.name]) if layer.name in ranks else [layer]
    lost = sum(layer.num_parameters for layer in model.layers) - sum(layer.num_parameters for layer in layers)
    spared = sum(layer.macs for layer in model.layers) - sum(layer.macs for layer in layers)
    bytes_each = model.num_bytes / max(1, model.num_parameters)
    stacks = tuple(
        replace(
            stack, num_parameters=sum(one.num_parameters for one in layers if one.stack == stack.name and not one.block)
        )
        for stack in model.stacks
    )
    return replace(
        model,
        layers=tuple(layers),
        stacks=stacks,
        num_parameters=model.num_parameters - lost,
        num_bytes=round((model.num_parameters - lost) * bytes_each),
        macs=model.macs - spared,
        dimensions=(),
    )


def _pair(layer: LayerInfo, rank: int) -> list[LayerInfo]:
    outputs, inputs = layer.shape
    bias = layer.num_parameters - outputs * inputs
    tokens = layer.macs // (outputs * inputs)
    parts = (("0", (rank, inputs), 0), ("1", (outputs, rank), bias))
    return [
        replace(
            layer,
            name=f"{layer.name}.{key}",
            path=f"{layer.path}.{key}",
            shape=shape,
            num_parameters=shape[0] * shape[1] + more,
            macs=tokens * shape[0] * shape[1],
            transposed=False,
        )
        for key, shape, more in parts
    ]
