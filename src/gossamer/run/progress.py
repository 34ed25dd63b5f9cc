"""How long work reports how far it is. The command line draws bars from it; functions stay silent by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receive progress. `stage` opens a piece of work of `total` units (None = unknown) and yields `advance`."""

    def stage(self, label: str, total: float | None = None) -> AbstractContextManager[Callable[[float], None]]:
        """Open a piece of work; call what it yields with the number of units done since the last call."""

    def say(self, message: str) -> None:
        """Report one line: a decision, a finished candidate, a warning."""

    def record(self, series: str, step: int, values: Mapping[str, float | str]) -> None:
        """Report numbers of a series at one step (losses of a training, a candidate's figures), for trackers."""


class Silent:
    """Report nothing."""

    @contextmanager
    def stage(self, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Do nothing with the units that are reported."""
        yield lambda units: None

    def say(self, message: str) -> None:
        """Do nothing with the message."""

    def record(self, series: str, step: int, values: Mapping[str, float | str]) -> None:
        """Do nothing with the numbers."""
