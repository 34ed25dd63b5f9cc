"""Bias correction: the mean error of each output is no error if the layer's bias takes it.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
2019, section 4.2. For a layer y = W x + b whose weight becomes W', with D = W - W' and the mean m and covariance C of
its input over calibration tokens, the squared error of an output o is

    mean_t (D_o x_t + b_o - b'_o)^2  =  D_o C D_o^T  +  (D_o m + b_o - b'_o)^2

so the best bias is b' = b + D m, and what is left depends on the covariance alone. Different from the paper, which
corrects after rounding: solvers that choose W' by second moments are given C in their place (`Moments.covariance_II`),
and so spend nothing on what the bias takes for free. Layers without a bias are solved by their second moments.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from torch import Tensor


def corrected_bias(bias_O: Tensor, weight_OI: Tensor, rounded_OI: Tensor, mean_I: Tensor) -> Tensor:
    """Return the bias [O] that takes the mean error of every output.

    >>> corrected_bias(torch.zeros(1), torch.tensor([[1.0]]), torch.tensor([[0.5]]), torch.tensor([4.0])).tolist()
    [2.0]
    """
    return (bias_O.double() + (weight_OI.double() - rounded_OI.double()) @ mean_I.double()).to(bias_O.dtype)
