"""Packing: what is packed is read back, and the bytes are those of the bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.models.quantized import QuantSpec
from gossamer.runtimes.onnx_storage import block_layout, pack_bits, parameter_bytes, row_layout, unpack_bits


@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_unpacking_returns_what_was_packed(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)


def test_low_bits_come_first() -> None:
    assert pack_bits(np.array([1, 2, 3], np.uint8), 2).tolist() == [0b111001]
    assert pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]


@pytest.mark.parametrize(
    ("inputs", "group", "block"), [(576, 64, 64), (576, None, 64), (384, None, 128), (96, 48, 16), (1536, 512, 256)]
)
def test_the_block_is_the_largest_that_divides_the_group(inputs: int, group: int | None, block: int) -> None:
    layout = block_layout(inputs, QuantSpec(bits=4, group_size=group))
    assert layout is not None
    assert layout.block == block


def test_groups_that_no_block_divides_have_rows_only() -> None:
    assert block_layout(72, QuantSpec(bits=4, group_size=24)) is None
    assert block_layout(9, QuantSpec(bits=8)) is None


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [
        (4, True, 64 * 128 // 2 + 64 * 4 * 4),
        (4, False, 64 * 128 // 2 + 64 * 4 * 4 + 64 * 2),
        (3, True, 64 * 128 // 2 + 64 * 4 * 4),
        (2, False, 64 * 128 // 4 + 64 * 4 * 4 + 64),
        (8, False, 64 * 128 + 64 * 4 * 4 + 64 * 4),
    ],
)
def test_bytes_of_blocks_by_hand(bits: int, symmetric: bool, expected: int) -> None:
    spec = QuantSpec(bits=bits, group_size=32, symmetric=symmetric)
    layout = block_layout(128, spec)
    assert layout is not None
    assert parameter_bytes((64, 128), spec, layout) == expected


def test_bytes_of_rows_by_hand() -> None:
    spec = QuantSpec(bits=4, symmetric=False)
    assert parameter_bytes((3, 1, 3, 3), spec, row_layout(spec)) == 14 + 12 + 2  # 27 codes, 3 scales, 3 zero points
