"""Our codes in GGUF blocks: unchanged, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.errors import ArtifactError
from gossamer.models.gguf_blocks import decode
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.runtimes.gguf_codes import encode_codes, exact_format

gguf = pytest.importorskip("gguf")

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


def random_codes(spec: QuantSpec, rows: int = 6, columns: int = 256) -> Quantized:
    generator = torch.Generator().manual_seed(spec.bits)
    groups = columns // (spec.group_size or columns)
    codes = torch.randint(spec.low, spec.high + 1, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand(rows, groups, generator=generator) + 0.01
    zero = torch.randint(spec.low, spec.high + 1, (rows, groups), generator=generator).to(torch.int8)
    return Quantized(codes, scale, None if spec.symmetric else zero, spec, (rows, columns))


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
