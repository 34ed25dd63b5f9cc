"""Tensors that lie in a file and are in memory only while somebody looks at them.

A file is written once, tensor after tensor, and read by mapping the pages of one tensor at a time: they are given back
when the tensor dies. Nothing but raw bytes is written; dtypes and shapes are kept by whoever wrote them.

Invariants: what is read is what was written, bit for bit, and every tensor begins at a multiple of ALIGNMENT bytes, as
in memory that torch allocates. Kernels choose their way by alignment, so sums come out the same wherever inputs lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64

Item = TypeVar("Item")


@dataclass(frozen=True)
class Place:
    """Say where a tensor lies in a file, and what it is."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return how many bytes it takes."""
        return torch.Size(self.shape).numel() * dtype_named(self.dtype).itemsize


class TensorFile:
    """Write tensors into an open binary file, and map them back; the file need not have a name any more.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     there = TensorFile(file)
    ...     there.read(there.write(torch.tensor([1.0, 2.0]))).tolist()
    [1.0, 2.0]
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0

    def __del__(self) -> None:
        self._file.close()  # what is mapped stays mapped

    def write(self, tensor: Tensor) -> Place:
        """Append a tensor and return where it lies."""
        start = -(-self.num_bytes // ALIGNMENT) * ALIGNMENT
        place = Place(start, dtype_name(tensor.dtype), tuple(tensor.shape))
        self._file.seek(start)
        self._file.write(as_bytes(tensor).numpy().data)
        self._file.flush()
        self.num_bytes = start + place.num_bytes
        return place

    def read(self, place: Place) -> Tensor:
        """Map a tensor; what is done to it stays in memory and never reaches the file."""
        if not place.num_bytes:
            return torch.empty(place.shape, dtype=dtype_named(place.dtype))
        pages = np.memmap(self._file, np.uint8, "c", place.offset, (place.num_bytes,))
        return torch.from_numpy(pages).view(dtype_named(place.dtype)).view(place.shape)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's values as one row of bytes, uint8 [num_bytes]: the same memory where they lie in a row."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name by which `dtype_named` finds a dtype."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


class Lazy(Sequence[Item], Generic[Item]):
    """A sequence whose items are made when they are asked for, and kept by nobody."""

    def __init__(self, make: Callable[[int], Item], positions: range) -> None:
        self._make = make
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Lazy[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | Lazy[Item]:
        if isinstance(index, slice):
            return Lazy(self._make, self._positions[index])
        return self._make(self._positions[index])


def tensors_changed(value: Any, change: Callable[[Any], Any], kinds: type | tuple[type, ...] = Tensor) -> Any:
    """Return a value with all of some `kinds` inside its tuples, lists and dicts changed; the rest is as it was."""
    if isinstance(value, kinds):
        return change(value)
    if isinstance(value, tuple):
        parts = [tensors_changed(part, change, kinds) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [tensors_changed(part, change, kinds) for part in value]
    if isinstance(value, dict):
        return {name: tensors_changed(part, change, kinds) for name, part in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors inside a value's tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    tensors_changed(value, found.append)
    return found
