"""Give codes that are fixed the scales that fit them best: least squares under the second moments of the layer's input.

After GPTQ the codes no longer are those that their scales were chosen for: errors were moved between channels. For a
row w with steps v = code - zero point, cut into groups g, and scales s_g,

    error(s) = (w - sum_g s_g v_g) S (w - sum_g s_g v_g)^T,        S = second_II

is a quadratic in the scales, so the best ones solve a small linear system for each row:

    sum_h A_gh (s'_h - s_h) = b_g,        A_gh = v_g S_gh v_h^T,        b_g = v_g (S (w - sum_h s_h v_h)^T)_g

and the error falls by d (2 b - A d) for a move d = s' - s.

A row takes the new scales, rounded to what files hold (powers of two for MXFP4, which seldom move), only where all are
positive and its error falls. Zero points and codes stay. The step is known from the alternating solvers (Egiazarian et
al., "AQLM", 2024, section 3.3 for codebooks).

Shape suffixes: O rows, I inputs, G groups, R rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gossamer.models.levels import tensor_scale
from gossamer.models.quantized import Quantized
from gossamer.techniques.quantize.grid import LARGEST_SCALE, SMALLEST_SCALE, storable

RIDGE = 1e-6  # of the mean diagonal: a group without any step, or two that always move together, leave A singular
SYSTEM_ELEMENTS = 1 << 24  # of all rows' systems that are in memory together


def refit_scales(weight_OI: Tensor, second_II: Tensor, start: Quantized) -> Quantized:
    """Return the same codes with scales whose output error is not above that of `start`, row by row.

    >>> refit_scales(weight_OI, moments.second_II, gptq(weight_OI, moments.second_II, spec))  # doctest: +SKIP
    """
    num_groups = start.num_groups
    step = max(1, SYSTEM_ELEMENTS // max(num_groups**2, weight_OI.shape[1]))
    scale_OG = start.scale.clone()
    hold = partial(storable, spec=start.spec, unit=tensor_scale(float(start.scale.max())))
    for first in range(0, weight_OI.shape[0], step):
        here = slice(first, first + step)
        zero_RG = None if start.zero_point is None else start.zero_point[here]
        scale_RG = start.scale[here].float()
        steps_RI = start.spec.steps(start.codes[here])
        found_RG = _refit_rows(weight_OI[here].float(), second_II, steps_RI, scale_RG, zero_RG, hold)
        scale_OG[here] = found_RG.to(scale_OG.dtype)
    return replace(start, scale=scale_OG)


def _refit_rows(
    weight_RI: Tensor,
    second_II: Tensor,
    steps_RI: Tensor,
    scale_RG: Tensor,
    zero_RG: Tensor | None,
    hold: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the scales of a few rows; `hold` rounds scales to what files hold."""
    num_rows, num_groups = scale_RG.shape
    steps_RGg = steps_RI.reshape(num_rows, num_groups, -1)
    if zero_RG is not None:
        steps_RGg = steps_RGg - zero_RG.float().unsqueeze(-1)
    system_RGG = weight_RI.new_empty(num_rows, num_groups, num_groups)
    size = steps_RGg.shape[-1]
    for group in range(num_groups):  # with itself and those behind it: the system is symmetric
        seen_RI = steps_RGg[:, group] @ second_II[group * size : (group + 1) * size, group * size :]
        found_RG = (seen_RI.view(num_rows, -1, size) * steps_RGg[:, group:]).sum(-1)
        system_RGG[:, group, group:] = system_RGG[:, group:, group] = found_RG
    change_RI = weight_RI - (steps_RGg * scale_RG.unsqueeze(-1)).flatten(1)
    slope_RG = ((change_RI @ second_II).view_as(steps_RGg) * steps_RGg).sum(-1).double()
    system_RGG = system_RGG.double()
    damped_RGG = system_RGG.clone()
    diagonal_RG = damped_RGG.diagonal(dim1=1, dim2=2)
    diagonal_RG += RIDGE * diagonal_RG.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    move_RG, _ = torch.linalg.solve_ex(damped_RGG, slope_RG)
    silent_RG = (steps_RGg == 0).all(-1)  # its scale multiplies nothing: it stays
    found_RG = scale_RG.double() + torch.where(silent_RG, 0.0, move_RG)
    usable_R = (torch.isfinite(found_RG) & (found_RG > SMALLEST_SCALE) & (found_RG < LARGEST_SCALE)).all(1)
    stored_RG = hold(torch.where(usable_R[:, None], found_RG, scale_RG.double()))
    move_RG = stored_RG.double() - scale_RG.double()
    # what the error changes by: exact also where both errors are nearly the same
    gain_R = (move_RG * (2 * slope_RG - torch.einsum("rgh,rh->rg", system_RGG, move_RG))).sum(1)
    return torch.where((gain_R > 0)[:, None], stored_RG, scale_RG)
