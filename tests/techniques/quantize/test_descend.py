"""Coordinate descent on codes: each step is the best single code, no row's error rises, and masks stay."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.techniques.quantize.descend import descend, descend_values
from gossamer.techniques.quantize.gptq import gptq, output_error
from gossamer.techniques.quantize.grid import quantize_weight

refit_tests = runpy.run_path(str(Path(__file__).parent / "test_refit.py"))
layer, GRIDS = refit_tests["layer"], refit_tests["GRIDS"]


def slow_descend(weight_OI: Tensor, second_II: Tensor, start: Quantized, passes: int) -> Tensor:
    """Return the codes found by trying every code of one weight after another, the whole error computed each time."""
    moments = second_II.double() + 0.01 * second_II.diagonal().mean() * torch.eye(len(second_II))
    grid = torch.arange(start.spec.low, start.spec.high + 1).double()
    codes = start.codes.double().clone()
    zero = torch.zeros_like(start.scale) if start.zero_point is None else start.zero_point
    for _ in range(passes):
        for channel in range(weight_OI.shape[1]):
            for row in range(len(weight_OI)):
                scale = start.scale[row].double().repeat_interleave(start.group_size)
                offset = zero[row].double().repeat_interleave(start.group_size)
                trials = codes[row].expand(len(grid), -1).clone()
                trials[:, channel] = grid
                change = weight_OI[row].double() - (trials - offset) * scale
                codes[row, channel] = grid[((change @ moments) * change).sum(1).argmin()]
    return codes.to(torch.int8)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize("block", [5, 128])
def test_every_step_takes_the_best_code(spec: QuantSpec, block: int) -> None:
    weight_OI, second_II = layer(0)
    start = quantize_weight(weight_OI, spec)
    found = descend(weight_OI, second_II, start, passes=2, block=block)
    assert torch.equal(found.codes, slow_descend(weight_OI, second_II, start, 2))
    assert not torch.equal(found.codes, start.codes)
    assert torch.equal(found.scale, start.scale)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_gptq_s_codes_get_better_and_no_row_gets_worse(spec: QuantSpec) -> None:
    ratios = []
    for seed in range(5):
        weight_OI, second_II = layer(seed)
        start = gptq(weight_OI, second_II, spec)
        found = descend(weight_OI, second_II, start, passes=3, damping=1e-6)
        for row in range(len(weight_OI)):
            here = slice(row, row + 1)
            old = output_error(weight_OI[here], start.dequantize()[here], second_II)
            new = output_error(weight_OI[here], found.dequantize()[here], second_II)
            assert new <= old * (1 + 1e-4)
            ratios.append(new / old)
    assert np.mean(ratios) < 0.97


def test_masked_weights_and_silent_channels_keep_their_codes() -> None:
    weight_OI, second_II = layer(1)
    second_II[5] = 0
    second_II[:, 5] = 0
    start = quantize_weight(weight_OI, QuantSpec(bits=3, symmetric=False, group_size=8))
    keep_OI = torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = descend(weight_OI, second_II, start, passes=2, keep_OI=keep_OI)
    assert torch.equal(found.codes[~keep_OI], start.codes[~keep_OI])
    assert torch.equal(found.codes[:, 5], start.codes[:, 5])
    assert not torch.equal(found.codes, start.codes)


def test_values_under_a_mask_go_to_the_least_squares_solution() -> None:
    weight_OI, second_II = layer(2)
    keep_OI = torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    start_OI = weight_OI * keep_OI
    found = descend_values(weight_OI, second_II, start_OI, passes=600, damping=0.01)
    damped = second_II.double() + 0.01 * second_II.diagonal().mean() * torch.eye(32)
    for row in range(len(weight_OI)):
        free = keep_OI[row].nonzero().flatten()
        wanted = torch.zeros(32, dtype=torch.float64)
        wanted[free] = torch.linalg.solve(damped[free][:, free], damped[free] @ weight_OI[row].double())
        torch.testing.assert_close(found[row].double(), wanted, rtol=2e-2, atol=2e-2)
    once = descend_values(weight_OI, second_II, start_OI, passes=1)
    errors = [output_error(weight_OI, values, damped.float()) for values in (start_OI, once, found)]
    assert errors[2] < 0.9 * errors[1] < 0.81 * errors[0]
