"""The manifest of an artifact, gossamer.json: what was done to what, with which data, seed and versions.

It holds nothing that differs between two runs that decide alike (no time, no measured figure, no path), so the same
decisions give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gossamer.errors import ArtifactError
from gossamer.models.source import Source

MANIFEST = "gossamer.json"
CARD = "README.md"
NOT_SHIPPED = {MANIFEST, CARD, ".gitattributes"}


class Manifest(BaseModel):
    """Say what an artifact is and how it came about."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may know more

    format: int = 1
    runtime: str
    task: str
    task_settings: dict[str, Any]
    recipe: list[dict[str, Any]]
    model: str
    model_fingerprint: str
    calibration_fingerprint: str | None
    seed: int
    versions: dict[str, str]
    files: dict[str, str]  # file -> sha256


def write_manifest(folder: Path, **fields: Any) -> None:
    """Write gossamer.json last, over every file that lies in the artifact's folder."""
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in artifact_files(folder)}
    manifest = Manifest(files=files, **fields)
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of an artifact, or None for a folder that has none (a plain model folder).

    Raises ArtifactError when the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not a manifest: {error}", "write the artifact again") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise ArtifactError when a file is missing or was changed after the manifest was written."""
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{folder / MANIFEST} names {name}, outside the artifact", "write the artifact again")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", "copy the whole artifact folder, or write it again")
        if _sha256(path) != expected:
            raise ArtifactError(f"{path} was changed after it was proven", "write the artifact again")


def artifact_files(folder: Path) -> list[Path]:
    """Return the files that a user must ship: everything but our manifest and the model card."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_SHIPPED)


def copy_companions(source: Source, folder: Path) -> None:
    """Copy what turns text or images into inputs (tokenizer, processor, config) where the runtime did not write it."""
    if source.path is None:
        return
    for name in source.beside.names:
        if not (folder / name).exists():
            (folder / name).write_bytes(source.beside.read(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
