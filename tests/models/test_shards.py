"""Files are read and written one tensor at a time: what safetensors itself reads, byte for byte the same each time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.errors import ModelError
from gossamer.models.shards import Entry, Shards, num_files, write_kept_shards, write_shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.int32, torch.uint8, torch.bool)


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    found = {f"of.{dtype}": torch.randint(0, 2, (3, 5), generator=draw).to(dtype) for dtype in DTYPES}
    return {**found, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.randn(4, 6).t()}


def entries(named: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()]


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    named = tensors()
    write_shards(tmp_path, entries(named), reversed(list(named.items())), {"format": "pt"})
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in named.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_read_alone_as_they_are_stored(tmp_path: Path) -> None:
    named = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(named, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    assert shards.num_values == sum(tensor.numel() for tensor in named.values())
    assert shards.num_bytes == sum(tensor.nbytes for tensor in named.values())
    for name, tensor in named.items():
        assert torch.equal(shards.read(name), tensor)
        assert shards.read(name).dtype == tensor.dtype
        assert shards.shape(name) == tuple(tensor.shape)


def test_the_order_of_writing_changes_no_byte(tmp_path: Path) -> None:
    named = tensors()
    for folder, order in (("a", list(named.items())), ("b", list(named.items())[::-1])):
        (tmp_path / folder).mkdir()
        write_shards(tmp_path / folder, entries(named), order, {"b": "2", "a": "1"}, max_shard_bytes=60)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 2
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == named.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in named.values())
    shards = Shards(tmp_path / "a")
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in named.items())


def test_every_tensor_lies_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    named = {"b": torch.zeros(3, dtype=torch.int8), "a": torch.zeros(3, dtype=torch.int64), "c": torch.zeros(1)}
    write_shards(tmp_path, entries(named), named.items(), {})
    held = Shards(tmp_path).held
    assert all(stored.begin % named[name].dtype.itemsize == 0 for name, (_, stored) in held.items())


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(shards.held["a"][1].begin + 40)
    with pytest.raises(ModelError, match=r"a needs 400 bytes, 40 are there"):
        shards.read("a")


def test_a_plan_that_is_not_kept_is_our_own_mistake(tmp_path: Path) -> None:
    planned = [Entry("a", torch.float32, (2,)), Entry("b", torch.float32, (2,))]
    with pytest.raises(AssertionError, match="1 planned tensors were not given"):
        write_shards(tmp_path, planned, [("a", torch.zeros(2))], {})
    with pytest.raises(AssertionError, match="not as planned"):
        write_shards(tmp_path, planned, [("a", torch.zeros(3))], {})


def test_files_that_are_kept_are_the_same_bytes_and_are_not_written_again(tmp_path: Path) -> None:
    named, written = tensors(), []
    for folder in ("plain", "first", "second", "kept"):
        (tmp_path / folder).mkdir()

    def keep(name: str, write: Callable[[Path], None]) -> Path:
        path = tmp_path / "kept" / name
        if not path.exists():
            written.append(name)
            write(path)
            if len(written) == 2:
                raise KeyboardInterrupt
        return path

    def of(names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in named.items() if name in names)

    write_shards(tmp_path / "plain", entries(named), named.items(), {"a": "1"}, max_shard_bytes=60)
    with pytest.raises(KeyboardInterrupt):
        write_kept_shards(tmp_path / "first", entries(named), of, {"a": "1"}, keep, max_shard_bytes=60)
    write_kept_shards(tmp_path / "second", entries(named), of, {"a": "1"}, keep, max_shard_bytes=60)
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == files
    assert len(written) == len(set(written)) == num_files(entries(named), 60) > 2
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
