"""Fingerprints: what makes two inputs, two files, two folders or two versions of this code the same (sha256)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, Union

import gossamer

Json: TypeAlias = Union[bool, int, float, str, Sequence["Json"], Mapping[str, "Json"], None]  # noqa: UP007


def canonical(value: Json) -> str:
    """Return one spelling of a JSON value: keys sorted, no spaces. Raises ValueError for NaN, TypeError for others."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_json(value: Json) -> str:
    """Return the sha256 of a JSON value, the same for the same value whatever the order of its keys."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> str:
    """Return the sha256 of every file below a folder: relative names and bytes, not times or permissions."""
    return hash_json({name: hash_file(folder / name) for name in files_below(folder)})


def files_below(folder: Path) -> list[str]:
    """Return the relative names (with /) of the files below a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def code_version() -> str:
    """Return the sha256 of this package's own source files: a step made by other code is never taken for this one's."""
    package = Path(gossamer.__file__).parent
    return hash_json({path.relative_to(package).as_posix(): hash_file(path) for path in package.rglob("*.py")})
