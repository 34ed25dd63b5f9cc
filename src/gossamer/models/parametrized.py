"""Compute weights from what is trained in their place, while a `with` lasts: behind grids, or behind masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize


@contextmanager
def parametrized(network: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[Mapping[str, nn.Parameter]]:
    """Put modules before the parameters that `parts` names while the `with` lasts; yield these parameters by name.

    The network computes with what a module makes of its parameter. Tied weights stay one. Afterwards the parameters
    are where they were, with the values that they have by then.

    >>> with parametrized(network, {"fc.weight": nn.Tanh()}) as held:  # doctest: +SKIP
    ...     train(network)
    ...     found = held["fc.weight"].detach().tanh()
    """
    parameters = {name: network.get_parameter(name) for name in parts}
    holders = {name: _holders(network, parameter) for name, parameter in parameters.items()}
    orders: dict[nn.Module, list[str]] = {}
    for name, places in holders.items():
        for module, local in places:
            orders.setdefault(module, list(module._parameters))
            parametrize.register_parametrization(module, local, parts[name], unsafe=True)
    try:
        yield parameters
    finally:
        for places in holders.values():
            for module, local in places:
                parametrize.remove_parametrizations(module, local, leave_parametrized=False)
        for module, order in orders.items():
            _put_in_order(module, order)


def _holders(network: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Return every module that holds a parameter, with its name there: two of a tied one."""
    return [
        (module, local)
        for module in network.modules()
        for local, held in module.named_parameters(recurse=False)
        if held is parameter
    ]


def _put_in_order(module: nn.Module, names: list[str]) -> None:
    """Register parameters again in the order that they had: files list them so."""
    for name in names:
        parameter = module.get_parameter(name) if getattr(module, name) is not None else None
        delattr(module, name)
        module.register_parameter(name, parameter)
