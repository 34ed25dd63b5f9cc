"""What each size is predicted to cost, as a solve for each size finds it."""

from __future__ import annotations

import pytest
import torch

from gossamer.techniques.prune.curves import loss_curve
from gossamer.techniques.prune.units import made_up_for, obs_order


@pytest.mark.parametrize("unit", [1, 3])
def test_one_path_finds_what_a_solve_for_each_size_finds(unit: int) -> None:
    draw = torch.Generator().manual_seed(unit)
    inputs_NI = torch.randn(200, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    second_II = inputs_NI.t() @ inputs_NI / 200
    weight_OI, fisher_O = torch.randn(6, 24, generator=draw), torch.rand(6, generator=draw)
    count = 24 // unit
    sizes = [1, count // 2, count - 1, count]
    found = loss_curve(weight_OI, second_II, fisher_O, unit, sizes, damping=1e-6)
    for size, loss in zip(sizes, found, strict=True):
        stays_U = torch.ones(count, dtype=torch.bool)
        stays_U[obs_order(weight_OI, second_II, unit, count - size, damping=1e-6)] = False
        after_OI = made_up_for(weight_OI, second_II, stays_U.repeat_interleave(unit), damping=1e-6)
        outputs_NO = inputs_NI @ (weight_OI - after_OI).t()
        assert loss == pytest.approx(float((outputs_NO.square().mean(0) * fisher_O).sum() / 2), rel=1e-2, abs=1e-5)
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0
