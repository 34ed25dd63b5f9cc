"""GGUF blocks: the same bytes and numbers as ggml's own Python code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.models.gguf_blocks import FORMATS, BlockFormat, BlockName, decode, format_named, pack, unpack

gguf = pytest.importorskip("gguf")


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


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("q4_k", 512, "Q4_K"),
        ("q4_k", 576, "Q5_0"),
        ("q5_k", 576, "Q5_1"),
        ("q6_k", 576, "Q8_0"),
        ("q4_0", 576, "Q4_0"),
        ("q4_k", 48, None),
        ("q8_0", 48, None),
    ],
)
def test_what_stands_in_for_a_format(name: BlockName, columns: int, found: str | None) -> None:
    form = format_named(name, columns)
    assert (form.name if form else None) == found


def test_large_matrices_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_blocks(FORMATS["Q4_K"], 24, np.random.default_rng(1)).reshape(12, -1)
    whole = decode(data, FORMATS["Q4_K"])
    monkeypatch.setattr("gossamer.models.gguf_blocks.CHUNK_ELEMENTS", 5 * 512)
    assert torch.equal(decode(data, FORMATS["Q4_K"]), whole)
