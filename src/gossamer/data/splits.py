"""Disjoint, stable splits by what the rows say.

Each row has a key: the sha256 of its normalised content (text with its white space folded, an image's bytes), without
its label and its place. Rows with the same key are duplicates and stay together, so that no test row was seen in
calibration or training. Groups of duplicates are put in the order of their keys, which is as good as a random order,
does not depend on the order of the file, and is the same on every machine; the splits are filled in that order.

Left out: near-duplicates (other punctuation, other encodings of the same picture) have different keys.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.data.table import PLACE, Row
from gossamer.errors import DataError

Key = Callable[[Row], str]

SPLITS = ("test", "validate", "calibration")  # the order in which they are filled; what remains is train
NOT_CONTENT = frozenset({PLACE, "label", "label_name"})


@dataclass(frozen=True)
class Splits:
    """Hold rows for four uses; no content occurs in two of them."""

    calibration: list[Row]
    train: list[Row]
    validate: list[Row]
    test: list[Row]


def split_rows(
    rows: Sequence[Row], *, sizes: Mapping[str, int | float] | None = None, key: Key | None = None
) -> Splits:
    """Split rows into calibration, validate, test and, with what remains, train.

    `sizes` gives for each of the three a number of rows (int) or a share of all rows (float below 1), of which at least
    one row; a split that is not named gets none. Default: test 0.3, validate 0.1, calibration 0.1. A group of
    duplicates goes to the first split that has room for all of it. Each split is in the order of the keys.
    Raises DataError with both numbers when there are too few rows, or too few different ones.

    >>> splits = split_rows(rows, sizes={"calibration": 256, "test": 0.2})
    """
    wanted = _counts(sizes if sizes is not None else {"test": 0.3, "validate": 0.1, "calibration": 0.1}, len(rows))
    room = dict(wanted)
    parts: dict[str, list[Row]] = {name: [] for name in (*SPLITS, "train")}
    for group in _groups(rows, key or row_key):
        name = next((name for name in SPLITS if 0 < len(group) <= room[name]), "train")
        parts[name].extend(group)
        if name != "train":
            room[name] -= len(group)
    for name in SPLITS:
        exact = sizes is not None and isinstance(sizes.get(name), int)
        if (exact and room[name]) or (wanted[name] and not parts[name]):
            raise DataError(
                f"{wanted[name]} {name} rows are asked for, but only {len(parts[name])} can be kept apart from others",
                f"among {len(rows)} rows there are too many duplicates: give more rows, or ask for fewer",
            )
    return Splits(**parts)


def without_overlap(rows: Sequence[Row], others: Iterable[Row], *, key: Key | None = None) -> tuple[list[Row], int]:
    """Return the rows whose content does not occur among `others`, in their order, and how many were dropped.

    For data given in two files: `rows` to calibrate or train with, `others` to evaluate on.

    >>> calibration, num_dropped = without_overlap(calibration, evaluation)
    """
    key = key or row_key
    seen = {key(row) for row in others}
    kept = [row for row in rows if key(row) not in seen]
    return kept, len(rows) - len(kept)


def row_key(row: Row, *, ignore: Collection[str] = NOT_CONTENT) -> str:
    """Return the sha256 of what a row says, as hex digits; columns in `ignore` do not count.

    White space at the ends, and how much there is between words, do not matter; nor does the Unicode form.
    """
    parts = {str(column): _digest(cell) for column, cell in row.items() if column not in ignore}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def loose_key(row: Row) -> str:
    """Return the key of what a row says when upper and lower case do not matter either."""
    return row_key({column: _without_case(cell) for column, cell in row.items() if column not in NOT_CONTENT})


def _without_case(cell: Any) -> Any:
    if isinstance(cell, str):
        return cell.casefold()
    if isinstance(cell, Mapping):
        return {name: _without_case(part) for name, part in cell.items()}
    return [_without_case(part) for part in cell] if isinstance(cell, list | tuple) else cell


def _groups(rows: Sequence[Row], key: Key) -> list[list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    # duplicates may differ in label: their order must not depend on that of the file either
    return [sorted(found[name], key=lambda row: str(row.get("label"))) for name in sorted(found)]


def _counts(sizes: Mapping[str, int | float], num_rows: int) -> dict[str, int]:
    for name, size in sizes.items():
        if name not in SPLITS:
            raise DataError(
                f"there is no split {name!r} to size", f"sizes are for {', '.join(SPLITS)}; train gets the rest"
            )
        if size < 0 or (isinstance(size, float) and size >= 1):
            raise DataError(f"{name} {size} is neither a number of rows nor a share below 1", "for example 256, or 0.2")
    counts = dict.fromkeys(SPLITS, 0)
    for name, size in sizes.items():
        if size:
            counts[name] = size if isinstance(size, int) else max(1, round(size * num_rows))
    total = sum(counts.values())
    if total > num_rows:
        parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise DataError(f"{num_rows} rows, but {total} are needed ({parts})", "give more rows, or ask for fewer")
    return counts


def _digest(cell: Any) -> str:
    if isinstance(cell, str):
        return "t" + _sha(" ".join(unicodedata.normalize("NFC", cell).split()).encode("utf-8", "surrogatepass"))
    if isinstance(cell, Path):
        return "b" + _sha(cell.read_bytes())
    if isinstance(cell, bytes):
        return "b" + _sha(cell)
    if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
        return "b" + _sha(cell["bytes"])
    if isinstance(cell, Mapping):
        return "m" + _sha(
            json.dumps({str(name): _digest(value) for name, value in cell.items()}, sort_keys=True).encode()
        )
    if isinstance(cell, list | tuple):
        return "l" + _sha(json.dumps([_digest(value) for value in cell]).encode())
    if hasattr(cell, "tobytes"):  # a PIL image or an array
        return "a" + _sha(repr((getattr(cell, "mode", ""), getattr(cell, "size", ""))).encode() + cell.tobytes())
    return "v" + _sha(repr(cell).encode())


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
