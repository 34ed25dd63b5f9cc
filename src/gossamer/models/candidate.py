"""A candidate: a model in memory together with what has been done to it so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.models.quantized import ActivationSpec, Quantized

if TYPE_CHECKING:
    from gossamer.models.source import Source


@dataclass
class Candidate:
    """Hold a model and the decisions made about its tensors.

    `module` is an ordinary module whose weights already are the dequantized values, so it runs as it stands;
    `quantized` holds the codes by parameter name (`...q_proj.weight`), `activations` the grids of layer inputs by
    module name, `dtype` what the remaining floating-point tensors are stored as. Tied weights appear under one name.
    """

    source: Source
    module: nn.Module
    quantized: dict[str, Quantized] = field(default_factory=dict)
    activations: dict[str, ActivationSpec] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    applied: list[dict[str, Any]] = field(default_factory=list)  # recipe entries, in the order they were applied

    def set_quantized(self, parameter: str, quantized: Quantized) -> None:
        """Record codes for a parameter and put their values into the module (tied names see it too)."""
        self.quantized[parameter] = quantized
        with torch.no_grad():
            target = self.module.get_parameter(parameter)
            target.copy_(quantized.dequantize().to(target.dtype))

    @contextmanager
    def simulated(self) -> Iterator[nn.Module]:
        """Yield the module computing as the artifact will: layer inputs rounded to their grids."""
        handles = []
        for name, spec in self.activations.items():

            def round_input(_: nn.Module, inputs: tuple[Tensor, ...], spec: ActivationSpec = spec) -> tuple[Any, ...]:
                return (spec.fake_quantize(inputs[0]), *inputs[1:])

            handles.append(self.module.get_submodule(name).register_forward_pre_hook(round_input))
        try:
            yield self.module
        finally:
            for handle in handles:
                handle.remove()
