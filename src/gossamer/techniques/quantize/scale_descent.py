"""Fit the scales of all layers together, so that the whole model's predictions are kept, with every code fixed.

Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", 2024, section 3.3
("end-to-end training of quantization parameters"). Solvers that go block by block see a layer's output, or a block's;
none sees what the errors of all blocks add up to. With the codes q and zero points z fixed, the model is differentiable
in the scales, and those are few (one for 64 weights, say):

    w' = (q - z) s f        minimise  mean_t KL(p_t || p'_t)  over f [O, G], one factor for each scale, f = 1 at first

p being the original's distribution at token t and p' the rounded model's. For a weight's gradient D = dKL/dw',

    dKL/df_og = sum_{i in g} D_oi w'_oi / f_og

so nothing but the weights themselves has to be differentiated. Factors are stepped by Adam (Kingma and Ba 2014), whose
step is about `rate` whatever the size of the gradient: a factor moves by at most about rate x number of steps, and the
rate falls to zero along half a cosine.

Different from the paper: the loss is the divergence from the original's predictions instead of the text's own
likelihood (so no label is needed, any task has it, and few samples are not learned by heart), and factors instead of
scales are stepped, so that one rate fits layers of any size. Left out: zero points (integers in every file), norms.

Shape suffixes: O rows, I inputs, G groups, g inputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gossamer.models.levels import tensor_scale
from gossamer.models.quantized import Quantized, rows_of
from gossamer.techniques.quantize.grid import storable

Loss = Callable[[int], Tensor]  # sample -> its divergence, a scalar with a graph to the parameters
FIRST_DECAY, SECOND_DECAY, SMALLEST_ROOT = 0.9, 0.95, 1e-12
SMALLEST_FACTOR, LARGEST_FACTOR = 0.5, 2.0


@dataclass
class Factors:
    """Hold the factors of one weight's scales, and Adam's two means: each float32 [O, G]."""

    factor_OG: Tensor
    first_OG: Tensor
    second_OG: Tensor

    @classmethod
    def of(cls, codes: Quantized) -> Factors:
        """Return factors of one."""
        ones = torch.ones_like(codes.scale, dtype=torch.float32)
        return cls(ones, torch.zeros_like(ones), torch.zeros_like(ones))

    def step(self, gradient_OG: Tensor, rate: float, number: int) -> None:
        """Take Adam's step `number` (from 0 on)."""
        self.first_OG.lerp_(gradient_OG, 1 - FIRST_DECAY)
        self.second_OG.lerp_(gradient_OG.square(), 1 - SECOND_DECAY)
        first_OG = self.first_OG / (1 - FIRST_DECAY ** (number + 1))
        root_OG = (self.second_OG / (1 - SECOND_DECAY ** (number + 1))).sqrt()
        self.factor_OG.sub_(rate * first_OG / (root_OG + SMALLEST_ROOT)).clamp_(SMALLEST_FACTOR, LARGEST_FACTOR)


def descend_scales(
    parameters: Mapping[str, nn.Parameter],
    codes: Mapping[str, Quantized],
    factors: Mapping[str, Factors],
    loss: Loss,
    batches: Mapping[int, list[int]],
    *,
    rate: float,
    num_steps: int,
    after_step: Callable[[int, float], None] = lambda number, mean: None,
) -> None:
    """Take the steps of `batches` (number of the step: samples) on `factors`, and leave the weights as these say.

    `parameters` are the weights that `loss` depends on, by the names of `codes`; their values are set here.
    `after_step(number, mean loss)` may save the factors: the steps behind it give the same as if it went on.

    >>> descend_scales({"w": w}, {"w": codes}, {"w": Factors.of(codes)}, loss, {0: [0]}, rate=1e-3, num_steps=1)
    ... # doctest: +SKIP
    """
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        _put(parameter, scaled(codes[name], factors[name].factor_OG))
    for number, samples in batches.items():
        total = 0.0
        with torch.enable_grad():
            for sample in samples:
                found = loss(sample) / len(samples)
                found.backward()  # type: ignore[no-untyped-call]
                total += float(found.detach())
        present = rate * 0.5 * (1 + math.cos(math.pi * number / num_steps))
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                part = factors[name]
                part.step(factor_gradient(parameter, parameter.grad, codes[name], part.factor_OG), present, number)
                parameter.grad = None
                _put(parameter, scaled(codes[name], part.factor_OG))
        after_step(number, total)
    for parameter in parameters.values():
        parameter.requires_grad_(False)


def factor_gradient(weight: Tensor, gradient: Tensor, codes: Quantized, factor_OG: Tensor) -> Tensor:
    """Return the gradient of the loss in the factors [O, G], from that in a weight in its own shape."""
    product_OI = rows_of(weight.detach() * gradient, codes.transposed)
    return product_OI.reshape(-1, codes.num_groups, codes.group_size).sum(-1) / factor_OG


def scaled(codes: Quantized, factor_OG: Tensor) -> Quantized:
    """Return the codes with their scales times the factors, as the numbers that files hold: what will be served.

    >>> scaled(codes, torch.ones_like(codes.scale)).scale.equal(codes.scale)  # doctest: +SKIP
    True
    """
    unit = tensor_scale(float(codes.scale.max()))
    return replace(codes, scale=storable(codes.scale.float() * factor_OG, codes.spec, unit).to(codes.scale.dtype))


def _put(parameter: nn.Parameter, codes: Quantized) -> None:
    with torch.no_grad():
        parameter.copy_(codes.dequantize())
