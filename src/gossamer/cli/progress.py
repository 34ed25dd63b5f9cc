"""How far long work is: bars with the time left on a terminal, and lines where nothing can be redrawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from gossamer.cli.terminal import plain
from gossamer.report.words import show_duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

WORTH_A_LINE = 2.0  # seconds: a stage that took less leaves nothing behind
BETWEEN_LINES = 15.0  # seconds between two lines of one stage


class PlainProgress:
    """Write progress as lines: a stage when it begins, every few seconds after that, and when it ends."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    @contextmanager
    def stage(self, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Open a piece of work of `total` units; what is yielded takes the units done since the last call."""
        begun = shown = self._clock()
        done = 0.0

        def advance(units: float) -> None:
            nonlocal done, shown
            done += units
            now = self._clock()
            if now - shown >= BETWEEN_LINES:
                shown = now
                self._write(f"{label}: {how_far(done, total, now - begun)}")

        self._write(f"{label} ...")
        yield advance
        if (seconds := self._clock() - begun) >= WORTH_A_LINE:
            self._write(f"{label}: done in {show_duration(seconds)}")

    def say(self, message: str) -> None:
        """Write one line."""
        self._write(message)

    def record(self, series: str, step: int, values: Mapping[str, float | str]) -> None:
        """Draw nothing of numbers that are for trackers."""

    def _write(self, line: str) -> None:
        print(plain(line), file=self._stream, flush=True)


class Bars:
    """Draw progress as bars with the time left; a finished stage that took a while leaves a line."""

    def __init__(self, progress: RichProgress) -> None:
        self._progress = progress

    @contextmanager
    def stage(self, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Open a piece of work of `total` units; what is yielded takes the units done since the last call."""
        task = self._progress.add_task(plain(label), total=total)
        begun = time.monotonic()
        try:
            yield lambda units: self._progress.advance(task, units)
        finally:
            self._progress.remove_task(task)
        if (seconds := time.monotonic() - begun) >= WORTH_A_LINE:
            self.say(f"{label}: {show_duration(seconds)}")

    def say(self, message: str) -> None:
        """Write one line above the bars."""
        self._progress.console.print(plain(message), markup=False, highlight=False, emoji=False)

    def record(self, series: str, step: int, values: Mapping[str, float | str]) -> None:
        """Draw nothing of numbers that are for trackers."""


@contextmanager
def bars(stream: TextIO) -> Iterator[Bars]:
    """Draw bars on a terminal until the block ends; the terminal is left as it was, also after an error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield Bars(progress)


def how_far(done: float, total: float | None, seconds: float) -> str:
    """Say how far work is and how long the rest takes at the pace so far: `40 %, about 30 s left`."""
    if not total:
        return f"{done:g} done after {show_duration(seconds)}"
    share = min(done / total, 1.0)
    left = f", about {show_duration(seconds * (1 - share) / share)} left" if share > 0 else ""
    return f"{share * 100:.0f} %{left}"
