"""Rows from folders of images: one class per sub-folder, or a metadata file that names the images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from gossamer.data.table import Table
from gossamer.data.text_files import empty, read_delimited, read_json_lines
from gossamer.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
METADATA = ("metadata.csv", "metadata.jsonl")


def find_metadata(folder: Path) -> Path | None:
    """Return the folder's metadata file, or None."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def is_image_folder(folder: Path) -> bool:
    """Tell whether a folder has sub-folders that hold images."""
    return any(_is_image(path) for child in _class_folders(folder) for path in child.iterdir())


def read_metadata_folder(folder: Path, metadata: Path) -> Table:
    """Return the rows of `metadata`, the cell `file_name` of each turned into the path of a file in `folder`.

    Raises DataError naming the row whose file is missing or lies outside the folder.
    """
    content = metadata.read_bytes()
    name = str(metadata)
    table = (
        read_json_lines(content, name, "")
        if metadata.suffix == ".jsonl"
        else read_delimited(content, name, "", delimiter=",")
    )
    column = next((found for found in table.columns if found.casefold() == "file_name"), None)
    if column is None:
        raise DataError(
            f"{name} has no column file_name, only {', '.join(table.columns)}", "name each row's file under file_name"
        )
    digest = hashlib.sha256(content)
    root = folder.resolve()
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(table.rows):
        path = folder / str(row.get(column))
        if not path.resolve().is_relative_to(root):
            raise DataError(
                f"{table.place(index)}: {row[column]!r} lies outside {folder}", "move the file into the folder"
            )
        if not path.is_file():
            raise DataError(f"{table.place(index)}: there is no file {path}", "correct file_name, or add the file")
        _add_file(digest, path, root)
        rows.append({**row, column: path})
    return Table(name, rows, table.columns, digest.hexdigest(), unit=table.unit, places=table.places)


def read_class_folders(folder: Path) -> Table:
    """Return one row for each image: `image` is its path, `label` the name of its sub-folder; in order of the names.

    Raises DataError when there is no image at all.
    """
    digest = hashlib.sha256()
    rows: list[dict[str, Any]] = []
    root = folder.resolve()
    for child in _class_folders(folder):
        for path in sorted(path for path in child.iterdir() if _is_image(path)):
            _add_file(digest, path, root)
            rows.append({"image": path, "label": child.name})
    if not rows:
        raise empty(str(folder), "no sub-folder holds an image")
    return Table(str(folder), rows, ["image", "label"], digest.hexdigest(), unit="image")


def _class_folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _add_file(digest: Any, path: Path, root: Path) -> None:
    digest.update(path.resolve().relative_to(root).as_posix().encode())
    digest.update(hashlib.sha256(path.read_bytes()).digest())
