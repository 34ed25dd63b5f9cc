from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gossamer.errors import ModelError
from gossamer.models import checkpoint


def write_weights(path: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.arange(12, dtype=torch.float32).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors, path)
    return tensors


def test_the_header_says_what_the_file_holds(tmp_path: Path) -> None:
    tensors = write_weights(tmp_path / "model.safetensors")
    held = checkpoint.read_safetensors_header(tmp_path / "model.safetensors")
    assert {name: stored.shape for name, stored in held.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert (held["a"].dtype, held["a"].num_bytes, held["b"].dtype, held["b"].num_bytes) == ("F32", 48, "BF16", 10)


@given(share=st.floats(min_value=0.0, max_value=0.999))
def test_a_file_cut_anywhere_is_refused_with_both_numbers(
    share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    write_weights(path)
    whole = path.read_bytes()
    kept = int(len(whole) * share)
    path.write_bytes(whole[:kept])
    with pytest.raises(ModelError, match=rf"truncated: .* the file has {kept}\n") as caught:
        checkpoint.read_safetensors_header(path)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    if kept >= 8:
        assert f"needs {header} bytes" in caught.value.message or f"asks for {len(whole)} bytes" in caught.value.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (struct.pack("<Q", 4) + b"{,,}", "its header cannot be read"),
        (struct.pack("<Q", 9) + b'{"a":[1]}', "its header cannot be read"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "damaged: its header asks for 10 bytes, the file has 14"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says):
        checkpoint.read_safetensors_header(path)


def shard(folder: Path) -> dict[str, str]:
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_are_found_in_order(tmp_path: Path) -> None:
    shard(tmp_path)
    assert [path.name for path in checkpoint.weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names 2 shards, 1 are missing: model-2\.safetensors"):
        checkpoint.weight_files(tmp_path)


def test_a_tensor_that_is_in_no_shard_is_named(tmp_path: Path) -> None:
    weight_map = shard(tmp_path)
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": {**weight_map, "c": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"1 of 3 tensors .* not in their shard: c"):
        checkpoint.weight_files(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_garbled_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / checkpoint.INDEX).write_text(index)
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint.weight_files(tmp_path)


def test_an_index_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        checkpoint.weight_files(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="only as a pickle") as caught:
        checkpoint.weight_files(tmp_path)
    assert name in caught.value.message
    assert "save_pretrained" in caught.value.hint


def test_an_adapter_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        checkpoint.weight_files(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds an adapter"):
        checkpoint.weight_files(tmp_path)


def test_values_that_are_no_numbers_are_counted_by_tensor() -> None:
    good = torch.full((4,), 3e38)  # its sum overflows, its values do not
    bad = torch.tensor([[1.0, float("nan")], [float("inf"), float("-inf")]])
    checkpoint.check_finite({"good": good, "ids": torch.arange(3)})
    with pytest.raises(ModelError, match=r"1 tensors hold NaN or infinite values: w \(3 of 4\)"):
        checkpoint.check_finite({"good": good, "w": bad})


def test_hashes_follow_content_and_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * 3_000_000)
    two.write_bytes(b"y")
    inner = hashlib.sha256(one.read_bytes()).hexdigest()
    assert checkpoint.hash_files([one]) == hashlib.sha256(f"one\0{inner}\n".encode()).hexdigest()
    assert checkpoint.hash_files([one, two]) != checkpoint.hash_files([one])
    a = {"w": torch.zeros(2, 3), "b": torch.ones(())}
    assert checkpoint.hash_tensors(a) == checkpoint.hash_tensors(dict(reversed(a.items())))
    for other in ({"w": torch.zeros(3, 2)}, {"w": torch.zeros(2, 3).half()}, {"v": torch.zeros(2, 3)}):
        assert checkpoint.hash_tensors({**other, "b": a["b"]}) != checkpoint.hash_tensors(a)


def test_only_what_a_user_ships_is_shipped(tmp_path: Path) -> None:
    kept = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    left = [
        "README.md",
        ".gitattributes",
        "training_args.bin",
        "optimizer.pt",
        "pytorch_model.bin",
        "vocab.txt",
        "a.py",
    ]
    for name in kept + left:
        (tmp_path / name).write_text("x")
    weights = [tmp_path / "model.safetensors"]
    assert sorted(path.name for path in checkpoint.shipped_files(tmp_path, weights, code=False)) == sorted(kept)
    (tmp_path / "tokenizer.json").unlink()
    found = {path.name for path in checkpoint.shipped_files(tmp_path, weights, code=True)}
    assert {"vocab.txt", "a.py"} < found
