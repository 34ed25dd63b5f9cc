"""How much each layer's rounding error moves the model's predictions: Fisher information times output error.

For a model p(y | x) and a small change e_t of a layer's output at token t, to second order (Kullback and Leibler 1951)

    KL(p || p changed) = 1/2 E_y (sum_t g_t . e_t)^2,          g_t = d log p(y | x) / d output_t,   y drawn from p

the expectation over y being the Fisher information; labels of the data are not needed. With g independent between
channels and of the error (Singh and Alistarh, "WoodFisher", 2020, section 3, use the same diagonal), and with
e = (w - w') x, one pass forward and back over a few samples gives for every layer and any rounding w' of it

    KL(w') = 1/2 sum_o F_o (w_o - w'_o) S (w_o - w'_o)^T,          F_o = sum_t g_to^2 / number of predictions

S being the second moments of the layer's input. Layers add up. It is a prediction for choosing between widths; what a
recipe does is measured. Left out: correlations between channels (Kronecker factors) and between layers.

Where a model is read piece by piece, no gradient comes from its end to its first blocks. There the output y of a
layer's own block takes the place of the prediction: with r drawn from N(0, 1) for each channel,

    g_t = d sum_s (r_s . y_s / |y_s|) / d output_t,        sum_o F_o (w_o - w'_o) S (w_o - w'_o)^T

is the expected share of |y|^2 by which the block's output moves (Hutchinson's probes), for each token; and what a
share of the last hidden states h is worth in nats comes from the layers behind the blocks alone,

    nats = 1/2 share E_y sum_t |d log p(y | x) / d h_t|^2 |h_t|^2 / H / number of predictions

This takes it that a share once lost is carried to the end, neither larger nor smaller: no block counts for more than
another by where it stands, which is what the gradients of the whole model would tell.

Shape suffixes: O outputs, I inputs, t tokens, H channels of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.models.quantized import rows_of
from gossamer.models.walker import Call, Forward, Output, Stream, Walker, hidden_states
from gossamer.techniques.quantize.moments import Moments, has_moments, layer_inputs

ROWS_AT_A_TIME = 4096  # of a weight: memory stays flat for large vocabularies


@dataclass
class Sensitivity:
    """Hold what tells how a layer's rounding moves the predictions: `fisher_O`, and the moments of its input."""

    fisher_O: Tensor
    moments: Moments

    def divergence(self, weight: Tensor, rounded: Tensor, *, transposed: bool = False) -> float:
        """Return the predicted KL divergence in nats for each prediction when `rounded` takes the weight's place."""
        before_OI, after_OI = rows_of(weight, transposed), rows_of(rounded, transposed)
        total = 0.0
        for first in range(0, len(before_OI), ROWS_AT_A_TIME):
            here = slice(first, first + ROWS_AT_A_TIME)
            change_OI = before_OI[here].float() - after_OI[here].float()
            errors_O = ((change_OI @ self.moments.second_II) * change_OI).sum(1, dtype=torch.float64)
            total += float((self.fisher_O[here].double() * errors_O).sum())
        return 0.5 * total


def sensitivities(
    module: nn.Module,
    forward: Forward,
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
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return _summed(layers, (partial(_drawn, forward, module, sample, draw) for sample in samples))


def block_sensitivities(
    block: nn.Module, calls: Sequence[Call], layers: Mapping[str, nn.Module], *, seed: int = 0
) -> dict[str, Sensitivity]:
    """Return the sensitivity of some layers of one block from one pass forward and back: of its output, not in nats.

    `divergence` is then half the share of the output's squares by which each token's output moves.
    """
    draw = torch.Generator().manual_seed(seed)

    def probed(call: Call) -> tuple[Tensor, int]:
        hidden = hidden_states(call(block)).float()
        rows_tH = hidden.flatten(0, -2) if hidden.dim() == 3 else hidden.flatten(1)  # a picture is one token
        size_t1 = rows_tH.detach().norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        probe_tH = torch.randn(rows_tH.shape, generator=draw)
        return (rows_tH * probe_tH / size_t1).sum(), len(rows_tH)

    return _summed(layers, (partial(probed, call) for call in calls))


def last_sensitivities(
    walker: Walker, stream: Stream, layers: Mapping[str, nn.Module], *, seed: int = 0
) -> tuple[dict[str, Sensitivity], float]:
    """Return the sensitivity of layers outside of blocks, and what a share of the last hidden states is worth in nats.

    `stream` holds the outputs of all stacks; the last stack's are those that count.
    """
    draw = torch.Generator().manual_seed(seed)
    last = list(stream.finished)[-1]
    leaves: list[Tensor] = []
    num_predictions = 0

    def predicted(position: int) -> tuple[Tensor, int]:
        nonlocal num_predictions
        output = stream.finished[last][position]
        leaves.append(hidden_states(output).detach().clone().requires_grad_())
        behind = leaves[-1] if isinstance(output, Tensor) else (leaves[-1], *output[1:])
        outputs: list[Output] = [*stream.finished[last]]
        outputs[position] = behind
        ending = Stream(finished={**stream.finished, last: outputs})
        forward = lambda *_: walker.replay(ending, position)  # noqa: E731
        loss, count = _drawn(forward, walker.module, {}, draw)
        num_predictions += count
        return loss, count

    found = _summed(layers, (partial(predicted, position) for position in range(len(walker.samples))))
    worth = 0.0
    for hidden in leaves:
        if hidden.grad is not None:
            sizes = [values.square().sum(-1) for values in (hidden.grad, hidden.detach())]
            worth += float((sizes[0] * sizes[1]).sum()) / hidden.shape[-1]
    return found, worth / max(1, num_predictions)


def _drawn(forward: Forward, module: nn.Module, sample: dict[str, Tensor], draw: torch.Generator) -> tuple[Tensor, int]:
    """Return log p of answers drawn from the model's own predictions, summed, and how many there are."""
    log_p = torch.log_softmax(forward(module, sample).float().flatten(0, -2), -1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
    return log_p.gather(1, drawn).sum(), len(log_p)


def _summed(
    layers: Mapping[str, nn.Module], losses: Iterable[Callable[[], tuple[Tensor, int]]]
) -> dict[str, Sensitivity]:
    """Return what comes back to the outputs of some layers from losses that are sums over so many terms, for each."""
    found: dict[str, Sensitivity] = {}
    num_terms = 0
    watched = {name: layer for name, layer in layers.items() if has_moments(layer)}
    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in watched.items():
            handle = layer.register_forward_hook(_watcher(name, found))
            hooks.callback(handle.remove)
        for passed in losses:
            loss, count = passed()
            num_terms += count
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
    for sensitivity in found.values():
        sensitivity.fisher_O /= max(1, num_terms)
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
