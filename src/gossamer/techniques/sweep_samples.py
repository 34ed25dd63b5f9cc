"""Calibration samples between two blocks: in memory where they fit beside the block, else in files, one at a time.

What a sample takes is seen from the first call of each block: what it is called with, and an output as large as its
input. Where all samples together would exceed what is left for them, the calls are written into a file without a name
(a kill leaves nothing of it) before the block's weights are read, and its outputs into the files that the run folder
keeps anyway (`sweep_memory.py`). Then memory holds one sample, whatever their number is.

A call mostly repeats what is known: its hidden states are the output of the block before, and masks and positions are
those of the sample before wherever lengths are equal. Neither is written again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.models.spilled import Lazy, Place, TensorFile, tensors_changed, tensors_in
from gossamer.models.walker import Call, Output, Stream
from gossamer.run.atomic import check_space, storage_errors
from gossamer.run.device import pinned_bytes


@dataclass(frozen=True)
class _Piece:
    """Stand for a tensor of the output of the block before."""

    number: int


class Samples:
    """Hold the calls of a block in memory, or in a file in `scratch` when more than `allowed` bytes would be needed.

    `allowed` None: as many as there are. Calls that lie in a file are Lazy. Outputs that are `pinned` take more.
    """

    def __init__(self, allowed: int | None, scratch: Path | None, *, pinned: bool = False) -> None:
        self._allowed = allowed
        self._scratch = scratch
        self._taken: Callable[[int], int] = pinned_bytes if pinned else int

    def calls(self, found: Callable[[Stream], Iterator[Call]], stream: Stream, count: int) -> Sequence[Call]:
        """Return the calls that `found` finds behind a stream; `count` samples pass the block, of both streams."""
        held = Stream(_Last(stream.outputs) if isinstance(stream.outputs, Lazy) else stream.outputs, stream.finished)
        calls = found(held)
        first = next(calls, None)
        if first is None:
            return []
        needed = count * self._bytes_of(first)
        if self._scratch is None or self._allowed is None or needed <= self._allowed - self._held_bytes(stream):
            return [first, *calls]
        check_space(self._scratch, 2 * needed)  # calls and outputs, the outputs before them, and the reference's
        with storage_errors(self._scratch, 2 * needed):
            return _recorded(chain([first], calls), held.outputs, self._scratch)

    def _held_bytes(self, stream: Stream) -> int:
        """Return what the outputs of finished stacks take that are in memory."""
        held = [outputs for outputs in stream.finished.values() if not isinstance(outputs, Lazy)]
        return sum(self._taken(tensor.nbytes) for tensor in tensors_in(held))

    def _bytes_of(self, call: Call) -> int:
        """Return what a sample takes while it passes a block: the call, and an output as large as its largest input."""
        sizes = [self._taken(tensor.nbytes) for tensor in tensors_in([call.args, call.kwargs])]
        return sum(sizes) + max(sizes, default=0)


class _Last(Sequence[Output]):
    """Hold on to the item of a sequence that was asked for last, so that it is one object for all who ask."""

    def __init__(self, whole: Sequence[Output]) -> None:
        self._whole = whole
        self._last: tuple[int, Output] | None = None

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> Output:  # type: ignore[override]
        if self._last is None or self._last[0] != index:
            self._last = None  # one sample is in memory, not two
            self._last = index, self._whole[index]
        return self._last[1]


def _recorded(calls: Iterator[Call], before: Sequence[Output], scratch: Path) -> Sequence[Call]:
    """Return calls that lie in a file; `before` are the outputs that they were made from, if there are any."""
    file = TensorFile(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115 - open as long as a call may be read
    kept: list[tuple[Any, Any]] = []
    earlier: list[tuple[Tensor, Place]] = []
    for position, call in enumerate(calls):
        pieces = _pieces(before[position]) if len(before) else []
        known = {_where(piece): number for number, piece in enumerate(pieces) if isinstance(piece, Tensor)}
        now: list[tuple[Tensor, Place]] = []

        def put(
            tensor: Tensor,
            known: dict[Any, int] = known,
            now: list[tuple[Tensor, Place]] = now,
            earlier: list[tuple[Tensor, Place]] = earlier,
        ) -> _Piece | Place:
            if _where(tensor) in known:
                return _Piece(known[_where(tensor)])
            place = _again(tensor, earlier, len(now)) or file.write(tensor)
            now.append((tensor, place))
            return place

        kept.append(tensors_changed((call.args, call.kwargs), put))
        earlier = now

    def call_of(position: int) -> Call:
        output: list[Any] = []

        def get(what: _Piece | Place) -> Any:
            if isinstance(what, Place):
                return file.read(what)
            if not output:
                output.extend(_pieces(before[position]))
            return output[what.number]

        return Call(*tensors_changed(kept[position], get, (_Piece, Place)))

    return Lazy(call_of, range(len(kept)))


def _again(tensor: Tensor, earlier: Sequence[tuple[Tensor, Place]], number: int) -> Place | None:
    """Return where the same tensor lies already, when the sample before had it in the same place."""
    if number >= len(earlier):
        return None
    other, place = earlier[number]
    alike = tensor.dtype == other.dtype and tensor.shape == other.shape
    return place if alike and torch.equal(tensor, other) else None


def _pieces(output: Output) -> Sequence[Any]:
    return (output,) if isinstance(output, Tensor) else output


def _where(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def store(file: TensorFile, output: Output) -> list[Any]:
    """Write a block's output into a file; return what it is made of: [alone, [[offset, dtype, shape], ...]]."""
    pieces = []
    for piece in _pieces(output):
        assert piece is None or isinstance(piece, Tensor), f"a block gives {type(piece).__name__} among its outputs"
        place = None if piece is None else file.write(piece)
        pieces.append(None if place is None else [place.offset, place.dtype, list(place.shape)])
    return [isinstance(output, Tensor), pieces]


def fetch(file: TensorFile, entry: Sequence[Any]) -> Output:
    """Map an output that `store` wrote."""
    alone, pieces = entry
    found = [None if piece is None else file.read(Place(piece[0], piece[1], tuple(piece[2]))) for piece in pieces]
    if alone:
        (whole,) = found
        assert whole is not None
        return whole
    return tuple(found)
