"""A part of a model on another device for a while: its values in main memory stay as they are, and come back.

Nothing is copied back. So what a model holds is what was put into it in main memory, to the bit, wherever samples
passed it; what is changed on the device is gone with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module's parameters and buffers on a device while the `with` lasts; nothing happens for the CPU.

    A parameter that stands in several places of the module stays one parameter.
    """
    if device.type == "cpu":
        yield
        return
    stores: list[dict[str, Any]] = []
    for part in module.modules():
        stores += [part._parameters, part._buffers]
    places = [(held, name, values) for held in stores for name, values in held.items() if values is not None]
    there: dict[int, Tensor] = {}
    try:
        for held, name, values in places:
            if id(values) not in there:
                there[id(values)] = _on(values, device)
            held[name] = there[id(values)]
        yield
    finally:
        for held, name, values in places:
            held[name] = values


def _on(values: Tensor, device: torch.device) -> Tensor:
    copied = values.detach().to(device)
    return nn.Parameter(copied, requires_grad=values.requires_grad) if isinstance(values, nn.Parameter) else copied
