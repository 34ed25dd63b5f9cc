"""Whether a training gained anything on the rows held back: losses of the same rows in pairs, and an interval.

Rows are judged in parts of a few; the loss of a part before less its loss after is what it gained. A gain counts where
the lower bound of its mean lies above zero, by the bootstrap that the verdict rests on (`measure/statistics.py`): where
nothing was learned, a mean alone is lower in half of all cases. Of few parts an interval says next to nothing, and the
mean is all there is. A training ends when so many looks in a row found no gain over the last one that did.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gossamer.measure.statistics import score_interval
from gossamer.run.atomic import write_text
from gossamer.tasks.base import Scores

FILE = "patience.json"
PARTS = 64  # of the rows held back, where there are so many: what an interval can be told from
FEWEST = 32  # parts that an interval is told from
RESAMPLES = 2000


@dataclass(frozen=True)
class Judged:
    """Hold the mean loss of rows held back, and the losses of parts of them, in their order."""

    loss: float
    parts: tuple[float, ...]

    def gained_on(self, before: Judged) -> bool:
        """Say whether these losses are lower than others for certain; of other parts, and of few, on average.

        >>> Judged(0.9, (0.8, 1.0)).gained_on(Judged(1.0, (0.9, 1.1)))
        True
        """
        if not math.isfinite(self.loss):
            return False
        if len(self.parts) != len(before.parts) or len(self.parts) < FEWEST:
            return self.loss < before.loss
        gains = np.subtract(before.parts, self.parts, dtype=np.float64)
        if not np.isfinite(gains).all():
            return self.loss < before.loss
        scores = Scores(sums=gains, weights=np.ones_like(gains))
        return score_interval(scores, resamples=RESAMPLES).low > 0


def rows_of_a_part(rows: int, at_once: int) -> int:
    """Return how many rows are judged together: few enough for PARTS parts, and no more than fit.

    Where there are too few for an interval, as many as fit: only their mean is looked at.

    >>> rows_of_a_part(256, 16), rows_of_a_part(40, 16), rows_of_a_part(256, 2), rows_of_a_part(16, 8)
    (4, 1, 2, 8)
    """
    return at_once if rows < FEWEST else max(1, min(at_once, rows // PARTS))


@dataclass
class Patience:
    """Count looks at rows held back since the last that found a gain."""

    most: int
    best: Judged | None = None
    without: int = field(default=0)

    def is_over(self, found: Judged) -> bool:
        """Look once more; say whether it was in vain too often."""
        if self.best is None or found.gained_on(self.best):
            self.best, self.without = found, 0
        else:
            self.without += 1
        return self.without >= self.most

    def write(self, folder: Path) -> None:
        """Keep it beside a checkpoint."""
        best = {"loss": self.best.loss, "parts": self.best.parts} if self.best is not None else None
        write_text(folder / FILE, json.dumps({"best": best, "without": self.without}) + "\n")

    def read(self, folder: Path) -> None:
        """Go on from what was kept, where there is something."""
        if not (folder / FILE).exists():
            return
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
        best = known["best"]
        self.best = Judged(best["loss"], tuple(best["parts"])) if best is not None else None
        self.without = int(known["without"])
