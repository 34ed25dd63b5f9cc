"""Rows from csv, tsv, jsonl and json. Text is UTF-8; a row that cannot be read is an error that names its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gossamer.data.table import Table
from gossamer.errors import DataError


def decode_text(content: bytes, name: str) -> str:
    """Return UTF-8 bytes as text, without a byte-order mark.

    Raises DataError with the offset and the line of the first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        raise DataError(
            f"{name} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}, line {line}",
            "save it as UTF-8, for example: iconv -f latin1 -t utf-8",
        ) from error


def read_delimited(content: bytes, name: str, fingerprint: str, *, delimiter: str) -> Table:
    """Return the rows of a csv or tsv file whose first line names the columns; every cell is a string.

    Raises DataError naming the line of a row with too many or too few cells, or of broken quotes.
    """
    text = decode_text(content, name)
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    with _field_limit(len(text)):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            header = next((cells for cells in reader if cells), None)
            if header is None:
                raise empty(name, "no header and no rows")
            _check_header(header, name)
            start = reader.line_num + 1
            for cells in reader:
                if cells:
                    if len(cells) != len(header):
                        raise DataError(
                            f"{name}, line {start}: {len(cells)} cells where the header has {len(header)}",
                            "quote cells that hold a delimiter or a line break; the first line must name the columns",
                        )
                    rows.append(dict(zip(header, cells, strict=True)))
                    places.append(start)
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{name}, line {reader.line_num}: {error}", 'a quote inside a quoted cell is written twice: ""'
            ) from error
    if not rows:
        raise empty(name, f"a header ({', '.join(header)}) and no rows")
    return Table(name, rows, header, fingerprint, unit="line", places=places)


def read_json_lines(content: bytes, name: str, fingerprint: str) -> Table:
    """Return the rows of a file with one JSON object a line; blank lines are passed over.

    Raises DataError naming the line that is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    for number, line in enumerate(decode_text(content, name).split("\n"), start=1):
        if line.strip():
            rows.append(_json_object(line, f"{name}, line {number}"))
            places.append(number)
    if not rows:
        raise empty(name, "no rows")
    return Table(name, rows, columns_of(rows), fingerprint, unit="line", places=places)


def read_json_list(content: bytes, name: str, fingerprint: str) -> Table:
    """Return the rows of a file that holds one JSON list of objects.

    Raises DataError naming the line of a syntax error, or the element that is not an object.
    """
    text = decode_text(content, name)
    if not text.strip():
        raise empty(name, "no rows")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "a file with one object a line must be named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{name}, line {error.lineno}: not JSON: {error.msg} (column {error.colno})", hint) from error
    if not isinstance(found, list):
        raise DataError(f"{name} holds one JSON {_kind(found)}, not a list of objects", "write [{...}, {...}]")
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: a JSON {_kind(row)}, not an object", 'write {"text": "..."}')
    if not found:
        raise empty(name, "no rows")
    return Table(name, found, columns_of(found), fingerprint)


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of all columns in the order in which they are first seen."""
    return list(dict.fromkeys(column for row in rows for column in row))


def empty(name: str, what: str) -> DataError:
    """Return the error for data without rows."""
    return DataError(f"{name} is empty: {what}", "give a file with at least one row")


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not JSON: {error.msg} (column {error.colno})", "each line must hold one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON {_kind(row)}, not an object", 'each line must look like {"text": "..."}')
    return row


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _check_header(header: list[str], name: str) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{name}: the header names {', '.join(map(repr, twice))} more than once", "rename one of them")


@contextmanager
def _field_limit(limit: int) -> Iterator[None]:
    # csv refuses cells beyond 128 KiB; a whole document is a normal cell here
    before = csv.field_size_limit(max(limit, 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)
