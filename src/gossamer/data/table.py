"""Rows as they were found: the cells, where each row stands, and a fingerprint of the content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]

PLACE = "place"  # key under which a bound row says where it came from, for messages: "mails.csv, line 12"


@dataclass(frozen=True)
class Table:
    """Hold the rows of one source of data.

    `columns` are the names as found; `places[i]` is the number of row i as the user counts it (the line of a text
    file, the row of a parquet file, both from 1) and `unit` says which; `fingerprint` is the sha256 of the content;
    `class_names` gives, for a column of class numbers, the name of each class.

    >>> table = read_rows("mails.csv")
    >>> table.place(0)
    'mails.csv, line 2'
    """

    name: str
    rows: list[dict[str, Any]]
    columns: list[str]
    fingerprint: str
    unit: str = "row"
    places: list[int] | None = None
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, index: int) -> str:
        """Return where row `index` (from 0) stands, in words."""
        return f"{self.name}, {self.unit} {self.places[index] if self.places is not None else index + 1}"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)


def place_of(row: Row, index: int) -> str:
    """Return where a bound row came from, in words; rows that do not know are counted from 1."""
    return str(row[PLACE]) if PLACE in row else f"row {index + 1}"
