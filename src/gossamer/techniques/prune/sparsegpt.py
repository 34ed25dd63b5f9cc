"""SparseGPT: take weights out one input channel after another; the channels behind make up for each.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, section 3. With
S the second moments of the layer's input and U the upper Cholesky factor of its damped inverse (as in GPTQ), setting
w_j to zero costs at least w_j^2 / U_jj^2, and the free channels' best answer is w_k -= (w_j / U_jj) U_jk. Which
weights go is decided for `block` channels at a time (section 3.2, "adaptive mask selection"), on weights that already
carry the updates of all channels before; for a pattern n:m, at the first of every m channels.

Within a block the weights of all rows compete, so rows may differ in sparsity; the count of a block is exact.
Channels that no token excites are zero from the start (as in the authors' code) and repair nothing. Left out: the
order of channels by excitation, which the paper does not use, and rounding in the same pass: `gptq` behind it leaves
zeros where they are, with the same updates.

Invariants: exact counts (more zeros only where more channels than that are never excited); with S a multiple of the
identity the mask is that of magnitude within each block and the weights that stay are unchanged.

Shape suffixes: O rows, I inputs, b inputs of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.techniques.prune.masks import Pattern, check_pattern, kept
from gossamer.techniques.quantize.inverse_factor import inverse_factor


def sparsegpt(
    weight_OI: Tensor,
    second_II: Tensor,
    sparsity: float,
    *,
    pattern: Pattern | None = None,
    block: int = 128,
    damping: float = 0.01,
    name: str = "weight",
) -> Tensor:
    """Return the weights, float32 [O, I], of which a share `sparsity` (or m - n of every m) is exactly zero.

    Raises TechniqueError for moments that are not finite, or a pattern that does not divide the inputs.

    >>> sparsegpt(torch.tensor([[1.0, 3.0, -2.0, 0.5]]), torch.eye(4), 0.5).tolist()
    [[0.0, 3.0, -2.0, 0.0]]
    """
    num_inputs = weight_OI.shape[1]
    if pattern is not None:
        check_pattern(pattern, num_inputs, name)
        block = max(1, block // pattern[1]) * pattern[1]
    factor_II = inverse_factor(second_II, damping, name)
    rows_OI = weight_OI.float() * (second_II.diagonal() != 0)
    done = 0  # weights that were taken out so far: blocks of a length that `sparsity` does not divide even out
    for start in range(0, num_inputs, block):
        stop = min(start + block, num_inputs)
        here_Ob, factor_bb = rows_OI[:, start:stop], factor_II[start:stop, start:stop]
        step_b = factor_bb.diagonal()
        keep_Ob = torch.ones(here_Ob.shape, dtype=torch.bool, device=here_Ob.device)
        if pattern is None:
            wanted = math.floor(sparsity * stop * len(rows_OI) + 1e-9) - done
            keep_Ob = _all_but_smallest((here_Ob / step_b).square(), wanted)
            done += wanted
        errors_Ob = torch.empty_like(here_Ob)
        for j in range(stop - start):
            if pattern is not None and j % pattern[1] == 0:
                ahead = slice(j, j + pattern[1])
                keep_Ob[:, ahead] = kept((here_Ob[:, ahead] / step_b[ahead]).square(), 0.0, pattern)
            weight_O = here_Ob[:, j].clone()
            here_Ob[:, j] = torch.where(keep_Ob[:, j], weight_O, 0.0)
            error_O = (weight_O - here_Ob[:, j]) / step_b[j]
            here_Ob[:, j + 1 :].addr_(error_O, factor_bb[j, j + 1 :], alpha=-1.0)
            errors_Ob[:, j] = error_O
        rows_OI[:, stop:].addmm_(errors_Ob, factor_II[start:stop, stop:], alpha=-1.0)
    return rows_OI


def _all_but_smallest(costs_Ob: Tensor, count: int) -> Tensor:
    """Return a mask that is False for exactly `count` of the smallest costs of all rows."""
    mask = torch.ones(costs_Ob.numel(), dtype=torch.bool, device=costs_Ob.device)
    mask[torch.argsort(costs_Ob.flatten(), stable=True)[:count]] = False
    return mask.view(costs_Ob.shape)
