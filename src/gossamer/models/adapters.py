"""Two thin linear layers beside one whose weight stays as it is, in a candidate and in the map of a model.

    y = W x + b + U (D x)        W [O, I] as it was decided (rounded, say); D [R, I] is `name.lora_A`, U [O, R] is
                                 `name.lora_B`

The layer keeps its name and its weight, so that codes, grids and roles stay where they are; what is added has names of
its own. D and U are kept in float16 values, which is what files hold. Where the layer's input is rounded, it is rounded
for W alone: the thin layers read it as it comes.

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gossamer.models.roles import LayerInfo, ModelMap

DOWN, UP = "lora_A", "lora_B"  # as peft calls them
STORED = torch.float16


class Adapted(nn.Linear):
    """A linear layer with two thin ones beside it. `rounded` is where a grid for the layer's own input is put."""

    def __init__(self, layer: nn.Linear, up_OR: Tensor, down_RI: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.rounded = nn.Identity()
        with torch.device("meta"):  # the values that are drawn there are not wanted
            self.lora_A = nn.Linear(layer.in_features, len(down_RI), bias=False)
            self.lora_B = nn.Linear(len(down_RI), layer.out_features, bias=False)
        self.lora_A.weight = nn.Parameter(_as_stored(down_RI), requires_grad=False)
        self.lora_B.weight = nn.Parameter(_as_stored(up_OR), requires_grad=False)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output and the correction."""
        found: Tensor = nn.functional.linear(self.rounded(input), self.weight, self.bias) + self.lora_B(
            self.lora_A(input)
        )
        return found

    def plain(self) -> nn.Linear:
        """Return the layer without the thin ones; the weight is the same tensor."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)


def _as_stored(values: Tensor) -> Tensor:
    return values.detach().to(STORED).float().contiguous()


def put_adapter(module: nn.Module, name: str, up_OR: Tensor, down_RI: Tensor) -> None:
    """Put thin layers beside the linear layer of this name."""
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    _put(module, name, Adapted(layer.plain() if isinstance(layer, Adapted) else layer, up_OR, down_RI))


def adapters_of(module: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield the layers that have thin ones beside them, by name."""
    yield from ((name, layer) for name, layer in list(module.named_modules()) if isinstance(layer, Adapted))


def taken_out(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Take all thin layers out; return (U [O, R], D [R, I]) of each by the name of its layer."""
    found = {}
    for name, layer in adapters_of(module):
        found[name] = (layer.lora_B.weight.detach(), layer.lora_A.weight.detach())
        _put(module, name, layer.plain())
    return found


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, local = name.rpartition(".")
    module.get_submodule(parent).register_module(local, layer)


def adapted_map(model: ModelMap, ranks: Mapping[str, int]) -> ModelMap:
    """Return the map of a model with thin layers of these ranks beside the named ones, in the place of any there.

    A rank of 0 says that there are none beside a layer.
    """
    layers: list[LayerInfo] = []
    for layer in model.layers:
        owner = layer.name.rpartition(".")[0]
        if layer.role == "adapter" and owner in ranks:
            continue
        layers.append(layer)
        layers += _thin(layer, ranks[layer.name]) if ranks.get(layer.name) else []
    more = sum(layer.num_parameters for layer in layers) - sum(layer.num_parameters for layer in model.layers)
    return replace(
        model,
        layers=tuple(layers),
        num_parameters=model.num_parameters + more,
        num_bytes=model.num_bytes + more * STORED.itemsize,
        macs=model.macs + sum(layer.macs for layer in layers) - sum(layer.macs for layer in model.layers),
    )


def _thin(layer: LayerInfo, rank: int) -> list[LayerInfo]:
    outputs, inputs = layer.shape
    tokens = layer.macs // (outputs * inputs)
    return [
        replace(
            layer,
            name=f"{layer.name}.{part}",
            path=f"{layer.path}.{part}",
            role="adapter",
            shape=shape,
            num_parameters=shape[0] * shape[1],
            macs=tokens * shape[0] * shape[1],
            tied_to=None,
        )
        for part, shape in ((DOWN, (rank, inputs)), (UP, (outputs, rank)))
    ]
