from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.errors import TechniqueError
from gossamer.models.quantized import ActivationSpec
from gossamer.techniques.quantize.ranges import (
    NUM_BINS,
    Range,
    chosen_range,
    collect_ranges,
    round_to_range,
)


def seen(values: torch.Tensor) -> Range:
    found = Range()
    found.widen(values)
    found.count(values)
    return found


def with_outlier() -> torch.Tensor:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[0] = 100.0
    return values


def test_minmax_is_the_extremes_with_zero() -> None:
    assert chosen_range(seen(torch.tensor([2.0, 5.0])), "minmax", 99.0, symmetric=False) == (0.0, 5.0)


def test_percentile_agrees_with_numpy_to_a_bin() -> None:
    values = with_outlier().clamp(-5, 5)
    low, high = chosen_range(seen(values), "percentile", 99.0, symmetric=False)
    bin_width = float(values.max() - values.min()) / NUM_BINS
    assert low == pytest.approx(float(np.percentile(values.numpy(), 0.5)), abs=2 * bin_width)
    assert high == pytest.approx(float(np.percentile(values.numpy(), 99.5)), abs=2 * bin_width)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_has_less_error_than_minmax_when_there_is_an_outlier(symmetric: bool) -> None:
    values = with_outlier().double()
    found = seen(values.float())
    errors = {}
    for observer in ("minmax", "mse"):
        low, high = chosen_range(found, observer, 99.9, symmetric=symmetric)  # type: ignore[arg-type]
        errors[observer] = float((values - round_to_range(values, low, high, symmetric=symmetric)).square().mean())
    assert errors["mse"] < errors["minmax"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_judged_grid_is_the_grid_that_is_applied(symmetric: bool) -> None:
    spec = ActivationSpec(kind="static", symmetric=symmetric, low=-1.3, high=2.7)
    values = torch.linspace(-3, 3, 1001)
    expected = round_to_range(values.double(), -1.3, 2.7, symmetric=symmetric)
    torch.testing.assert_close(spec.fake_quantize(values).double(), expected, rtol=1e-4, atol=1e-4)


def test_dynamic_uint8_agrees_with_torch() -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = (high - low) / 255
    theirs = torch.fake_quantize_per_tensor_affine(values, scale, round(-low / scale), 0, 255)
    torch.testing.assert_close(ActivationSpec(kind="dynamic").fake_quantize(values), theirs, rtol=1e-4, atol=1e-5)


def test_gradients_pass_as_in_torch_and_stop_beyond_a_static_range() -> None:
    spec = ActivationSpec(kind="static", low=-1.3, high=2.7)
    scale, zero = spec.static_grid()
    slope = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.linspace(-3, 3, 1001).requires_grad_() for _ in range(2))
    spec.fake_quantize(ours).backward(slope)
    torch.fake_quantize_per_tensor_affine(theirs, scale, zero, 0, 255).backward(slope)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert bool((ours.grad == 0).any())
    dynamic = torch.linspace(-3, 3, 11).requires_grad_()
    ActivationSpec(kind="dynamic").fake_quantize(dynamic).sum().backward()
    assert dynamic.grad is not None
    assert bool((dynamic.grad == 1).all())


def test_token_scope_gives_each_token_its_own_scale() -> None:
    values = torch.randn(2, 3, 8) * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    spec = ActivationSpec(kind="dynamic", scope="token", symmetric=True)
    rows = [spec.model_copy(update={"scope": "tensor"}).fake_quantize(row) for row in values.reshape(-1, 8)]
    torch.testing.assert_close(spec.fake_quantize(values).reshape(-1, 8), torch.stack(rows))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


class Passes:
    def __init__(self, module: nn.Module, rows: torch.Tensor) -> None:
        self.module, self.rows, self.count = module, rows, 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        for row in self.rows:
            self.count += 1
            self.module(row)
            yield


def test_collected_ranges_are_those_of_the_layer_inputs_and_hooks_are_gone() -> None:
    module, rows = network(), torch.randn(10, 3, 4)
    passes = Passes(module, rows)
    found = collect_ranges(module, ["0", "2"], passes, histogram=True)
    assert found["0"].low == float(rows.min())
    assert found["2"].low == 0.0  # behind a ReLU
    assert float(found["0"].counts.sum()) == rows.numel()
    assert passes.count == 20
    assert all(not layer._forward_pre_hooks for layer in module)


def test_a_layer_that_never_runs_is_named() -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    with pytest.raises(TechniqueError, match="1 layers never ran on the calibration rows: idle"):
        collect_ranges(module, ["used", "idle"], Passes(module["used"], torch.randn(2, 4)), histogram=False)


def test_infinite_inputs_are_refused() -> None:
    module = network()
    with pytest.raises(TechniqueError, match="the input of 0 is NaN or infinite"):
        collect_ranges(module, ["0"], Passes(module, torch.full((1, 4), float("inf"))), histogram=False)
