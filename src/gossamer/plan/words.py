"""What rows say of a model's vocabulary: how often each token occurs in all of them that a technique may look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gossamer.data.columns import is_token_ids
from gossamer.models.words import Words
from gossamer.plan.calibration import apart
from gossamer.run.progress import Progress
from gossamer.tasks.base import Row

if TYPE_CHECKING:
    from gossamer.plan.prepare import Prepared

ENOUGH = 4  # times as many rows as there are to calibrate with: then the others alone say what the rows hold
ROUND = 256  # rows whose tokens are counted together


def words_of(prepared: Prepared, progress: Progress) -> Words | None:
    """Return what a model reads, and what is counted when somebody asks for it; None without rows.

    Counted are the rows to calibrate with and all others but those held out, also without those that share a passage
    with one. Of texts longer than the task reads only what it reads counts.
    """
    task, source = prepared.task, prepared.source
    if not prepared.calibration:
        return None
    refusal = f"{task.name}: {task.tokens_fixed}" if task.tokens_fixed else ""
    if not refusal and any(is_token_ids(row.get("text")) for row in prepared.calibration):
        refusal = "the rows are numbers of tokens, no texts"

    def count(rows: Sequence[Row]) -> Counter[int]:
        found: Counter[int] = Counter()
        with progress.stage("counting tokens", len(rows)) as advance:
            for start in range(0, len(rows), ROUND):
                part = rows[start : start + ROUND]
                for batch in task.batches(part, source, batch_size=1):
                    found.update(batch.inputs["input_ids"].flatten().tolist())
                advance(len(part))
        return found

    def others() -> list[Row]:
        return apart(prepared.others, prepared.evaluation)

    few = len(prepared.others) < ENOUGH * len(prepared.calibration)
    count_apart = None if few else lambda: count(others())
    return Words(source, lambda: count([*others(), *prepared.calibration]), count_apart, refusal)
