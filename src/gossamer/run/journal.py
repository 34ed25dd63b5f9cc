"""The journal: one JSON object a line, only ever appended, each line flushed to disk before work goes on.

A kill while a line is being written leaves a torn last line; it is cut off when the journal is opened again. A damaged
line anywhere else means that somebody edited the file, and is refused.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gossamer.errors import RunError
from gossamer.run.atomic import storage_errors
from gossamer.run.fingerprint import Json, canonical

Entry = dict[str, Any]


def read_journal(path: Path) -> list[Entry]:
    """Return the entries of a journal without changing it; a torn last line is left out, no file is no entry."""
    return _whole_lines(path)[0] if path.exists() else []


class Journal:
    """Append entries to a journal and keep those it holds in `entries`. Close it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path.parent):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self.entries, length = _whole_lines(path)
            os.ftruncate(self._descriptor, length)

    def append(self, event: str, **fields: Json) -> Entry:
        """Write one entry {"time", "event", fields...} and flush it. Raises RunError when the disk is full."""
        entry: Entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        line = (canonical(entry) + "\n").encode()
        with storage_errors(self.path.parent, len(line)):
            before = os.fstat(self._descriptor).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._descriptor, line[written:])
                os.fsync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, before)
                raise
        self.entries.append(json.loads(line))
        return self.entries[-1]

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole_lines(path: Path) -> tuple[list[Entry], int]:
    """Return the entries and how many bytes they take; what a killed writer left behind them is not counted."""
    entries: list[Entry] = []
    length = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            if number < len(lines):
                raise RunError(f"{path}: line {number} is damaged", "start again with --fresh or another --out")
            break
        entries.append(entry)
        length += len(line)
    return entries, length
