"""What cutting a dimension to each of several sizes is predicted to cost, all sizes from one solve.

`obs` (`units.py`) takes units one after another and lets the others make up for each, so that on the way to the
smallest size it passes the weights W' of all larger ones. With F the Fisher information of the outputs
(`sensitivity.py`)

    loss(size) = 1/2 sum_o F_o (w_o - w'_o) S (w_o - w'_o)^T                in nats

S being the second moments of the inputs, or their covariance where a bias takes the mean error. Kurtic et al.,
"ZipLM", 2023, section 3.2, sets the same errors against measured times, but relative to the layer's output, with a
weight for each layer that is searched afterwards; here F is that weight.

The diagonal takes the errors of tokens and of channels for independent, which those of a cut are not: on MiniLM fitted
to spam mails 5e-8 nats were predicted where 3e-3 were measured. Losses say where to cut; what a cut costs is measured.
Left out: units that go together are not judged anew after each, for speed.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gossamer.techniques.prune.units import obs_path

SHARE_AT_A_TIME = 0.03


def loss_curve(
    weight_OI: Tensor, second_II: Tensor, fisher_O: Tensor, unit: int, sizes: Sequence[int], *, damping: float = 0.01
) -> list[float]:
    """Return the predicted divergence, in nats, once so many units of the weight's inputs stay, for each size.

    Never less for fewer units. Raises TechniqueError for moments that are not finite.

    >>> loss_curve(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.ones(1), unit=1, sizes=[2, 1], damping=1e-9)
    [0.0, 0.5]
    """
    num_units = weight_OI.shape[1] // unit
    counts = sorted({num_units - size for size in sizes})
    path = obs_path(weight_OI, second_II, unit, counts, damping=damping, together=SHARE_AT_A_TIME)
    found: dict[int, float] = {}
    least = 0.0
    for count, (_, after_OI) in zip(counts, path, strict=True):
        change_OI = (weight_OI.double() - after_OI).float()
        errors_O = ((change_OI @ second_II.float()) * change_OI).sum(1)
        # damping lets a later error fall below an earlier one by rounding
        least = max(least, 0.5 * float((fisher_O.double() * errors_O.double()).sum()))
        found[num_units - count] = least
    return [found[size] for size in sizes]
