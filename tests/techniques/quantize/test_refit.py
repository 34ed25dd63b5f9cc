"""Scales refitted to fixed codes: the least squares solution, never worse, and the codes untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.models.quantized import QuantSpec
from gossamer.techniques.quantize import refit
from gossamer.techniques.quantize.gptq import gptq, output_error
from gossamer.techniques.quantize.refit import refit_scales

GRIDS = [QuantSpec(bits=4, symmetric=False, group_size=8), QuantSpec(bits=3, group_size=16), QuantSpec(bits=2)]


def layer(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=draw) * torch.logspace(0, -1.5, 32)[:, None]
    x_tI = torch.randn(200, 32, generator=draw) @ mixing
    return torch.randn(6, 32, generator=draw), x_tI.t() @ x_tI / 200


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_scales_are_those_of_least_squares_on_outputs(spec: QuantSpec) -> None:
    weight_OI, second_II = layer(0)
    start = gptq(weight_OI, second_II, spec)
    found = refit_scales(weight_OI, second_II, start)
    root = np.linalg.cholesky(second_II.double().numpy()).T  # |root x| is the size of an output
    steps = start.codes.double().reshape(6, start.num_groups, -1)
    if start.zero_point is not None:
        steps = steps - start.zero_point.double().unsqueeze(-1)
    for row in range(6):
        columns = np.zeros((32, start.num_groups))
        for group in range(start.num_groups):
            size = start.group_size
            columns[group * size : (group + 1) * size, group] = steps[row, group].numpy()
        wanted, *_ = np.linalg.lstsq(root @ columns, root @ weight_OI[row].double().numpy(), rcond=None)
        assert np.allclose(found.scale[row].double().numpy(), wanted, rtol=2e-3) or torch.equal(
            found.scale[row], start.scale[row]
        )
    assert torch.equal(found.codes, start.codes)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_the_output_error_falls_and_never_rises_in_any_row(spec: QuantSpec) -> None:
    ratios = []
    for seed in range(5):
        weight_OI, second_II = layer(seed)
        start = gptq(weight_OI, second_II, spec)
        found = refit_scales(weight_OI, second_II, start)
        for row in range(6):
            here = slice(row, row + 1)
            old = output_error(weight_OI[here], start.dequantize()[here], second_II)
            new = output_error(weight_OI[here], found.dequantize()[here], second_II)
            assert new <= old * (1 + 1e-5)
            ratios.append(new / old)
    assert np.mean(ratios) < 0.99


def test_pieces_of_rows_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, second_II = layer(1)
    start = gptq(weight_OI, second_II, GRIDS[0])
    whole = refit_scales(weight_OI, second_II, start)
    monkeypatch.setattr(refit, "SYSTEM_ELEMENTS", 32)
    pieces = refit_scales(weight_OI, second_II, start)
    torch.testing.assert_close(pieces.scale, whole.scale, rtol=2e-3, atol=0)  # two float16 steps: sums in another order


def test_groups_without_steps_and_inputs_without_signal_are_harmless() -> None:
    weight_OI, second_II = layer(2)
    weight_OI[0, :8] = 0
    second_II[:, 8:16] = second_II[8:16] = 0
    found = refit_scales(weight_OI, second_II, gptq(weight_OI, second_II, GRIDS[0]))
    assert bool(torch.isfinite(found.scale).all())
    assert bool((found.scale > 0).all())
