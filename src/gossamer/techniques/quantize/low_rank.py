"""Low-rank error compensation: two thin matrices beside a rounded weight that take most of its error off the output.

Liu et al., "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation", 2024, section
3.2. Of a weight W and its replacement W', with E = W - W' and the second moments S of the layer's input, the matrices
that minimise the error of the output,

    error(U, D) = tr (E - U D) S (E - U D)^T,        U [O, R],  D [R, I],

follow from a singular value decomposition in the space where all directions of the input count alike. With S = L L^T:

    E L = A diag(s) B^T        U = A_R diag(sqrt s_R)        D = diag(sqrt s_R) B_R^T L^-1

which is optimal (Eckart and Young), and leaves the sum of s_j^2 over j > R. EoRA takes S^1/2 from an eigenvalue
decomposition; any square root gives the same U D, and the Cholesky factor costs least.

What it is for: the start of an adapter that is trained afterwards. No recipe has it as a step of its own; beside a
rounded weight it costs 16 R (O + I) bits in bfloat16, and `benchmarks/grids.py --gptq` sets it beside one bit more.

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import TechniqueError


def low_rank(error_OI: Tensor, second_II: Tensor, rank: int, *, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return (U [O, R], D [R, I]), float32, whose product is nearest to `error_OI` in the layer's outputs.

    `damping` is the share of the mean second moment that is added to the diagonal. Raises TechniqueError for a rank
    below 1 or above the smaller side, and for moments that are not finite.

    >>> up_OR, down_RI = low_rank(weight_OI - codes.dequantize(), moments.second_II, rank=16)  # doctest: +SKIP
    """
    if not 1 <= rank <= min(error_OI.shape):
        raise TechniqueError(
            f"rank {rank} of a correction for a weight of {error_OI.shape[0]} x {error_OI.shape[1]}",
            f"give one from 1 to {min(error_OI.shape)}",
        )
    if not bool(torch.isfinite(second_II).all()):
        raise TechniqueError("the second moments are NaN or infinite", "look at the calibration rows")
    root_II = _root(second_II.double(), damping)
    left_OK, size_K, right_KI = torch.linalg.svd(error_OI.double() @ root_II, full_matrices=False)
    share_R = size_K[:rank].sqrt()
    down_RI = torch.linalg.solve_triangular(root_II, share_R[:, None] * right_KI[:rank], upper=False, left=False)
    return (left_OK[:, :rank] * share_R).float(), down_RI.float()


def _root(second_II: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of damped moments; float64, since the error is divided by it."""
    extra = damping * (float(second_II.diagonal().mean()) or 1.0)
    one_II = torch.eye(len(second_II), dtype=torch.float64, device=second_II.device)
    for _ in range(8):
        found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(second_II + extra * one_II)
        if not int(found[1]):
            return found[0]
        extra *= 10
    raise TechniqueError("the second moments are not positive definite", "give more calibration rows")
