"""Tensors in a file: bit for bit what was written, aligned as in memory, never changed by who reads them."""

from __future__ import annotations

import tempfile
from collections import namedtuple

import pytest
import torch

from gossamer.models.spilled import ALIGNMENT, Lazy, TensorFile, tensors_changed, tensors_in

Pair = namedtuple("Pair", ["first", "second"])


def test_every_dtype_and_shape_comes_back_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, generator=draw)
    tensors = [
        values, values.t(), values[:, 1:3], values.bfloat16(), values.half(), values.double(), values > 0,
        torch.arange(5), torch.tensor(7), torch.tensor(-0.0), torch.empty(0, 3), torch.full((2,), float("nan")),
        values[:1].expand(3, 4),
    ]  # fmt: skip
    file = TensorFile(tempfile.TemporaryFile())  # noqa: SIM115 - closed with it
    places = [file.write(tensor) for tensor in tensors]
    for tensor, place in zip(tensors, places, strict=True):
        found = file.read(place)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert (
            found.numpy().tobytes() == tensor.contiguous().numpy().tobytes()
            if tensor.dtype != torch.bfloat16
            else (torch.equal(found.view(torch.int16), tensor.contiguous().view(torch.int16)))
        )
        if tensor.numel():
            assert found.data_ptr() % ALIGNMENT == 0


def test_what_is_done_to_a_mapped_tensor_stays_with_who_did_it() -> None:
    file = TensorFile(tempfile.TemporaryFile())  # noqa: SIM115 - closed with it
    place = file.write(torch.zeros(4))
    file.read(place).add_(1)
    assert file.read(place).tolist() == [0, 0, 0, 0]
    later = file.write(torch.ones(2))  # and the file can still be added to
    assert file.read(later).tolist() == [1, 1]


def test_a_mapped_tensor_outlives_the_file() -> None:
    file = TensorFile(tempfile.TemporaryFile())  # noqa: SIM115 - closed with it
    found = file.read(file.write(torch.arange(3.0)))
    del file
    assert found.tolist() == [0, 1, 2]


def test_a_lazy_sequence_makes_its_items_when_they_are_asked_for() -> None:
    made: list[int] = []

    def make(position: int) -> int:
        made.append(position)
        return position * position

    squares = Lazy(make, range(10))
    part = squares[2:8:2]
    assert not made
    assert len(part) == 3
    assert list(part) == [4, 16, 36]
    assert part[1:][0] == 16
    assert part[-1] == squares[6] == 36
    assert made == [2, 4, 6, 4, 6, 6]
    with pytest.raises(IndexError):
        squares[10]


def test_tensors_are_found_in_whatever_holds_them() -> None:
    one, two, three = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    value = {"a": [one, None, (two, "word")], "b": Pair(three, 4)}
    assert [int(tensor) for tensor in tensors_in(value)] == [1, 2, 3]
    changed = tensors_changed(value, lambda tensor: tensor * 10)
    assert changed == {"a": [torch.tensor(10), None, (torch.tensor(20), "word")], "b": Pair(torch.tensor(30), 4)}
    assert isinstance(changed["b"], Pair)
