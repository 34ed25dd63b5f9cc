"""Which units of a dimension go, seen from the weight that reads them, and how what stays makes up for them.

A unit u (a channel of a feed-forward network, a head) is a few columns of the weight that reads it, W_u [O, b], with
inputs x_u. Taking it out changes the layer's output by W_u x_u. With S the second moments of all inputs:

    magnitude    |W_u|                               Li et al., "Pruning Filters for Efficient ConvNets", 2016
    activation   mean of E |x_j| over its inputs     Muralidharan et al., "Minitron", 2024, section 2.2
    fisher       1/2 sum_o F_o W_ou S_uu W_ou^T      what the predictions move by, F as in `sensitivity.py`
    obs          tr W_u [(S^-1)_uu]^-1 W_u^T         Kurtic et al., "ZipLM", 2023, section 3.1, equation 2

The first three take units as if each went alone. `obs` takes one after another: after each, all other columns make up
for it (W -= W_u [(S^-1)_uu]^-1 (S^-1)_u:), S^-1 loses it, and what is left is judged anew, so that of two units that do
the same work only one goes.

A dimension that several weights read (a residual stream of convolutions) loses the units whose losses, as shares of
what each layer puts out, are least together.

Whichever go, the weights that stay can make up for them at once: the best ones for the columns K that stay are

    W'_K = W S_:K (S_KK)^-1

the least squares fit to the outputs of the whole layer. For `obs` these are the weights that its steps end at.

Shape suffixes: O outputs, I inputs, U units, b inputs of one unit, G inputs of those that go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gossamer.errors import TechniqueError

HELD = 0.8  # of the columns are no zeros: of fewer the zeros are taken out
SHARE_AT_A_TIME = 0.01  # of the units that are left may go together between two judgements of `obs`, one at least


def magnitude_scores(weight_OI: Tensor, unit: int) -> Tensor:
    """Return the length of each unit's columns, [U].

    >>> magnitude_scores(torch.tensor([[3.0, 4.0, 0.0, 1.0]]), unit=2).tolist()
    [5.0, 1.0]
    """
    return weight_OI.float().square().sum(0).view(-1, unit).sum(1).sqrt()


def activation_scores(mean_abs_I: Tensor, unit: int) -> Tensor:
    """Return the mean magnitude of each unit's inputs, [U]."""
    return mean_abs_I.float().view(-1, unit).mean(1)


def fisher_scores(weight_OI: Tensor, second_II: Tensor, fisher_O: Tensor, unit: int) -> Tensor:
    """Return what each unit's going alone is predicted to move the predictions by, in nats, [U]."""
    weighted_OI = weight_OI.double() * fisher_O.double()[:, None].sqrt()
    blocks_Ubb = _diagonal_blocks(second_II.double(), unit)
    columns_UOb = weighted_OI.view(len(weight_OI), -1, unit).transpose(0, 1)
    return 0.5 * ((columns_UOb @ blocks_Ubb) * columns_UOb).sum((1, 2))


def obs_order(weight_OI: Tensor, second_II: Tensor, unit: int, count: int, *, damping: float = 0.01) -> list[int]:
    """Return `count` units in the order in which they go, least loss first, the rest making up for each.

    Raises TechniqueError for moments that are not finite or singular whatever the damping.

    >>> obs_order(torch.tensor([[1.0, 2.0, 0.1]]), torch.eye(3), unit=1, count=2)
    [2, 0]
    """
    ((gone, _),) = obs_path(weight_OI, second_II, unit, [count], damping=damping)
    return gone


