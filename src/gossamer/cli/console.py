"""What the commands print with: data on stdout, progress on stderr, tables that read without colour."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gossamer.cli.terminal import draws_bars, plain

if TYPE_CHECKING:
    from pydantic import BaseModel

    from gossamer.run.progress import Progress

PIPE_WIDTH = 200  # of tables that no terminal sets a width for: wide enough that nothing is cut
COLOURS = {"PASS": "bold green", "FAIL": "bold red", "UNDECIDED": "bold yellow"}


def verdict(name: str | None) -> Text:
    """Return a verdict with its colour; the word alone says it too."""
    return Text(name or "–", style=COLOURS.get(name or "", ""))


class Screen:
    """Print a command's answer: for people, or as one JSON document.

    >>> Screen(as_json=False, quiet=True).pairs([("size", "23.0 MB")])
    size  23.0 MB
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, out: TextIO | None = None) -> None:
        self.as_json = as_json
        self._quiet = quiet
        out = out or sys.stdout
        width = None if out.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
        self._out = Console(file=out, width=width, highlight=False, markup=False, emoji=False)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show progress on stderr: bars on a terminal, plain lines elsewhere, nothing when quiet."""
        from gossamer.cli.progress import PlainProgress, bars
        from gossamer.run.progress import Silent

        if self._quiet:
            yield Silent()
        elif draws_bars(sys.stderr):
            with bars(sys.stderr) as progress:
                yield progress
        else:
            yield PlainProgress(sys.stderr)

    def answer(self, record: BaseModel) -> bool:
        """Print a record as JSON when that was asked for, and say whether it was."""
        if self.as_json:
            print(record.model_dump_json(indent=2), file=self._out.file)
        return self.as_json

    def answer_plain(self, value: dict[str, str | float | None]) -> bool:
        """Print a few named values as JSON when that was asked for, and say whether it was."""
        if self.as_json:
            print(json.dumps(value, indent=2), file=self._out.file)
        return self.as_json

    def line(self, text: str | Text = "", style: str = "") -> None:
        """Print one line; it is not cut or wrapped."""
        content = text if isinstance(text, Text) else Text(plain(text), style=style)
        self._out.print(content, soft_wrap=True)

    def verdict(self, name: str, text: str) -> None:
        """Print a verdict and what it is about."""
        self.line(verdict(name) + Text(f"  {plain(text)}"))

    def heading(self, text: str) -> None:
        """Print the heading of a part."""
        self.line()
        self.line(text, style="bold")

    def pairs(self, rows: Sequence[tuple[str, str | Text]]) -> None:
        """Print names beside values, aligned."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            text = value if isinstance(value, Text) else Text(plain(value))
            self.line(Text(f"{name:<{width}}  ", style="dim") + text)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str | Text]],
        *,
        right: Sequence[str] = (),
        fold: Sequence[str] = (),
    ) -> None:
        """Print a table; columns named in `right` align right, those in `fold` may wrap where the screen is narrow."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), header_style="bold")
        for column in columns:
            justify: Literal["right", "left"] = "right" if column in right else "left"
            table.add_column(column, justify=justify, no_wrap=column not in fold, overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
        with self._out.capture() as drawn:
            self._out.print(table)
        for line in drawn.get().splitlines():
            print(line.rstrip(), file=self._out.file)
