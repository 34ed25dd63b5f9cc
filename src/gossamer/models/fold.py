"""Fold batch norms into the convolutions in front of them, in place of arithmetic at every request.

In eval mode a batch norm is one multiplication and one addition for each channel c of what the convolution wrote:

    y = gamma_c * (x - mean_c) / sqrt(var_c + eps) + beta_c = factor_c * x + shift_c
    factor_c = gamma_c / sqrt(var_c + eps)         shift_c = beta_c - factor_c * mean_c

The factor goes into the convolution's weight (and bias). The norm stays where it is, so that the stock class still
loads the model, and becomes y = x + shift_c: gamma 1, mean 0, variance 1 - eps, beta the shift. Quantization then
sees the weights that are really applied, and a runtime that fuses the two finds a factor of one.

Ioffe and Szegedy, "Batch Normalization", 2015, section 3.1; Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 3.2. A pair is folded only when the norm is
the sole reader of the convolution and the convolution the sole writer of what the norm reads. Left out: linear layers,
transposed convolutions, and norms in front of a convolution (zero padding stands between them).

Shape suffixes: C channels, I inputs of a kernel.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gossamer.models.dataflow import evaluating, tensors_in

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FoldedPair:
    """Name a convolution and the batch norm that was folded into it."""

    convolution: str
    norm: str


def fold_batch_norms(
    module: nn.Module,
    example: Mapping[str, Tensor],
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None = None,
) -> tuple[nn.Module, list[FoldedPair]]:
    """Return a copy of a model with batch norms folded into their convolutions, and the pairs; equal in eval mode.

    `example` holds inputs by argument name: one traced pass finds the pairs.

    >>> folded, pairs = fold_batch_norms(resnet, {"pixel_values": torch.zeros(1, 3, 32, 32)})  # doctest: +SKIP
    """
    folded = copy.deepcopy(module)
    pairs = find_pairs(folded, example, forward)
    with torch.no_grad():
        for pair in pairs:
            convolution, norm = folded.get_submodule(pair.convolution), folded.get_submodule(pair.norm)
            assert isinstance(convolution, Convolution)
            assert isinstance(norm, BatchNorm)
            _fold(convolution, norm)
    return folded, pairs


def fold_factors(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Return (factor [C], shift [C]), both float64, of a batch norm in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # float64: one rounding, when the product is stored
    inverse_C = torch.rsqrt(norm.running_var.double() + norm.eps)
    gamma_C = inverse_C if norm.weight is None else norm.weight.double() * inverse_C
    beta_C = torch.zeros_like(gamma_C) if norm.bias is None else norm.bias.double()
    return gamma_C, beta_C - gamma_C * norm.running_mean.double()


def find_pairs(
    module: nn.Module,
    example: Mapping[str, Tensor],
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None = None,
) -> list[FoldedPair]:
    """Return the pairs of a convolution and the batch norm that alone reads it, seen in one pass on `example`."""
    watcher = _Readers()
    with evaluating(module), ExitStack() as hooks:
        for name, part in module.named_modules():
            if isinstance(part, Convolution):
                hooks.callback(part.register_forward_hook(watcher.written_by(name)).remove)
            elif isinstance(part, BatchNorm) and part.running_mean is not None and part.affine:
                hooks.callback(part.register_forward_pre_hook(watcher.read_by(name)).remove)
        with watcher:
            result = forward(module, dict(example)) if forward is not None else module(**example)
    for tensor in tensors_in(result):
        watcher.note(tensor, "the model's output")
    norms: dict[str, list[str]] = defaultdict(list)
    for convolution, readers in watcher.readers.items():
        if len(readers) == 1:
            norms[readers[0]].append(convolution)
    known = dict(module.named_modules())
    return [
        FoldedPair(convolutions[0], norm)
        for norm, convolutions in norms.items()
        if len(convolutions) == 1
        and norm in known
        and watcher.reads[norm] == 1
        and watcher.writes[convolutions[0]] == 1
    ]


class _Readers(TorchFunctionMode):
    """Note who reads the output of each convolution: a batch norm by its name, any other operation by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, list[str]] = defaultdict(list)
        self.reads: dict[str, int] = defaultdict(int)
        self.writes: dict[str, int] = defaultdict(int)
        self._writers = WeakTensorKeyDictionary()
        self._reading: str | None = None

    def note(self, tensor: Tensor, reader: str) -> None:
        writer = self._writers.get(tensor)  # type: ignore[no-untyped-call]
        if writer is not None:
            self.readers[writer].append(reader)

    def written_by(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            self.writes[name] += 1
            self._writers[output] = name

        return hook

    def read_by(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: Any) -> None:
            self.reads[name] += 1
            self._reading = name

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "batch_norm":
            for tensor in tensors_in([args, kwargs]):
                self.note(tensor, self._reading or name)
            self._reading = None
        elif name not in ("__get__", "dim", "size"):  # these ask about a tensor, they do not read its values
            for tensor in tensors_in([args, kwargs]):
                self.note(tensor, name)
        return func(*args, **kwargs)


def _fold(
    convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
) -> None:
    """Move the norm's factor into the convolution and leave the norm as the addition of its shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor_C, shift_C = fold_factors(norm)
    weight_CI = convolution.weight
    weight_CI.copy_((weight_CI.double().flatten(1) * factor_C.unsqueeze(1)).reshape(weight_CI.shape))
    if convolution.bias is not None:
        convolution.bias.copy_(convolution.bias.double() * factor_C)
    norm.weight.fill_(1.0)
    norm.bias.copy_(shift_C)
    norm.running_mean.zero_()
    # below zero only for eps > 1, where no variance gives exactly one
    norm.running_var.fill_(max(1.0 - norm.eps, 0.0))
    if norm.eps > 1.0:
        norm.weight.fill_((norm.eps) ** 0.5)