def obs_path(
    weight_OI: Tensor,
    second_II: Tensor,
    unit: int,
    counts: Sequence[int],
    *,
    damping: float = 0.01,
    together: float = SHARE_AT_A_TIME,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield, each time as many units are gone as one of the ascending `counts` says, which, and the weight, float64.

    `together` is the share of those left that may go between two judgements. Raises TechniqueError as `obs_order` does.
    """
    columns_Ub = torch.arange(weight_OI.shape[1], device=weight_OI.device).view(-1, unit)
    for gone, (left,) in _joint_path([(weight_OI, second_II, columns_Ub)], counts, damping, together):
        yield gone, left.weight_OI


def joint_obs_order(readers: Sequence[tuple[Tensor, Tensor, Tensor]], count: int, damping: float = 0.01) -> list[int]:
    """Return `count` units that several weights read in the order in which they go.

    `readers` are weights [O, I], the second moments of their inputs [I, I], and the columns of each unit [U, b]. A loss
    is a share of what a layer puts out, so that layers of large outputs do not outvote the others; they are added up.
    """
    ((gone, _),) = _joint_path(readers, [count], damping, SHARE_AT_A_TIME)
    return gone


def _joint_path(
    readers: Sequence[tuple[Tensor, Tensor, Tensor]], counts: Sequence[int], damping: float, together: float
) -> Iterator[tuple[list[int], list[_Left]]]:
    left = [_Left(weight_OI, second_II, columns_Ub, damping) for weight_OI, second_II, columns_Ub in readers]
    num_units = len(readers[0][2])
    stays_U = torch.ones(num_units, dtype=torch.bool, device=readers[0][0].device)
    gone: list[int] = []
    for count in counts:
        while len(gone) < count:
            losses_U = torch.stack([one.losses(stays_U) for one in left]).sum(0)
            if not bool(torch.isfinite(losses_U).all()):
                raise TechniqueError("the importance of units is NaN or infinite", "try another `by`")
            losses_U[~stays_U] = torch.inf
            size = min(count - len(gone), max(1, int(together * (num_units - len(gone)))))
            chosen = torch.argsort(losses_U, stable=True)[:size]
            gone += chosen.tolist()
            stays_U[chosen] = False
            for one in left:
                one.take(chosen)
        yield gone, left


class _Left:
    """Hold what is left of a weight and of the inverse of its inputs' moments while units go.

    Columns that went are zero, and from time to time taken out (K are those that are held).
    """

    def __init__(self, weight_OI: Tensor, second_II: Tensor, columns_Ub: Tensor, damping: float) -> None:
        self.columns_Ub = columns_Ub
        self.weight_OK = weight_OI.double().clone()
        self.inverse_KK = torch.cholesky_inverse(_factor(second_II.double(), damping))
        self.held_K = torch.arange(weight_OI.shape[1], device=weight_OI.device)  # as columns of the whole weight
        self.place_I = self.held_K.clone()  # of a column that is held among those
        self.stays_K = torch.ones_like(self.held_K, dtype=torch.bool)
        size = float(((self.weight_OK @ second_II.double()) * self.weight_OK).sum())
        self.size = size or 1.0

    @property
    def weight_OI(self) -> Tensor:
        """Return the whole weight, zero where columns went."""
        whole_OI = self.weight_OK.new_zeros(len(self.weight_OK), len(self.place_I))
        whole_OI[:, self.held_K] = self.weight_OK
        return whole_OI

    def losses(self, stays_U: Tensor) -> Tensor:
        """Return what each unit's going alone adds to the error, as a share of the outputs, [U]; 0 for those gone."""
        at = self.place_I[self.columns_Ub[stays_U]]
        losses_U = torch.zeros(len(stays_U), dtype=torch.float64, device=at.device)
        if at.shape[1] == 1:
            lengths_K = self.weight_OK.square().sum(0)
            losses_U[stays_U] = (lengths_K / self.inverse_KK.diagonal())[at[:, 0]]
        else:
            pivots_Ubb = self.inverse_KK[at[:, :, None], at[:, None, :]]
            columns_UbO = self.weight_OK.t()[at]
            losses_U[stays_U] = (torch.linalg.solve(pivots_Ubb, columns_UbO) * columns_UbO).sum((1, 2))
        return losses_U / self.size

    def take(self, chosen: Tensor) -> None:
        """Take units out, the other columns making up for them."""
        at = self.place_I[self.columns_Ub[chosen].flatten()]
        rows_GK = self.inverse_KK[at]
        solved_GK = torch.linalg.solve(rows_GK[:, at], rows_GK)
        self.weight_OK.addmm_(self.weight_OK[:, at], solved_GK, alpha=-1)
        self.inverse_KK.addmm_(rows_GK.t(), solved_GK, alpha=-1)
        self.weight_OK[:, at] = 0.0
        self.inverse_KK[at] = 0.0
        self.inverse_KK[:, at] = 0.0
        self.stays_K[at] = False
        stay_K = self.stays_K.nonzero().flatten()
        if len(stay_K) < HELD * len(self.stays_K):
            self.weight_OK = self.weight_OK[:, stay_K]
            self.inverse_KK = self.inverse_KK[stay_K][:, stay_K]
            self.held_K, self.stays_K = self.held_K[stay_K], self.stays_K[stay_K]
            self.place_I[self.held_K] = torch.arange(len(stay_K), device=stay_K.device)


def made_up_for(weight_OI: Tensor, second_II: Tensor, stays_I: Tensor, *, damping: float = 0.01) -> Tensor:
    """Return the weight whose outputs are nearest to the whole layer's with only the inputs that stay, float32 [O, I].

    `stays_I` is bool; the other columns of the result are zero.

    >>> made_up_for(torch.ones(1, 2), torch.ones(2, 2), torch.tensor([True, False]), damping=1e-9).round().tolist()
    [[2.0, 0.0]]
    """
    second_II = second_II.double()
    damped_II = second_II + _extra(second_II, damping) * _one(second_II)
    wanted_OK = weight_OI.double() @ damped_II[:, stays_I]  # damped too: where all stay, nothing moves
    factor_KK = _factor(second_II[stays_I][:, stays_I], damping, _extra(second_II, damping))
    found_OI = torch.zeros(weight_OI.shape, dtype=torch.float64, device=weight_OI.device)
    found_OI[:, stays_I] = torch.cholesky_solve(wanted_OK.t(), factor_KK).t()
    return found_OI.float()


def _diagonal_blocks(matrix_II: Tensor, unit: int) -> Tensor:
    """Return the square blocks on the diagonal, [U, b, b]."""
    if unit == 1:
        return matrix_II.diagonal().clone().view(-1, 1, 1)
    blocks = matrix_II.view(len(matrix_II) // unit, unit, -1, unit)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def _one(matrix_II: Tensor) -> Tensor:
    return torch.eye(len(matrix_II), dtype=torch.float64, device=matrix_II.device)


def _extra(second_II: Tensor, damping: float) -> float:
    return damping * (float(second_II.diagonal().mean()) or 1.0)


def _factor(second_II: Tensor, damping: float, extra: float | None = None) -> Tensor:
    """Return the lower Cholesky factor of damped moments; ten times the damping where it does not exist."""
    if not bool(torch.isfinite(second_II).all()):
        raise TechniqueError("the inputs of a layer are NaN or infinite on calibration rows", "look at these rows")
    added = _extra(second_II, damping) if extra is None else extra
    for _ in range(6):
        found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(second_II + added * _one(second_II))
        if not int(found[1]):
            return found[0]
        added *= 10
    raise TechniqueError("second moments of a layer's inputs are not positive definite", "give more calibration rows")
