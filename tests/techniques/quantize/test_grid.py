from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import TechniqueError
from gossamer.models.quantized import QuantSpec
from gossamer.techniques.quantize.grid import quantize_weight

BITS = (8, 7, 4, 3, 2)
SPECS = [
    QuantSpec(bits=bits, symmetric=symmetric, group_size=group)
    for bits in BITS
    for symmetric in (True, False)
    for group in (None, 8)
]


def weights(seed: int, rows: int = 6, inputs: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy_tails = torch.randn(rows, inputs, generator=generator) ** 3
    return heavy_tails + 0.1 * torch.randn(rows, inputs, generator=generator)


def slow_minmax(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Round one group after another, one weight after another: the definition, written out."""
    decoded = torch.empty_like(weight)
    size = spec.group_size or weight.shape[1]
    low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size].tolist()
            top, bottom = max(0.0, *group), min(0.0, *group)
            scale = max(top / high, bottom / low) if spec.symmetric else (top - bottom) / (high - low)
            zero = 0 if spec.symmetric else min(high, max(low, round(low - bottom / scale)))
            scale = float(torch.tensor(scale).half())  # as it is stored
            for offset, value in enumerate(group):
                code = min(high, max(low, round(value / scale) + zero))
                decoded[row, start + offset] = (code - zero) * scale
    return decoded


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_minmax_is_the_definition_written_out(spec: QuantSpec) -> None:
    weight = weights(1)
    quantized = quantize_weight(weight, spec)
    torch.testing.assert_close(quantized.dequantize(), slow_minmax(weight, spec), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.symmetric and s.group_size is None and s.bits == 8], ids=str)
def test_asymmetric_8_bit_agrees_with_torch(spec: QuantSpec) -> None:
    weight = weights(2)
    ours = quantize_weight(weight, QuantSpec(bits=8, symmetric=False))
    assert ours.zero_point is not None
    theirs = torch.quantize_per_channel(weight, ours.scale[:, 0].float(), ours.zero_point[:, 0].long(), 0, torch.qint8)
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize())
    assert torch.equal(ours.codes, theirs.int_repr())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_search_never_raises_the_error_and_codes_are_nearest(spec: QuantSpec) -> None:
    weight = weights(3)
    plain, searched = quantize_weight(weight, spec), quantize_weight(weight, spec, scale="mse")
    groups = (weight.shape[0], searched.num_groups, -1)

    def errors(values: torch.Tensor) -> torch.Tensor:
        return (weight - values).reshape(groups).square().sum(-1)

    assert bool((errors(searched.dequantize()) <= errors(plain.dequantize()) * (1 + 1e-5)).all())
    for step in (-1, 1):  # a neighbouring code is never better
        codes = (searched.codes.int() + step).clamp(spec.low, spec.high)
        zero = 0 if searched.zero_point is None else searched.zero_point.int().unsqueeze(-1)
        moved = ((codes.reshape(groups) - zero) * searched.scale.float().unsqueeze(-1)).reshape(weight.shape)
        assert bool(((weight - moved).abs() >= (weight - searched.dequantize()).abs() - 1e-5).all())


def test_search_pays_below_8_bits() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    spec = QuantSpec(bits=4)
    error = {
        scale: float((weight - quantize_weight(weight, spec, scale=scale).dequantize()).square().mean())  # type: ignore[arg-type]
        for scale in ("minmax", "mse")
    }
    assert error["mse"] < 0.9 * error["minmax"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    st.sampled_from(BITS),
    st.booleans(),
    st.sampled_from(["minmax", "mse"]),
)
def test_zero_stays_zero_and_codes_stay_in_range(row: list[float], bits: int, symmetric: bool, scale: str) -> None:
    weight = torch.tensor([[0.0, *row[1:]]])
    quantized = quantize_weight(weight, QuantSpec(bits=bits, symmetric=symmetric), scale=scale)  # type: ignore[arg-type]
    decoded = quantized.dequantize()
    assert decoded[0, 0] == 0
    assert bool(torch.isfinite(decoded).all())
    assert int(quantized.codes.min()) >= quantized.spec.low
    assert int(quantized.codes.max()) <= quantized.spec.high


def test_a_grid_rounds_its_own_values_to_themselves() -> None:
    spec = QuantSpec(bits=4, symmetric=False, group_size=8)
    once = quantize_weight(weights(5), spec)
    again = quantize_weight(once.dequantize(), spec)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-4, atol=1e-5)


def test_rows_of_convolutions_and_transposed_weights_come_back_in_their_shape() -> None:
    convolution = torch.randn(4, 3, 3, 3)
    assert quantize_weight(convolution, QuantSpec(bits=8)).dequantize().shape == convolution.shape
    stored = torch.randn(16, 4)  # [I, O], as GPT-2 stores it
    turned = quantize_weight(stored, QuantSpec(bits=8), transposed=True)
    straight = quantize_weight(stored.t().contiguous(), QuantSpec(bits=8))
    assert torch.equal(turned.dequantize(), straight.dequantize().t())
    assert turned.scale.shape == (4, 1)


def test_pieces_of_rows_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = weights(6, rows=10), QuantSpec(bits=4, group_size=8)
    whole = quantize_weight(weight, spec, scale="mse")
    monkeypatch.setattr("gossamer.techniques.quantize.grid.CHUNK_ELEMENTS", 3 * weight.shape[1])
    assert torch.equal(quantize_weight(weight, spec, scale="mse").codes, whole.codes)


def test_group_size_that_does_not_divide_names_both_numbers_and_the_layer() -> None:
    with pytest.raises(TechniqueError) as found:
        quantize_weight(torch.randn(2, 576), QuantSpec(bits=4, group_size=128), name="model.layers.3.q_proj.weight")
    assert "group_size 128 does not divide in_features 576 of model.layers.3.q_proj.weight" in found.value.message
    assert "64" in found.value.hint


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TechniqueError, match="1 of 4 weights of w are NaN or infinite"):
        quantize_weight(torch.tensor([[1.0, float("nan")], [0.0, 2.0]]), QuantSpec(bits=8), name="w")
