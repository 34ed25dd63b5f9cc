"""Let gradients pass through a rounding, which has none that is of use.

Rounding is flat wherever it does not jump. The straight-through estimator takes it for the identity on the way back:

    forward   rounded          backward   dL/dvalues = dL/drounded

Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation", 2013, section 4. Clamping stays what it is: who clamps `values` first stops gradients outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, of the shape of `values`, whose gradient goes to `values` unchanged.

    >>> values = torch.tensor([0.4, 1.7], requires_grad=True)
    >>> straight_through(values, values.detach().round()).sum().backward()
    >>> values.grad.tolist()
    [1.0, 1.0]
    """
    found: Tensor = _StraightThrough.apply(values, rounded)  # type: ignore[no-untyped-call]
    return found


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, rounded: Tensor) -> Tensor:
        """Return what was rounded."""
        return rounded.view_as(rounded)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it came."""
        return gradients[0], None
