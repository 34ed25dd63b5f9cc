"""Weights that are in memory only while they are needed: peak memory follows the largest part, not the model.

A module is built without values (its parameters lie on torch's meta device). Hooks on every module that owns
parameters fetch the values before it runs; what was used longest ago is given back when the loaded values pass a
budget, but never what is running or held. A model thus runs as it stands, whatever its size: one whole forward reads
every weight once.

Invariant: a parameter is either on the meta device (an access without its module running fails with torch's own error,
never with wrong numbers) or holds exactly what `value` returns, in float32.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError

Value = Callable[[str], Tensor]


class LazyWeights:
    """Fetch and drop the parameters of a module; `value(name)` returns a parameter's present values.

    `budget` bounds the bytes that stay loaded (float32); the parameters of one running module may exceed it.

    >>> weights = LazyWeights(module, shards.read, budget=2**30)  # doctest: +SKIP
    >>> with weights.held(module.model.layers[0]):  # doctest: +SKIP
    ...     module.model.layers[0].self_attn.q_proj.weight.sum()
    """

    def __init__(self, module: nn.Module, value: Value, budget: int) -> None:
        self.value = value
        self.budget = budget
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}  # first name -> where the parameter stands
        self._empty: dict[str, nn.Parameter] = {}
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._held: Counter[str] = Counter()
        self._names: dict[int, list[str]] = {}  # id of a module -> parameters of its own
        first: dict[int, str] = {}
        for prefix, part in module.named_modules():
            own = []
            for local, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                name = first.setdefault(id(parameter), f"{prefix}.{local}" if prefix else local)
                self._places.setdefault(name, []).append((part, local))
                self._empty[name] = parameter
                own.append(name)
            if own:
                self._names[id(part)] = own
                part.register_forward_pre_hook(self._enter, prepend=True)
                part.register_forward_hook(self._leave, always_call=True)

    @property
    def loaded_bytes(self) -> int:
        """Return the bytes of the values that are in memory now."""
        return sum(self._loaded.values())

    @contextmanager
    def held(self, module: nn.Module) -> Iterator[None]:
        """Keep the parameters of a module and all that is inside it in memory while the `with` lasts."""
        names = list(dict.fromkeys(name for part in module.modules() for name in self._names.get(id(part), ())))
        self._acquire(names)
        try:
            yield
        finally:
            self._release(names)

    @contextmanager
    def held_parameter(self, name: str) -> Iterator[nn.Parameter]:
        """Keep one parameter in memory while the `with` lasts."""
        self._acquire([name])
        try:
            part, local = self._places[name][0]
            yield part.get_parameter(local)
        finally:
            self._release([name])

    def refresh(self, name: str) -> None:
        """Fetch a parameter again if it is in memory: what `value` returns for it has changed."""
        if name in self._loaded:
            self._load(name)

    def drop(self) -> None:
        """Give back everything that is not held."""
        self._evict(0)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._acquire(self._names[id(module)])

    def _leave(self, module: nn.Module, _: Any, __: Any) -> None:
        self._release(self._names[id(module)])

    def _acquire(self, names: Iterable[str]) -> None:
        for name in names:
            self._held[name] += 1
            if name in self._loaded:
                self._loaded.move_to_end(name)
            else:
                self._evict(self.budget - 4 * self._empty[name].numel())
                self._load(name)

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            self._held[name] -= 1
        self._evict(self.budget)

    def _load(self, name: str) -> None:
        values = self.value(name)
        wanted = self._empty[name].shape
        if values.shape != wanted:
            raise ModelError(
                f"{name} has the shape {list(values.shape)} in the file, the model needs {list(wanted)}",
                "config.json and weights belong to different models: download the folder again",
            )
        parameter = nn.Parameter(values.float(), requires_grad=False)
        for part, local in self._places[name]:
            part._parameters[local] = parameter
        self._loaded[name] = 4 * values.numel()

    def _evict(self, budget: int) -> None:
        total = self.loaded_bytes
        for name in list(self._loaded):
            if total <= budget:
                return
            if self._held[name] <= 0:
                total -= self._loaded.pop(name)
                for part, local in self._places[name]:
                    part._parameters[local] = self._empty[name]


def without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Return what `build` makes: parameters on the meta device, tied as the model ties them; buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = build()
    tie = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    for parameter in module.parameters():
        assert parameter.is_meta, "a parameter was built with values"
        parameter.requires_grad_(False)
    return module.eval()


def load_buffers(module: nn.Module, read: Callable[[str], Tensor], names: Iterable[str]) -> None:
    """Fill the persistent buffers that the checkpoint holds; the others keep what they were built with."""
    held = set(names)
    buffers = dict(module.named_buffers())
    for name in module.state_dict():
        if name in buffers and name in held:
            with torch.no_grad():
                buffers[name].copy_(read(name))
