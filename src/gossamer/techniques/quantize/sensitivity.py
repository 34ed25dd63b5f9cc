"""How much each layer's rounding error moves the model's predictions: Fisher information times output error.

For a model p(y | x) and a small change e_t of a layer's output at token t, to second order (Kullback and Leibler 1951)

    KL(p || p changed) = 1/2 E_y (sum_t g_t . e_t)^2,          g_t = d log p(y | x) / d output_t,   y drawn from p

the expectation over y being the Fisher information; labels of the data are not needed. With g independent between
channels and of the error (Singh and Alistarh, "WoodFisher", 2020, section 3, use the same diagonal), and with
e = (w - w') x, one pass forward and back over a few samples gives for every layer and any rounding w' of it

    KL(w') = 1/2 sum_o F_o (w_o - w'_o) S (w_o - w'_o)^T,          F_o = sum_t g_to^2 / number of predictions

S being the second moments of the layer's input. Layers add up. It is a prediction for choosing between widths; what a
recipe does is measured. Left out: correlations between channels (Kronecker factors) and between layers.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models.quantized import rows_of
from gossamer.techniques.quantize.moments import Moments, has_moments, layer_inputs


@dataclass
class Sensitivity:
    """Hold what tells how a layer's rounding moves the predictions: `fisher_O`, and the moments of its input."""

    fisher_O: Tensor
    moments: Moments

    def divergence(self, weight: Tensor, rounded: Tensor, *, transposed: bool = False) -> float:
        """Return the predicted KL divergence in nats for each prediction when `rounded` takes the weight's place."""
        change_OI = (rows_of(weight.float(), transposed) - rows_of(rounded.float(), transposed)).double()
        errors_O = ((change_OI @ self.moments.second_II.double()) * change_OI).sum(1)
        return 0.5 * float((self.fisher_O.double() * errors_O).sum())


def sensitivities(
    module: nn.Module,
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    samples: Sequence[dict[str, Tensor]],
    layers: Mapping[str, nn.Module],
    *,
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """Return the sensitivity of some layers from one pass forward and back over each sample.

    `forward` gives logits [..., C]; every row of them is a prediction. Layers that no sample reaches are missing. The
    module's parameters get no gradients.

    >>> sensitivities(model, forward, samples, {"q": model.q})["q"].divergence(w, w_rounded)  # doctest: +SKIP
    """
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, Sensitivity] = {}
    num_predictions = 0
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    watched = {name: layer for name, layer in layers.items() if has_moments(layer)}
    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in watched.items():
            handle = layer.register_forward_hook(_watcher(name, found))
            hooks.callback(handle.remove)
        for sample in samples:
            logits = forward(module, sample).float().flatten(0, -2)
            log_p = torch.log_softmax(logits, -1)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
            num_predictions += len(log_p)
            if log_p.requires_grad:
                log_p.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    for sensitivity in found.values():
        sensitivity.fisher_O /= max(1, num_predictions)
    return found


def _watcher(name: str, found: dict[str, Sensitivity]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return a forward hook that adds up a layer's input moments, and the squares of what comes back to its output."""

    def watch(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        channels = 1 if isinstance(layer, nn.Conv2d) else output.dim() - 1
        rows = layer_inputs(layer, inputs[0].detach())
        if name not in found:
            found[name] = Sensitivity(torch.zeros(output.shape[channels]), Moments.empty(rows.shape[-1]))
        here = found[name]
        here.moments.add(rows)
        if not output.requires_grad:
            output = output.detach().requires_grad_()  # the graph begins at the first layer that is watched

        def add(gradient: Tensor) -> None:
            here.fisher_O += gradient.float().movedim(channels, -1).flatten(0, -2).square().sum(0)

        output.register_hook(add)  # type: ignore[no-untyped-call]
        return output

    return watch
