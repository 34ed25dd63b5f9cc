"""GGUF blocks: the same bytes and numbers as ggml's own Python code, our codes unchanged, errors that only fall."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.errors import ArtifactError
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.runtimes.gguf_blocks import (
    FORMATS,
    BlockFormat,
    decode,
    encode_codes,
    exact_format,
    nearest_format,
    pack,
    unpack,
)
from gossamer.runtimes.gguf_solve import solve

gguf = pytest.importorskip("gguf")

ROUNDS_ITSELF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # formats that the gguf package can write too
EXACT = [
    (QuantSpec(bits=8, group_size=32), "Q8_0"),
    (QuantSpec(bits=8), "Q8_0"),
    (QuantSpec(bits=6, group_size=64), "Q8_0"),
    (QuantSpec(bits=5, group_size=32), "Q5_0"),
    (QuantSpec(bits=4, group_size=32), "Q4_0"),
    (QuantSpec(bits=3, group_size=128), "Q4_0"),
    (QuantSpec(bits=4, group_size=32, symmetric=False), "Q4_1"),
    (QuantSpec(bits=2, symmetric=False), "Q4_1"),
    (QuantSpec(bits=5, group_size=64, symmetric=False), "Q5_1"),
]


def theirs(rows: Tensor, name: str) -> Tensor:
    """What the gguf package reads from the bytes."""
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name]))


def random_blocks(form: BlockFormat, count: int, rng: np.random.Generator) -> Tensor:
    """Bytes of every kind, but for half-precision numbers, which stay finite: their upper exponent bit is cleared."""
    data = rng.integers(0, 256, (count, form.num_bytes), dtype=np.uint8)
    halves = [form.num_bytes - 2] if form.name == "Q6_K" else [0, 2] if form.has_minimum else [0]
    for start in halves:
        data[:, start + 1] &= 0xBF
    return torch.from_numpy(data)


def random_codes(spec: QuantSpec, rows: int = 6, columns: int = 256) -> Quantized:
    generator = torch.Generator().manual_seed(spec.bits)
    groups = columns // (spec.group_size or columns)
    codes = torch.randint(spec.low, spec.high + 1, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand(rows, groups, generator=generator) + 0.01
    zero = torch.randint(spec.low, spec.high + 1, (rows, groups), generator=generator).to(torch.int8)
    return Quantized(codes, scale, None if spec.symmetric else zero, spec, (rows, columns))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_mean_what_they_mean_to_ggml(name: str) -> None:
    form = FORMATS[name]
    data = random_blocks(form, 64, np.random.default_rng(0))
    blocks = unpack(data, form)
    assert blocks.codes.min() == form.low
    assert blocks.codes.max() == form.high
    assert torch.equal(pack(blocks), data)
    rows = data.reshape(8, -1)
    assert torch.equal(decode(rows, form), theirs(rows, name))
    block_size, num_bytes = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (form.size, form.num_bytes) == (block_size, num_bytes)


@pytest.mark.parametrize(("spec", "name"), EXACT, ids=str)
def test_codes_go_in_one_by_one(spec: QuantSpec, name: str) -> None:
    quantized = random_codes(spec)
    form, rows = encode_codes(quantized)
    assert form.name == name
    assert rows.shape == (6, form.row_bytes(256))
    for row in range(6):
        for column in range(0, 256, 7):
            group = column // quantized.group_size
            step = float(quantized.scale[row, group].half())
            held = float(decode(rows[row : row + 1], form)[0, column])
            code = int(quantized.codes[row, column])
            if quantized.zero_point is None:
                assert held == np.float32(step) * np.float32(code)
            else:
                zero = int(quantized.zero_point[row, group])
                least = np.float16((spec.low - zero) * np.float32(step))
                assert held == np.float32(step) * np.float32(code - spec.low) + np.float32(least)
    # only scales (and what is added to asymmetric codes) are rounded, to 11 digits of half precision
    span = (spec.high - spec.low) * quantized.scale.max()
    assert (decode(rows, form) - quantized.dequantize()).abs().max() <= span * 2.0**-10


def test_rounding_to_nearest_gives_the_bytes_that_ggml_writes() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    groups = weight.reshape(16, 8, 32)
    scale = groups.abs().amax(2) / 127
    codes = (groups * (1 / scale).unsqueeze(2)).round().flatten(1).to(torch.int8)
    quantized = Quantized(codes, scale, None, QuantSpec(bits=8, group_size=32), (16, 256))
    written = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(encode_codes(quantized)[1].numpy(), written)


@pytest.mark.parametrize(
    ("spec", "columns"),
    [
        (QuantSpec(bits=8, symmetric=False), 64),
        (QuantSpec(bits=6, symmetric=False, group_size=32), 64),
        (QuantSpec(bits=4, group_size=16), 64),
        (QuantSpec(bits=4, group_size=48), 96),
        (QuantSpec(bits=8), 48),
    ],
    ids=str,
)
def test_other_grids_are_not_forced_into_blocks(spec: QuantSpec, columns: int) -> None:
    assert exact_format(spec, columns) is None
    with pytest.raises(ArtifactError, match=f"{columns}"):
        encode_codes(random_codes(spec, columns=columns))


def test_a_scale_beyond_half_precision_is_an_error() -> None:
    quantized = random_codes(QuantSpec(bits=4, group_size=32))
    quantized.scale[2, 3] = 1e5
    with pytest.raises(ArtifactError, match="1e\\+05"):
        encode_codes(quantized)


@pytest.mark.parametrize(
    ("bits", "columns", "name"),
    [
        (2, 512, "Q4_K"),
        (4, 96, "Q4_1"),
        (5, 512, "Q5_K"),
        (5, 96, "Q5_1"),
        (6, 512, "Q6_K"),
        (6, 96, "Q8_0"),
        (8, 512, "Q8_0"),
        (4, 48, None),
    ],
)
def test_the_smallest_format_of_enough_bits(bits: int, columns: int, name: str | None) -> None:
    found = nearest_format(bits, columns)
    assert (found.name if found else None) == name


def weights(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 512, generator=generator) * (0.1 + torch.rand(12, 512, generator=generator))
    weight[0] = 0
    weight[1] = weight[1].abs() + 1  # no zero among them
    weight[2, ::64] *= 20
    return weight


@pytest.mark.parametrize("name", ROUNDS_ITSELF)
def test_solved_weights_are_nearer_than_ggml_s_own(name: str) -> None:
    weight, form = weights(), FORMATS[name]
    plain = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))

    def error(rows: Tensor) -> Tensor:
        return (decode(rows, form) - weight).square().reshape(-1, 32).sum(1)

    solved, rounded = error(solve(weight, form)), error(plain)
    assert solved.sum() < 0.97 * rounded.sum()
    # ggml chooses integers before it rounds the scale, and for a start that is not among ours: nearly every block
    assert (solved <= rounded * 1.05 + 1e-12).float().mean() > 0.98


@pytest.mark.parametrize("name", FORMATS)
def test_importance_moves_error_to_where_it_costs_less(name: str) -> None:
    weight, form = weights(1), FORMATS[name]
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 4
    squared = {
        which: (decode(solve(weight, form, given), form) - weight).square()
        for which, given in (("plain", None), ("weighted", importance))
    }
    assert squared["weighted"] @ importance @ torch.ones(12) < 0.97 * (squared["plain"] @ importance @ torch.ones(12))
    assert squared["weighted"].sum() > squared["plain"].sum()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_and_more_bits_are_nearer(name: str) -> None:
    weight, form = weights(), FORMATS[name]
    found = decode(solve(weight, form), form)
    assert torch.count_nonzero(found[0]) == 0
    relative = (found[3:] - weight[3:]).norm() / weight[3:].norm()
    assert relative < {4: 0.11, 5: 0.056, 6: 0.03, 8: 0.0075}[form.bits]


@pytest.mark.parametrize(("name", "plain"), [("Q4_K", "Q4_1"), ("Q5_K", "Q5_1")])
def test_super_blocks_lose_little_to_blocks_with_scales_of_their_own(name: str, plain: str) -> None:
    """The same integers with 16 bits a scale instead of 6: the bound that a super-block can come near."""
    weight = torch.randn(32, 512, generator=torch.Generator().manual_seed(3))
    nested, free = (
        (decode(solve(weight, FORMATS[kind]), FORMATS[kind]) - weight).square().sum() for kind in (name, plain)
    )
    assert nested < 1.08 * free


def test_a_row_s_bytes_do_not_depend_on_the_others() -> None:
    weight = weights()[:3, :256]
    for form in FORMATS.values():
        last = solve(weight[2:], form)
        assert torch.equal(solve(weight, form)[2:], last)


def test_what_cannot_be_solved_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="blocks of 256"):
        solve(torch.zeros(2, 96), FORMATS["Q4_K"])
    with pytest.raises(ArtifactError, match="largest weight"):
        solve(torch.full((2, 64), torch.nan), FORMATS["Q4_0"])
    with pytest.raises(ArtifactError, match="7 values for 64 inputs"):
        solve(torch.zeros(2, 64), FORMATS["Q4_0"], torch.ones(7))
