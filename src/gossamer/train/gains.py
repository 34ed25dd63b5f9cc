"""Whether a training gained anything on the rows held back: losses of the same rows in pairs, and an interval.

The loss of a row before less its loss after is what it gained. A gain counts where the lower bound of its mean lies
above zero, by the bootstrap that the verdict rests on (`measure/statistics.py`): where nothing was learned, a mean
alone is lower in half of all cases. Of few rows an interval says next to nothing, and the mean is all there is. A
training ends when so many looks in a row found no gain over the last one that did.
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
FEWEST = 32  # rows that an interval is told from
RESAMPLES = 2000


@dataclass(frozen=True)
class Judged:
    """Hold the mean loss of rows held back, and the loss of each, in their order."""

    loss: float
    rows: tuple[float, ...]

    def gained_on(self, before: Judged) -> bool:
        """Say whether these losses are lower than others for certain; of other rows, and of few, on average.

        >>> Judged(0.9, (0.8, 1.0)).gained_on(Judged(1.0, (0.9, 1.1)))
        True
        """
        if not math.isfinite(self.loss):
            return False
        if len(self.rows) != len(before.rows) or len(self.rows) < FEWEST:
            return self.loss < before.loss
        gains = np.subtract(before.rows, self.rows, dtype=np.float64)
        if not np.isfinite(gains).all():
            return self.loss < before.loss
        scores = Scores(sums=gains, weights=np.ones_like(gains))
        return score_interval(scores, resamples=RESAMPLES).low > 0


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
        best = {"loss": self.best.loss, "rows": self.best.rows} if self.best is not None else None
        write_text(folder / FILE, json.dumps({"best": best, "without": self.without}) + "\n")

    def read(self, folder: Path) -> None:
        """Go on from what was kept, where there is something."""
        if not (folder / FILE).exists():
            return
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
        best = known["best"]
        self.best = Judged(best["loss"], tuple(best["rows"])) if best is not None else None
        self.without = int(known["without"])
