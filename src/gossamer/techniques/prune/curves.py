"""What cutting a dimension to each of several sizes is predicted to cost, all sizes from one solve.

`obs` (`units.py`) takes units one after another, so what goes for a smaller size holds what goes for a larger one: one
order, and the columns K that stay for each size are its tails. With the weights W'_K that make up best for what goes
and F the Fisher information of the outputs (`sensitivity.py`)

    loss(size) = 1/2 sum_o F_o (w_o - w'_o) S (w_o - w'_o)^T                in nats

S being the second moments of the inputs, or their covariance where a bias takes the mean error. Kurtic et al.,
"ZipLM", 2023, section 3.2, sets the same errors against measured times, but relative to the layer's output, with a
weight for each layer that is searched afterwards; here F is that weight. To second order and layer by layer: exact for
small cuts, too small for those that leave next to nothing.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.techniques.prune.units import made_up_for, obs_order


def loss_curve(
    weight_OI: Tensor, second_II: Tensor, fisher_O: Tensor, unit: int, sizes: Sequence[int], *, damping: float = 0.01
) -> list[float]:
    """Return the predicted divergence, in nats, once so many units of the weight's inputs stay, for each size.

    Never less for fewer units. Raises TechniqueError for moments that are not finite.

    >>> loss_curve(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.ones(1), unit=1, sizes=[2, 1], damping=1e-9)
    [0.0, 0.5]
    """
    num_units = weight_OI.shape[1] // unit
    order = obs_order(weight_OI, second_II, unit, num_units - min(sizes), damping=damping)
    found: dict[int, float] = {}
    least = 0.0
    for size in sorted(set(sizes), reverse=True):
        stays_U = torch.ones(num_units, dtype=torch.bool)
        stays_U[order[: num_units - size]] = False
        if size < num_units:
            after_OI = made_up_for(weight_OI, second_II, stays_U.repeat_interleave(unit), damping=damping)
            change_OI = weight_OI.double() - after_OI.double()
            errors_O = ((change_OI @ second_II.double()) * change_OI).sum(1)
            # damping lets a later error fall below an earlier one by rounding
            least = max(least, 0.5 * float((fisher_O.double() * errors_O).sum()))
        found[size] = least
    return [found[size] for size in sizes]
