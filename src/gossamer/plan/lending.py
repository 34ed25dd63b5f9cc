"""An artifact that is opened once and lent to several measurements, one after another.

Most of what a short measurement takes is the start of its process: importing PyTorch and transformers takes longer than
timing a small encoder. Between uses the process is stopped, so it costs memory and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from gossamer.runtimes.process import Served


class Lent:
    """Hold what was opened last, to be lent again to who asks for the same.

    >>> lent = Lent()
    >>> with lent.out(folder, lambda: job.serve(folder)) as served:  # doctest: +SKIP
    ...     served.run(inputs)
    """

    def __init__(self) -> None:
        self._served: Served | None = None
        self._key: Hashable = None

    @contextmanager
    def out(self, key: Hashable, start: Callable[[], Served]) -> Iterator[Served]:
        """Lend what `start` opens, or what it opened before under this key; stopped when it comes back.

        It is closed where the borrower fails, since nothing then says in what state it is, and opened anew where it
        ended while it stood by (a system short of memory ends such processes first).
        """
        if self._served is None or self._key != key or self._served.ended:
            self.close()
            self._served, self._key = start(), key
        served = self._served
        try:
            yield served
        except BaseException:
            self.close()
            raise
        served.pause()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._served is not None:
            self._served.close()
            self._served = None
