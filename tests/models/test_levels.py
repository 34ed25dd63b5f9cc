"""The levels of each format beside torch's casts, compressed-tensors' tables and the quantiles that QLoRA took."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import kE2M1ToFloat
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import norm
from torch import Tensor

from gossamer.models.levels import E2M1, E4M3, FORMATS, NF4, Codebook, e4m3_scale, power_of_two, tensor_scale
from gossamer.models.quantized import Quantized, QuantSpec

BOOKS = {"E4M3": E4M3, "E2M1": E2M1, "NF4": NF4}


def positions(book: Codebook, seed: int = 0) -> Tensor:
    """Return random positions beyond both ends, every level, and every tie between two levels."""
    draw = torch.Generator().manual_seed(seed)
    ends = float(book.levels_K.abs().max())
    ties = (book.levels_K[1:] + book.levels_K[:-1]) / 2
    small = torch.randn(500, generator=draw) * ends / 100
    return torch.cat([torch.randn(2000, generator=draw) * ends / 2, small, book.levels_K, ties])


def test_e4m3_has_all_finite_values_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(E4M3.levels_K, every[torch.isfinite(every)].unique())


def test_e4m3_rounds_as_torch_casts() -> None:
    x = positions(E4M3)
    cast = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(E4M3.values(E4M3.nearest(x)), cast.float())
    magnitude = cast.view(torch.uint8) & 0x7F  # a code is the bit pattern with its sign
    signed = torch.where(cast.view(torch.uint8) > 127, -magnitude.int(), magnitude.int())
    assert torch.equal(E4M3.nearest(x).int(), signed)


def test_e2m1_rounds_as_compressed_tensors() -> None:
    assert torch.equal(E2M1.levels_K, torch.cat([-kE2M1ToFloat.flip(0)[:-1], kE2M1ToFloat]))
    x = positions(E2M1)
    assert torch.equal(E2M1.values(E2M1.nearest(x)), cast_to_fp4(x.clone()))


def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    # QLoRA, equation 4, as the authors released it: 8 quantiles above zero, 7 below, the outermost at 0.9677083
    offset = 0.9677083
    above = norm.ppf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    below = -norm.ppf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    levels = torch.tensor(sorted([*above, 0.0, *below]))
    torch.testing.assert_close(NF4.levels_K, (levels / levels.max()).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BOOKS)
def test_codes_are_those_of_the_nearest_level(name: str) -> None:
    book = BOOKS[name]
    x = positions(book, seed=1)
    distance = (x[:, None].double() - book.levels_K.double()).abs()
    found = (x.double() - book.values(book.nearest(x)).double()).abs()
    torch.testing.assert_close(found, distance.min(1).values, rtol=1e-6, atol=1e-9)
    every = torch.arange(len(book.levels_K)) + book.low
    assert torch.equal(book.nearest(book.values(every.float())), every.float())
    assert float(book.values(torch.zeros(1))) == 0.0


@given(st.floats(1e-30, 1e30))
@settings(deadline=None)
def test_powers_of_two(scale: float) -> None:
    up, near = (float(power_of_two(torch.tensor([scale]), up=up)) for up in (True, False))
    held = float(torch.tensor(scale))  # as float32
    assert math.log2(up) == math.ceil(math.log2(held)) or math.isclose(up, held, rel_tol=1e-6)
    assert math.log2(near).is_integer()
    assert 2**-0.5001 < near / held < 2**0.5001


def test_a_scale_that_is_held_is_still_held_when_larger_ones_are_gone() -> None:
    scale = torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 8
    held = e4m3_scale(scale, tensor_scale(float(scale.max()))).sort().values
    for end in (200, 150, 100, 50, 10):
        rest = held[:end]
        unit = tensor_scale(float(rest.max()))
        assert 224 < float(rest.max()) / unit <= 448
        assert torch.equal(e4m3_scale(rest, unit), rest)
        assert torch.equal(rest.bfloat16().float(), rest)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_level_times_scale(name: str) -> None:
    form = FORMATS[name]
    spec = QuantSpec(bits=form.bits, group_size=form.group_size or 8, format=name)
    size = spec.group_size or 0
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(spec.low, spec.high + 1, (3, 2 * size), generator=draw)
    scale = 2.0 ** torch.randint(-8, 2, (3, 2), generator=draw)
    values = Quantized(codes.to(torch.int8), scale, None, spec, (3, 2 * size)).dequantize()
    levels = form.codebook.levels_K.tolist()
    for row in range(3):
        for column in range(2 * size):
            level = levels[int(codes[row, column]) - spec.low]
            assert float(values[row, column]) == pytest.approx(level * float(scale[row, column // size]))
    assert QuantSpec.model_validate(spec.model_dump()) == spec


def test_specs_that_contradict_their_format_are_refused() -> None:
    for settings_ in ({"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 16, "symmetric": False}):
        with pytest.raises(ValidationError, match="groups of 16; asked for were"):
            QuantSpec(format="nvfp4", **settings_)
    assert QuantSpec(bits=4).model_dump() == {"bits": 4, "symmetric": True, "group_size": None}
