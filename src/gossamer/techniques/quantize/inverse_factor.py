"""The factor that GPTQ and SparseGPT work with: the upper Cholesky factor of the inverse of damped second moments.

    S^-1 = U^T U,        S = second_II + damping * mean(diag second_II) * I

Frantar et al., "GPTQ", 2022, section 3.3. U is the only upper triangle with that product and a positive diagonal, and
there are two ways to it. Large ones in main memory LAPACK factors, inverts and factors again in place, in one copy of
the moments:

    S = L L^T  (dpotrf)          S^-1 from L  (dpotri)          S^-1 = U^T U  (dpotrf)

Small ones, and those on a GPU, where torch has no such routine that works in place, go without the inverse. With all
channels in reverse order, R = (S reversed) = M M^T, M lower, the inverse of M is a lower triangle too, and reversed
again it is U:

    S^-1 = (M^-1 reversed)^T (M^-1 reversed)

One factorisation and one triangular solve, in two copies. (scipy's LAPACK has threads of its own, which go on spinning
for a while: the many short steps that follow took twice the time beside them.) Both in float64, so both give U to
rounding (1e-12 of its largest value where the damping is usual); codes that lie on a border may differ in the last
digit of a sum.

Shape suffixes: I inputs.
"""

from __future__ import annotations

from functools import partial

import torch
from scipy.linalg import lapack
from torch import Tensor

from gossamer.errors import TechniqueError

ROWS_AT_A_TIME = 1024
SMALL = 2048  # channels, whose second copy takes 32 MiB


class Degenerate(TechniqueError):
    """The second moments of a layer's inputs have no factor: more damping may give them one."""


def inverse_factor(second_II: Tensor, damping: float, name: str = "weight", channels_I: Tensor | None = None) -> Tensor:
    """Return the upper Cholesky factor U of the inverse of the damped moments, S^-1 = U^T U, float32 [I, I].

    `channels_I` is the order in which the channels are taken (as they stand when None). Memory: one copy of the moments
    in float64, in which LAPACK factors, inverts and factors again, and in which the result lies; two of SMALL ones, and
    on a GPU. Raises TechniqueError for moments that are not finite, Degenerate for those that are not positive definite
    with this damping.
    """
    if not bool(torch.isfinite(second_II.sum())) and not bool(torch.isfinite(second_II).all()):
        raise TechniqueError(f"the inputs of {name} are NaN or infinite on calibration rows", "look at these rows")
    num_inputs, device = len(second_II), second_II.device
    order_I = torch.arange(num_inputs, device=device) if channels_I is None else channels_I
    factored = by_lapack if device.type == "cpu" and num_inputs > SMALL else by_torch
    diagonal_I = second_II.diagonal().double()[order_I]
    mean = float(diagonal_I.mean()) or 1.0
    dead_I = (diagonal_I == 0).double() * mean
    # float64: two factorisations of a nearly singular matrix must agree between machines and block sizes
    work_II = torch.empty(num_inputs, num_inputs, dtype=torch.float64, device=device)
    for start in range(0, num_inputs, ROWS_AT_A_TIME):
        rows_I = order_I[start : start + ROWS_AT_A_TIME]
        work_II[start : start + ROWS_AT_A_TIME] = second_II[rows_I][:, order_I]
    work_II.diagonal().add_(dead_I).add_(damping * mean)
    if (found_II := factored(work_II)) is not None:
        return found_II
    raise Degenerate(
        f"the second moments of the inputs of {name} are not positive definite with {damping:g} damping",
        "give more calibration rows, or raise `damping`",
    )


def by_lapack(matrix_II: Tensor) -> Tensor | None:
    """Return the upper factor of a float64 matrix's inverse, float32, in the matrix's memory; None where there is none.

    LAPACK counts columns first: its lower triangle is our upper one, and the lower factor L of S^-1 = L L^T is U^T.
    """
    columns_first = matrix_II.numpy().T
    factor = partial(lapack.dpotrf, lower=1, clean=0, overwrite_a=1)
    invert = partial(lapack.dpotri, lower=1, overwrite_c=1)
    for routine in (factor, invert, factor):
        result, failed = routine(columns_first)
        if failed:
            return None
        assert result.ctypes.data == columns_first.ctypes.data, "LAPACK made a copy"
    return _halved(matrix_II.triu_())


def _halved(matrix_II: Tensor) -> Tensor:
    """Return a float64 matrix as float32 in the memory that it has: a row ends before the next one begins."""
    num_rows = len(matrix_II)
    narrow_II = matrix_II.view(torch.float32).view(-1)[: num_rows**2].view(num_rows, num_rows)
    for start in range(0, num_rows, ROWS_AT_A_TIME):
        narrow_II[start : start + ROWS_AT_A_TIME] = matrix_II[start : start + ROWS_AT_A_TIME].float()
    return narrow_II


def by_torch(matrix_II: Tensor) -> Tensor | None:
    """Return the same factor, float32, wherever the matrix lies, whose values are lost; None where there is none."""
    matrix_II.copy_(matrix_II.flip((0, 1)))
    lower_II, failed = torch.linalg.cholesky_ex(matrix_II)
    if int(failed):
        return None
    matrix_II.zero_().diagonal().fill_(1.0)
    torch.linalg.solve_triangular(lower_II, matrix_II, upper=False, out=matrix_II)
    return matrix_II.float().flip((0, 1))
