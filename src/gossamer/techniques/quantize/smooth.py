"""SmoothQuant: divide channels with outliers by a factor that the weights take up, so that both round well to 8 bits.

Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022, section 4, equation 4. For input channel j with the largest activation max|X_j| and the largest
weight max|W_j| over all layers that read it,

    f_j = max|X_j|^alpha / max|W_j|^(1 - alpha)            x_j -> x_j / f_j,  W_j -> W_j f_j

The paper chooses alpha for each model by trying (0.5 for most). Here each place has its own: the one on a grid for
which the error of the readers' outputs with 8-bit weights and 8-bit inputs is predicted to be least,

    error = sum_layers  trace(D S D^T)  +  step^2 / 12 * |W diag(f)|^2

The first term is exact for the weights' rounding errors D (folded back by f), from the second moments S. The second is
the usual model of rounding inputs: an error of variance step^2 / 12 in every channel, independent of all others, with
one step for the whole tensor, 2 max_j(max|X_j| / f_j) / 255. It errs on the large side where ranges are per token.
f = 1 is one of the tries, so nothing is moved where nothing is predicted to be gained.

Factors are normalised to a geometric mean of 1, which changes neither term. Channels that are silent on all samples, or
whose weights are all zero, keep the factor 1.

Shape suffixes: O rows, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gossamer.techniques.quantize.awq import Factors, Reader, scaled_error

NUM_ALPHAS = 20
INPUT_LEVELS = 255


def smooth_factors(
    max_abs_I: Tensor,
    readers: Sequence[Reader],
    *,
    shared: Callable[[Tensor], Tensor] = lambda values_I: values_I,
    num_alphas: int = NUM_ALPHAS,
    alpha: float | None = None,
) -> Factors:
    """Return the factors with the least predicted error of the readers, `exponent` being alpha (0 where f is 1).

    `shared` makes values equal where one producer channel feeds several inputs (grouped heads).
    A given `alpha` is taken without a search.

    >>> from gossamer.models.quantized import QuantSpec
    >>> reader = Reader(torch.ones(1, 2), torch.diag(torch.tensor([900.0, 1.0])), QuantSpec(bits=8))
    >>> found = smooth_factors(torch.tensor([30.0, 1.0]), [reader])
    >>> bool(found.factors_I[0] > found.factors_I[1])
    True
    """
    max_weight_I = torch.stack([reader.weight_OI.float().abs().amax(0) for reader in readers]).amax(0)
    plain_error = predicted_error(max_abs_I, readers, torch.ones_like(max_weight_I))
    best = Factors(torch.ones_like(max_weight_I), 0.0, plain_error, plain_error)
    tried = [step / num_alphas for step in range(num_alphas + 1)] if alpha is None else [alpha]
    for share in tried:
        factors_I = balanced(max_abs_I.float(), max_weight_I, share, shared)
        error = predicted_error(max_abs_I, readers, factors_I)
        if error < best.error or alpha is not None:
            best = Factors(factors_I, share, error, plain_error)
    return best


def balanced(
    max_abs_I: Tensor,
    max_weight_I: Tensor,
    alpha: float,
    shared: Callable[[Tensor], Tensor] = lambda values_I: values_I,
) -> Tensor:
    """Return max|X|^alpha / max|W|^(1 - alpha), with a geometric mean of 1; 1 for channels without either."""
    alive_I = shared(((max_abs_I > 0) & (max_weight_I > 0)).float()) == 1
    logs_I = alpha * max_abs_I.clamp(min=1e-30).log() - (1 - alpha) * max_weight_I.clamp(min=1e-30).log()
    logs_I = shared(torch.where(alive_I, logs_I, torch.zeros_like(logs_I)))
    if not bool(alive_I.any()):
        return torch.ones_like(logs_I)
    return torch.where(alive_I, torch.exp(logs_I - logs_I[alive_I].mean()), torch.ones_like(logs_I))


def predicted_error(max_abs_I: Tensor, readers: Sequence[Reader], factors_I: Tensor) -> float:
    """Return the predicted mean squared error of the readers' outputs for one token, summed over their outputs."""
    step = 2 * float((max_abs_I.float() / factors_I).max()) / INPUT_LEVELS
    power = sum(float((reader.weight_OI.float() * factors_I).double().square().sum()) for reader in readers)
    return scaled_error(readers, factors_I) + step**2 / 12 * power
