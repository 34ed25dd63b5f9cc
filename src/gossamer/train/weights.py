"""What a training changes: a network in checkpoints of its own kind, and which of its parameters move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.train.lesson import Plan

PROJECTIONS = "gossamer_projections"  # before their names, which must not be a network's
# Of a weight: where fewer are zero they happen to be (weights that were bfloat16 once have some), and may move.
SPARSE = 0.02


class Weights(nn.Module):
    """Hold a network so that its checkpoints have what is trained, each tensor once, whatever class it is.

    `projections` are trained with it where they ask for gradients, under names of their own.
    """

    def __init__(self, network: nn.Module, projections: nn.ModuleList | None = None) -> None:
        super().__init__()
        self.network, self.projections = network, projections or nn.ModuleList()

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parameters that are trained, and buffers, by name."""
        return {name: values.detach() for name, values in self.trained().items()} | {
            name: values for name, values in self.network.named_buffers() if values.numel()
        }

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that are trained by name."""
        return {name: values for name, values in self._parameters_by_name().items() if values.requires_grad}

    def _parameters_by_name(self) -> dict[str, Tensor]:
        beside = {f"{PROJECTIONS}.{name}": values for name, values in self.projections.named_parameters()}
        return {**dict(self.network.named_parameters()), **beside}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Put values back, by name."""
        held = self._parameters_by_name() | dict(self.network.named_buffers())
        with torch.no_grad():
            for name, value in values.items():
                held[name].copy_(value)

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Put values back."""
        self.put(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])

    def forward(self, batch: dict[str, Any], loss: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        """Return the loss: what wraps this module (one process of many) sees each pass so."""
        self.network.eval()  # no dropout: what is to be followed has none
        return loss(batch)


class Parts(Weights):
    """The same of a network that is split between processes: what puts its checkpoints together knows its own names."""

    state_dict = nn.Module.state_dict
    load_state_dict = nn.Module.load_state_dict


def nonzeros(values: Tensor) -> Tensor | None:
    """Return which values of a sparse weight are not zero; None where it is not sparse.

    >>> nonzeros(torch.tensor([[0.0, 1.0]])), nonzeros(torch.ones(2, 2))
    (tensor([[False,  True]]), None)
    """
    stays = values != 0
    return stays if int(stays.count_nonzero()) <= (1 - SPARSE) * stays.numel() else None


@contextmanager
def trainable(network: nn.Module, plan: Plan) -> Iterator[None]:
    """Let what the plan says be trained while the `with` lasts, and nothing else; zeros of sparse weights stay so."""
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    still = {
        id(part) for module in network.modules() if isinstance(module, plan.frozen) for part in module.parameters()
    }
    if plan.only is not None:
        still = {id(part) for name, part in network.named_parameters() if name not in plan.only}
    handles = []
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point() and id(parameter) not in still)
        if plan.only is not None or not parameter.requires_grad or parameter.ndim < 2:
            continue
        if (stays := nonzeros(parameter.detach())) is not None:
            keep = partial(torch.mul, stays)
            handles.append(parameter.register_hook(keep))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
