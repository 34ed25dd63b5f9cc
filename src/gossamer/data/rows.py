"""Rows in, from whatever holds them: csv, tsv, jsonl, json, parquet, folders of images, Hugging Face datasets, lists.

A file is read once; its sha256 is the table's fingerprint. Images stay as they are stored (encoded bytes or a path)
until a task decodes them. A mistake in the data raises DataError naming the file and the row as the user counts it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gossamer.data.image_folders import find_metadata, is_image_folder, read_class_folders, read_metadata_folder
from gossamer.data.splits import row_key
from gossamer.data.table import Table
from gossamer.data.text_files import columns_of, empty, read_delimited, read_json_lines, read_json_list
from gossamer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def read_rows(source: str | Path | Sequence[Mapping[str, Any]], *, name: str | None = None) -> Table:
    """Read rows from a file, a folder, a Hugging Face dataset, or a list of mappings.

    `source` is a file (csv, tsv, jsonl, json, parquet), a folder of images (a sub-folder a class, or metadata.csv /
    metadata.jsonl with a column file_name), a folder written by `Dataset.save_to_disk`, a hub id (`owner/name` or
    `owner/name:split`), or rows in memory. `name` is what messages call it (default: its path).
    Raises DataError: missing, empty, damaged or of unknown kind.

    >>> table = read_rows("reviews.csv")
    """
    if not isinstance(source, str | Path):
        return _read_memory(source, name or "rows in memory")
    path = Path(source)
    name = name or str(source)
    if path.is_dir():
        return _read_folder(path, name)
    if path.is_file():
        return _read_file(path, name)
    suffix = path.suffix.lower()
    if isinstance(source, str) and suffix not in SUFFIXES and _HUB_ID.fullmatch(source) and source[0] not in "./":
        return _read_hub(source)
    raise DataError(f"{name} does not exist", f"looked in {path.absolute().parent}")


def _read_file(path: Path, name: str) -> Table:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{name}: unknown extension {suffix or '(none)'!r}", f"known are {', '.join(SUFFIXES)}; or give a folder"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}", "check its permissions") from error
    fingerprint = hashlib.sha256(content).hexdigest()
    if not content:
        raise empty(name, "0 bytes")
    if suffix == ".csv":
        return read_delimited(content, name, fingerprint, delimiter=",")
    if suffix == ".tsv":
        return read_delimited(content, name, fingerprint, delimiter="\t")
    if suffix in (".jsonl", ".ndjson"):
        return read_json_lines(content, name, fingerprint)
    if suffix == ".json":
        return read_json_list(content, name, fingerprint)
    return _read_parquet(content, name, fingerprint)


def _read_parquet(content: bytes, name: str, fingerprint: str) -> Table:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{name} is not a whole parquet file ({len(content)} bytes): {str(error).splitlines()[0]}",
            "it was cut short or damaged on the way: copy it again",
        ) from error
    if table.num_rows == 0:
        raise empty(name, f"columns {', '.join(table.column_names)} and no rows")
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = {
        column: tuple(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }
    return Table(name, table.to_pylist(), list(table.column_names), fingerprint, class_names=names)


def _read_folder(folder: Path, name: str) -> Table:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_bytes()).get("splits", [])
        raise DataError(f"{name} holds several splits: {', '.join(splits)}", f"name one of them: {folder}/SPLIT")
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return _read_saved(folder, name)
    metadata = find_metadata(folder)
    if metadata is not None:
        return read_metadata_folder(folder, metadata)
    if is_image_folder(folder):
        return read_class_folders(folder)
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if files:
        raise DataError(f"{name} is a folder with {', '.join(files[:8])}", f"name one of them: {folder / files[0]}")
    raise DataError(
        f"{name} holds no data that is known here",
        "a folder of images has a sub-folder for each class; one of images or recordings metadata.csv with a column "
        "file_name",
    )


def _read_saved(folder: Path, name: str) -> Table:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{name}: the saved dataset does not open: {error}", "write it again: save_to_disk") from error
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.arrow")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(json.dumps(dataset.features.to_dict(), sort_keys=True).encode())
    return _from_dataset(dataset, name, digest.hexdigest())


def _read_hub(source: str) -> Table:
    import datasets

    hub_id, _, split = source.partition(":")
    missing = DataError(
        f"{source} is neither a file nor a folder here, and was not found on the hub",
        "check the path; offline (HF_HUB_OFFLINE=1) only datasets in the local cache can be opened",
    )
    try:
        found = datasets.load_dataset(hub_id, split=split or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{missing.message} ({type(error).__name__})", missing.hint) from error
    if not isinstance(found, datasets.Dataset):
        raise DataError(
            f"{source} has the splits {', '.join(found)}", f"name one of them: {hub_id}:{next(iter(found))}"
        )
    return _from_dataset(found, source, None)


def _from_dataset(dataset: Dataset, name: str, fingerprint: str | None) -> Table:
    import datasets

    if len(dataset) == 0:
        raise empty(name, "no rows")
    names = {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel) and feature.names:
            names[column] = tuple(feature.names)
        elif isinstance(feature, datasets.Image | datasets.Audio):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    rows: list[dict[str, Any]] = dataset.to_list()
    return Table(name, rows, list(dataset.column_names), fingerprint or _fingerprint(rows), class_names=names)


def _read_memory(source: Sequence[Mapping[str, Any]], name: str) -> Table:
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(source, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {number}: a {type(row).__name__}, not a mapping", 'give {"text": "..."}')
        rows.append(dict(row))
    if not rows:
        raise empty(name, "no rows")
    return Table(name, rows, columns_of(rows), _fingerprint(rows))


def _fingerprint(rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_key(row, ignore=()).encode())
    return digest.hexdigest()
