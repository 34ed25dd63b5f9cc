"""HQQ: choose a grid from the weights alone, by a loss that forgives the few weights that no grid holds well.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. For a group of weights w, codes
q = nearest(w / s + z) and w' = (q - z) s, make small

    sum |w - w'|^p,     p < 1

which a squared error would spend on outliers. Half-quadratic splitting gives each weight a share e of its error that
is forgiven, and solves in turns, beta growing by kappa,

    e = shrink(w - w')              shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z = mean of q - (w - e) / s     (the paper's equation for the zero point; the scale stays)

with p = 0.7, beta = 10, kappa = 1.01 and 20 rounds, as in the released code.

Different here: zero points are integers, because that is what files and kernels hold (the paper keeps a float for each
group), so z is rounded. Half a step of freedom is lost by that, and the scale makes up for some of it: it follows by
least squares from the same w - e. Errors enter shrink in steps of the grid: in weights of usual size (0.01 to 0.1) the
released constants forgive nothing, since only errors above beta^(-1 / (2 - p)) = 0.17 are touched. And each group keeps
the best grid of all rounds, the min-max grid included, where the paper stops when a whole tensor gets no better.

Invariant: no group's loss is above that of the grid it started from.

Shape suffixes: N groups, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.models.quantized import QuantSpec

POWER, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20


def hqq_grid(
    groups_Ng: Tensor, scale_N1: Tensor, zero_N1: Tensor, spec: QuantSpec, hold: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (scale, integer zero point), each [N, 1], with the least sum of |w - w'|^p that was met.

    It starts from the asymmetric grid that is given; `hold` rounds scales to what files hold.

    >>> hqq_grid(groups_Ng, *minmax_grid(groups_Ng, spec), spec, storable)  # doctest: +SKIP
    """
    best_scale_N1, best_zero_N1 = scale_N1, zero_N1
    codes_Ng = spec.nearest(groups_Ng / scale_N1, zero_N1)
    error_Ng = groups_Ng - (codes_Ng - zero_N1) * scale_N1
    best_N1 = _loss(error_Ng)
    beta = BETA
    for _ in range(ROUNDS):
        kept_Ng = groups_Ng - shrink(error_Ng / scale_N1, beta) * scale_N1
        zero_N1 = (codes_Ng - kept_Ng / scale_N1).mean(1, keepdim=True).round().clamp(spec.low, spec.high)
        steps_Ng = codes_Ng - zero_N1
        fit_N1 = (kept_Ng * steps_Ng).sum(1, keepdim=True) / steps_Ng.square().sum(1, keepdim=True).clamp(min=1)
        scale_N1 = hold(torch.where(fit_N1 > 0, fit_N1, scale_N1))
        codes_Ng = spec.nearest(groups_Ng / scale_N1, zero_N1)
        error_Ng = groups_Ng - (codes_Ng - zero_N1) * scale_N1
        loss_N1 = _loss(error_Ng)
        better_N1 = loss_N1 < best_N1
        best_N1 = torch.where(better_N1, loss_N1, best_N1)
        best_scale_N1 = torch.where(better_N1, scale_N1, best_scale_N1)
        best_zero_N1 = torch.where(better_N1, zero_N1, best_zero_N1)
        beta *= KAPPA
    return best_scale_N1, best_zero_N1


def shrink(values: Tensor, beta: float, power: float = POWER) -> Tensor:
    """Return the proximal step of |x|^p by the paper's rule: values pulled to zero, small ones all the way.

    >>> shrink(torch.tensor([0.1, -0.5]), 10.0).tolist()
    [0.0, -0.37688...]
    """
    size = values.abs()
    pull = size.clamp(min=torch.finfo(torch.float32).tiny) ** (power - 1) / beta
    return values.sign() * (size - pull).clamp(min=0)


def _loss(error_Ng: Tensor) -> Tensor:
    return (error_Ng.abs() ** POWER).sum(1, keepdim=True)
