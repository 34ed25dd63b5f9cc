"""What a calibration pass keeps of the input of one layer: second moments and magnitudes, summed over all tokens.

For an input x with I channels, over N tokens t of all calibration samples:

    second_II = sum_t x_t x_t^T / N    mean_I = sum_t x_t / N    mean_abs_I = sum_t |x_t| / N    max_abs_I = max_t |x_t|

With these alone the squared error of a linear layer's output is known exactly for any replacement w' of a row w:

    mean_t (w x_t - w' x_t)^2 = (w - w') second_II (w - w')^T

so solvers (GPTQ, SparseGPT, AWQ's searches) never look at the samples again, and memory is I^2 whatever N is. The
Hessian in the papers (Frantar et al. 2022, equation 2: H = 2 X X^T) is 2 N second_II; the factor changes nothing.

A convolution is a linear layer over its patches (Frantar and Alistarh 2022, appendix on convolutions); with groups
every group sees other channels, so those have no single second moment and are left to data-free rounding.

Shape suffixes: t tokens, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PANEL = 128  # rows of second_II that are added to at once


@dataclass
class Moments:
    """Hold the moments of one layer's input: `num_tokens`, `second_II`, `mean_I`, `mean_abs_I`, `max_abs_I`, float32.

    >>> seen = Moments.empty(2); seen.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]])); seen.second_II.tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """

    num_tokens: int
    _second_II: Tensor  # the sum while tokens come, the mean from when somebody asks: it is too large for both
    _sum_I: Tensor
    _abs_sum_I: Tensor
    max_abs_I: Tensor
    _is_mean: bool = False

    @classmethod
    def empty(cls, num_inputs: int, device: torch.device | None = None) -> Moments:
        """Return moments that have seen nothing, and gather on a device (by default the CPU)."""
        zeros = torch.zeros(num_inputs, device=device)
        return cls(0, torch.zeros(num_inputs, num_inputs, device=device), zeros.clone(), zeros.clone(), zeros.clone())

    def add(self, inputs: Tensor) -> None:
        """Take in inputs [..., I]."""
        x_tI = inputs.detach().float().reshape(-1, inputs.shape[-1])
        second_II = self.sums()[0]
        for first in range(0, x_tI.shape[1], PANEL):  # the upper triangle is enough: it is mirrored when all have come
            second_II[first : first + PANEL, first:].addmm_(x_tI[:, first : first + PANEL].t(), x_tI[:, first:])
        self._sum_I += x_tI.sum(0)
        size_tI = x_tI.abs()
        self._abs_sum_I += size_tI.sum(0)
        torch.maximum(self.max_abs_I, size_tI.amax(0), out=self.max_abs_I)
        self.num_tokens += x_tI.shape[0]

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums of x x^T (its upper triangle), x and |x|, and the largest |x|: the very tensors held."""
        if self._is_mean:
            self._second_II *= self.num_tokens
            self._is_mean = False
        return self._second_II, self._sum_I, self._abs_sum_I, self.max_abs_I

    def merge(self, other: Moments) -> None:
        """Take in all that another has seen of the same input."""
        *sums, max_abs_I = self.sums()
        *their_sums, their_max_abs_I = other.sums()
        for mine, theirs in zip(sums, their_sums, strict=True):
            mine += theirs
        torch.maximum(max_abs_I, their_max_abs_I, out=max_abs_I)
        self.num_tokens += other.num_tokens

    @property
    def second_II(self) -> Tensor:
        """Return the mean of x x^T, float32 [I, I]: the very tensor that is held, not to be changed."""
        if not self._is_mean and self.num_tokens:
            self._second_II /= self.num_tokens
            for first in range(0, len(self._second_II), PANEL):
                last = first + PANEL
                self._second_II[last:, first:last] = self._second_II[first:last, last:].t()
            self._is_mean = True
        return self._second_II

    @property
    def mean_I(self) -> Tensor:
        """Return the mean of x, float32 [I]."""
        return self._sum_I / max(1, self.num_tokens)

    @property
    def covariance_II(self) -> Tensor:
        """Return second_II - mean_I mean_I^T, float32 [I, I]: what is left of errors when a bias takes their mean."""
        mean_I = self.mean_I.double()
        covariance_II = torch.addr(self.second_II, self.mean_I, self.mean_I, alpha=-1.0)
        # the variances in float64: where the mean is large they are small differences of large numbers
        variance_I = self.second_II.diagonal().double() - mean_I.square()
        covariance_II.diagonal().copy_(variance_I.clamp(min=0.0))
        return covariance_II

    @property
    def mean_abs_I(self) -> Tensor:
        """Return the mean of |x|, float32 [I]."""
        return self._abs_sum_I / max(1, self.num_tokens)


def has_moments(layer: nn.Module) -> bool:
    """Say whether a layer multiplies one matrix by its inputs, so that second moments describe its error."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(layer, nn.Embedding)


def layer_inputs(layer: nn.Module, values: Tensor) -> Tensor:
    """Return what the layer multiplies its matrix by, [..., I]: the input itself, or the patches of a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return values
    assert not isinstance(layer.padding, str)
    patches = nn.functional.unfold(
        values, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )
    return patches.transpose(1, 2)
