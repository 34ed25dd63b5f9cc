"""A candidate: a model together with what has been done to it so far, in memory or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.models.adapters import Adapted
from gossamer.models.caches import Cache
from gossamer.models.deferred import Deferred, Outline, outline_of
from gossamer.models.lazy import LazyWeights
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from gossamer.models.source import Source


@dataclass
class Candidate:
    """Hold a model and the decisions made about its tensors.

    `module` is an ordinary module whose weights already are the dequantized values, so it runs as it stands;
    `quantized` holds the codes by parameter name (`...q_proj.weight`), `activations` the grids of layer inputs by
    module name, `dtype` what the remaining floating-point tensors are stored as. Tied weights appear under one name.

    A streamed candidate has `weights`: its module's values are fetched by `read` when they are needed, and codes are
    made when they are asked for.
    """

    source: Source
    module: nn.Module
    quantized: MutableMapping[str, Quantized] = field(default_factory=dict)
    activations: dict[str, ActivationSpec] = field(default_factory=dict)
    caches: dict[str, Cache] = field(default_factory=dict)  # attention -> how its keys and values are kept
    dtype: torch.dtype = torch.float32
    applied: list[dict[str, Any]] = field(default_factory=list)  # recipe entries, in the order they were applied
    routed: dict[str, dict[str, Any]] = field(default_factory=dict)  # what holds experts -> the tokens that each saw
    fallbacks: list[str] = field(default_factory=list)  # what a sweep did instead of what it was asked, and why
    widened: dict[str, QuantSpec] = field(default_factory=dict)  # parameter -> the wider grid that it was given
    stock: bool = True  # its class can be built from its config; False: only a runtime that holds a graph can hold it
    weights: LazyWeights | None = None
    read: Callable[[str], Tensor] | None = None
    replaced: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # plain values of a streamed candidate

    @classmethod
    def streamed(cls, source: Source, module: nn.Module, read: Callable[[str], Tensor], budget: int) -> Candidate:
        """Return a candidate whose values are fetched by `read`, at most `budget` bytes of them at a time."""
        candidate = cls(source, module, quantized=Deferred(), read=read)
        candidate.weights = LazyWeights(module, candidate._streamed_value, budget)
        return candidate

    def _streamed_value(self, parameter: str) -> Tensor:
        assert self.read is not None
        codes = self.quantized.get(parameter)
        return codes.dequantize() if codes is not None else self.plain_value(parameter)

    def plain_value(self, parameter: str) -> Tensor:
        """Return a streamed candidate's values of a parameter as they are without codes."""
        assert self.read is not None
        replaced = self.replaced.get(parameter)
        return replaced() if replaced is not None else self.read(parameter)

    def values(self, parameter: str) -> Tensor:
        """Return a parameter's present values, in its own shape."""
        if self.weights is not None:
            return self.weights.value(parameter)
        return self.module.get_parameter(parameter).detach()

    def held(self, module: nn.Module) -> AbstractContextManager[None]:
        """Keep the values of a part of the model in memory while the `with` lasts."""
        return nullcontext() if self.weights is None else self.weights.held(module)

    def outline(self, parameter: str) -> Outline:
        """Return what a parameter's codes are like, without making them."""
        if isinstance(self.quantized, Deferred):
            return self.quantized.outline(parameter)
        return outline_of(self.quantized[parameter])

    def set_quantized(self, parameter: str, quantized: Quantized) -> None:
        """Record codes for a parameter and put their values into the module (tied names see it too)."""
        self.quantized[parameter] = quantized
        if self.weights is not None:
            self.weights.refresh(parameter)
            return
        with torch.no_grad():
            target = self.module.get_parameter(parameter)
            target.copy_(quantized.dequantize().to(target.dtype))

    def unset_quantized(self, parameter: str, values: Tensor | None) -> None:
        """Take codes back: the parameter has the values again that it had before (a streamed one reads them)."""
        self.quantized.pop(parameter, None)
        if self.weights is not None:
            self.weights.refresh(parameter)
            return
        assert values is not None
        with torch.no_grad():
            self.module.get_parameter(parameter).copy_(values)

    def round(self, parameter: str, outline: Outline, rule: Callable[[Tensor], Quantized]) -> None:
        """Replace a parameter by `rule` of its values: now, or (when streamed) whenever it is asked for."""
        if self.read is None:
            self.set_quantized(parameter, rule(self.values(parameter)))
            return
        # the values that the rule sees are those of now: what changes floats later does not reach codes
        values = self.replaced.get(parameter) or partial(self.read, parameter)
        self.defer(parameter, outline, lambda: rule(values()))

    def defer(self, parameter: str, outline: Outline, make: Callable[[], Quantized]) -> None:
        """Let `make` give the codes of a streamed candidate's parameter; they are not kept."""
        assert isinstance(self.quantized, Deferred)
        assert self.weights is not None
        self.quantized.defer(parameter, outline, make)
        self.weights.refresh(parameter)

    def put_weight(self, parameter: str, values: Callable[[], Tensor]) -> None:
        """Give a parameter other plain values: now, or (when streamed) whenever it is asked for."""
        if self.weights is not None:
            self.replaced[parameter] = values
            self.weights.refresh(parameter)
            return
        with torch.no_grad():
            target = self.module.get_parameter(parameter)
            target.copy_(values().to(target.dtype))

    def replace_floats(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Change every parameter that has no codes: now, or (when streamed) whenever one is fetched."""
        if self.read is not None:
            assert self.weights is not None
            for name in self.replaced:
                self.replaced[name] = partial(_changed, change, name, self.replaced[name])
            self.read = partial(_changed_by_name, change, self.read)
            self.weights.drop()
            return
        with torch.no_grad():
            for name, values in self.module.named_parameters():
                if name not in self.quantized:
                    values.copy_(change(name, values))

    @contextmanager
    def simulated(self) -> Iterator[nn.Module]:
        """Yield the module computing as the artifact will: layer inputs, keys and values rounded to their grids."""
        handles = [cache.simulate(self.module.get_submodule(name)) for name, cache in self.caches.items()]
        for name, spec in self.activations.items():

            def round_input(_: nn.Module, inputs: tuple[Tensor, ...], spec: ActivationSpec = spec) -> tuple[Any, ...]:
                return (spec.fake_quantize(inputs[0]), *inputs[1:])

            layer = self.module.get_submodule(name)
            place = layer.rounded if isinstance(layer, Adapted) else layer
            handles.append(place.register_forward_pre_hook(round_input))
        try:
            yield self.module
        finally:
            for handle in handles:
                handle.remove()


def _changed(change: Callable[[str, Tensor], Tensor], name: str, values: Callable[[], Tensor]) -> Tensor:
    return change(name, values().float())


def _changed_by_name(change: Callable[[str, Tensor], Tensor], read: Callable[[str], Tensor], name: str) -> Tensor:
    return change(name, read(name).float())
