"""Check the files of a Hugging Face folder before anything is loaded: config, weights, what a user ships.

A safetensors file is: 8 bytes (length N of the header, little endian), N bytes of JSON (each tensor's dtype, shape and
byte range), then the bytes. So whether it is whole can be told from its first kilobytes and its size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
SLOW_TOKENIZER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "*.spm", "*.bpe")


@dataclass(frozen=True)
class StoredShape:
    """Say how a safetensors file holds one tensor: its dtype as the file spells it (`F32`), shape, bytes, and where."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    begin: int = 0


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder as a dict.

    Raises ModelError when the folder or the file is missing, or when the file is not a JSON object.

    >>> read_config(Path("my-bert"))["model_type"]  # doctest: +SKIP
    'bert'
    """
    if not folder.exists():
        raise ModelError(f"there is no folder {folder}", "check the path, or give a hub id such as org/name")
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file, not a model folder", "give the folder with config.json in it")
    path = folder / "config.json"
    if not path.exists():
        listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{folder} holds no config.json (it holds: {listed})",
            "a Hugging Face folder is written by save_pretrained; any other network: pass the nn.Module from Python",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}", "copy config.json of the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, not an object", "copy config.json again")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in order, each checked to be whole.

    Raises ModelError when there are none, when only a pickle is there, when a shard named in the index is missing,
    when a file is shorter than its header says, or when a tensor of the index is in no shard.
    """
    if (folder / WEIGHTS).exists():
        read_safetensors_header(folder / WEIGHTS)
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        return _sharded_files(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds its weights only as a pickle ({', '.join(pickles)}), which can run any code when opened",
            "convert it where you trust it: AutoModel...from_pretrained(folder).save_pretrained(new_folder) "
            f"writes {WEIGHTS}",
        )
    if (folder / "adapter_model.safetensors").exists():
        raise ModelError(
            f"{folder} holds an adapter, not a model",
            "merge it first: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)",
        )
    found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))) or "no safetensors file"
    raise ModelError(f"{folder} holds no {WEIGHTS} and no {INDEX} (found: {found})", "copy the weights again")


def read_safetensors_header(path: Path) -> dict[str, StoredShape]:
    """Return the tensors that a safetensors file holds, after checking that the file is whole.

    Raises ModelError with the bytes that the header asks for and the bytes that are there.
    """
    actual = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path} is a Git LFS pointer of {actual} bytes, not weights", "run: git lfs pull")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or 8 + length > actual:
            raise ModelError(
                f"{path} is truncated: its header alone needs {8 + length} bytes, the file has {actual}",
                "copy or download the file again",
            )
        try:
            header = json.loads(file.read(length))
            tensors = {
                name: StoredShape(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                    8 + length + entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(
                f"{path} is not a safetensors file: its header cannot be read ({error})", "copy it again"
            ) from error
    if 8 + length + end != actual:
        state = "truncated" if actual < 8 + length + end else "damaged"
        raise ModelError(
            f"{path} is {state}: its header asks for {8 + length + end} bytes, the file has {actual}",
            "copy or download the file again",
        )
    return tensors


def shipped_files(folder: Path, weights: Iterable[Path], code: bool) -> list[Path]:
    """Return the files that a user ships to run this model: weights, config, tokenizer or processor, each once.

    Left out: README, licences, training state, the same weights in other formats, and the slow tokenizer's files when
    tokenizer.json (which holds the same vocabulary) is there. `code` adds the Python files of a remote-code model.
    """
    patterns = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    if not (folder / "tokenizer.json").exists():
        patterns += SLOW_TOKENIZER_FILES
    if code:
        patterns.append("*.py")
    found = list(weights) + [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        found.append(folder / INDEX)
    return sorted(set(found))


def hash_files(paths: Iterable[Path]) -> str:
    """Return the sha256 over names and contents of files, read in pieces of one MiB."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{digest}\n".encode())
    return total.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and values of tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        if values.numel():
            total.update(values.view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that every value is a finite number. Raises ModelError naming the tensors and how many values are not."""
    damaged: list[str] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        # a sum is finite only when all terms are (or when it overflows: then count)
        if bool(torch.isfinite(tensor.sum())):
            continue
        if count := int((~torch.isfinite(tensor)).sum()):
            damaged.append(f"{name} ({count} of {tensor.numel()})")
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        raise ModelError(
            f"{len(damaged)} tensors hold NaN or infinite values: {', '.join(damaged[:5])}{more}",
            "the training run diverged or the file is damaged: take an earlier checkpoint",
        )


def _sharded_files(folder: Path) -> list[Path]:
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} cannot be read: {error!r}", "copy the index again") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{folder / INDEX} names files outside its folder: {', '.join(outside)}", "do not trust it")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"{folder / INDEX} names {len(names)} shards, {len(missing)} are missing: {', '.join(missing)}",
            "download the missing files",
        )
    held = {name: read_safetensors_header(folder / name) for name in names}
    absent = [tensor for tensor, name in weight_map.items() if tensor not in held[name]]
    if absent:
        raise ModelError(
            f"{len(absent)} of {len(weight_map)} tensors in {folder / INDEX} are not in their shard: "
            f"{', '.join(absent[:5])}",
            "index and shards belong to different versions: download the folder again",
        )
    return [folder / name for name in names]
