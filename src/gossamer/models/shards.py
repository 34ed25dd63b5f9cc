"""Read and write safetensors files one tensor at a time: memory holds the asked tensor and nothing else.

A safetensors file is: 8 bytes (length N of the header, little endian), N bytes of JSON (each tensor's dtype, shape and
byte range), then the bytes without gaps. So a tensor can be read straight from its place, and a file can be written in
any order once names, dtypes and shapes are known. Files are read, not mapped: pages of a mapped file count as this
process's memory, and a file that is torn while it is mapped kills the process.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ModelError
from gossamer.models import checkpoint

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SPELLED = {dtype: spelled for spelled, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5_000_000_000
# (file's name, what writes it at a path) -> where it lies
Keep = Callable[[str, Callable[[Path], None]], Path]
ALIGNMENT = 8  # the header ends on a multiple of it, so that every tensor lies at a multiple of its own item size


@dataclass(frozen=True)
class Entry:
    """Name a tensor that will be written: what a header says about it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shards:
    """Read the tensors of a checkpoint folder by name. Making one reads headers only, and checks that files are whole.

    >>> Shards(Path("my-llama")).read("model.norm.weight").dtype  # doctest: +SKIP
    torch.bfloat16
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, tuple[Path, checkpoint.StoredShape]] = {}
        for path in checkpoint.weight_files(folder):
            header = checkpoint.read_safetensors_header(path)
            self.held.update({name: (path, stored) for name, stored in header.items()})

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(stored.num_bytes for _, stored in self.held.values())

    @property
    def num_values(self) -> int:
        """Return how many numbers all tensors hold."""
        return sum(torch.Size(stored.shape).numel() for _, stored in self.held.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.held[name][1].shape

    def read(self, name: str) -> Tensor:
        """Return one tensor in the dtype that it is stored in. Raises ModelError when the file has become shorter."""
        stored = self.held[name][1]
        return self._read(name, stored.begin, stored.num_bytes).reshape(stored.shape)

    def read_row(self, name: str, row: int) -> Tensor:
        """Return one index of a tensor's first dimension (an expert's matrix among stacked ones), reading no other."""
        stored = self.held[name][1]
        size = stored.num_bytes // stored.shape[0]
        return self._read(name, stored.begin + row * size, size).reshape(stored.shape[1:])

    def _read(self, name: str, begin: int, num_bytes: int) -> Tensor:
        path, stored = self.held[name]
        if stored.dtype not in DTYPES:
            raise ModelError(f"{name} in {path} is stored as {stored.dtype}", "convert it to a float format first")
        values = torch.empty(num_bytes, dtype=torch.uint8)
        view = _bytes_of(values)
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < num_bytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ModelError(
                        f"{path} has changed: {name} needs {num_bytes} bytes, {done} are there",
                        "do not write to a model while it is read; copy the file again",
                    )
                done += count
        return values.view(DTYPES[stored.dtype])


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or numbered shards with an index, taking the tensors one after another as they come.

    `tensors` yields every entry once, in any order. Equal entries and values give equal bytes.
    """
    files = _assigned(entries, max_shard_bytes)
    _write_files({folder / name: members for name, members in files.items()}, tensors, metadata)
    _write_index(folder, files)


def write_kept_shards(
    folder: Path,
    entries: Sequence[Entry],
    tensors_of: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]],
    metadata: Mapping[str, str],
    keep: Keep,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the files of `write_shards` one after another, each by `keep`: what an earlier run finished is taken over.

    `tensors_of` yields the tensors of some names, each once. `folder` gets another name for the kept file where the
    disk can have two for one, else a copy.
    """
    files = _assigned(entries, max_shard_bytes)
    for name, members in files.items():

        def write(path: Path, members: Sequence[Entry] = members) -> None:
            _write_files({path: members}, tensors_of({entry.name for entry in members}), metadata)

        kept = keep(name, write)
        try:
            os.link(kept, folder / name)
        except OSError:  # a disk without hard links
            shutil.copyfile(kept, folder / name)
    _write_index(folder, files)


def num_files(entries: Sequence[Entry], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Return how many files entries will be written into."""
    return len(_assigned(entries, max_shard_bytes))


def _write_files(
    files: Mapping[Path, Sequence[Entry]], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write files side by side, taking their tensors as they come."""
    open_files = {}
    places: dict[str, tuple[Path, int, Entry]] = {}
    try:
        for path, members in files.items():
            header, offsets = _layout(members, metadata)
            file = path.open("wb")
            open_files[path] = file
            file.write(header)
            file.truncate(len(header) + sum(entry.num_bytes for entry in members))
            places.update({entry.name: (path, len(header) + offsets[entry.name], entry) for entry in members})
        for name, tensor in tensors:
            path, place, entry = places.pop(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), f"{name} is not as planned"
            if tensor.numel():
                open_files[path].seek(place)
                open_files[path].write(_bytes_of(tensor))
        assert not places, f"{len(places)} planned tensors were not given, {next(iter(places))} first"
        for file in open_files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in open_files.values():
            file.close()


def _write_index(folder: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """Write which of several files holds which tensor."""
    if len(files) == 1:
        return
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for members in files.values() for entry in members)},
        "weight_map": {entry.name: name for name, members in files.items() for entry in members},
    }
    (folder / checkpoint.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor's values (a copy's, when they do not lie together)."""
    values: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)


def _assigned(entries: Sequence[Entry], max_shard_bytes: int) -> dict[str, list[Entry]]:
    """Return which file holds which entries: in their order, a new file where the next would pass the limit."""
    parts: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if parts[-1] and filled + entry.num_bytes > max_shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += entry.num_bytes
    if len(parts) == 1:
        return {checkpoint.WEIGHTS: parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, start=1)}


def _layout(members: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header, and where each tensor begins behind it: wide items first, so that all are aligned."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offsets: dict[str, int] = {}
    end = 0
    for entry in sorted(members, key=lambda entry: (-entry.dtype.itemsize, entry.name)):
        offsets[entry.name] = end
        header[entry.name] = {
            "dtype": SPELLED[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.num_bytes],
        }
        end += entry.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // ALIGNMENT) * ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, offsets
