"""Calibration rows before they are used: kept apart from the evaluation rows, looked through, and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gossamer.data.checks import Finding, Text, check_texts, finding
from gossamer.data.overlap import SHINGLE, Passages, said
from gossamer.data.splits import loose_key
from gossamer.data.table import place_of
from gossamer.errors import DataError
from gossamer.run.progress import Progress
from gossamer.tasks.base import Batch, Row, Written
from gossamer.tasks.chat import in_words

if TYPE_CHECKING:
    from gossamer.plan.prepare import Prepared

NUM_JUDGING = 128  # evaluation rows that calibration rows are compared with


def kept_apart(
    chosen: Sequence[Row], others: Sequence[Row], evaluation: Sequence[Row], findings: list[Finding]
) -> list[Row]:
    """Return as many calibration rows as were chosen, without those that say what evaluation rows say.

    A row is dropped when it is one of them but for case and white space, or shares a passage of SHINGLE words with one;
    the next of the others takes its place. What was dropped is added to `findings`. Raises DataError when none is left.
    """
    same = _says_the_same(evaluation)
    kept: list[Row] = []
    dropped: list[str] = []
    for number, row in enumerate((*chosen, *others)):
        if len(kept) == len(chosen):
            break
        if same(row):
            dropped.append(place_of(row, number))
        else:
            kept.append(row)
    if dropped:
        what = f"share {SHINGLE} words in a row with evaluation rows and are not used"
        findings.append(finding("overlap", "warning", dropped, len(kept) + len(dropped), what))
    if dropped and not kept:
        raise DataError(
            f"all {len(dropped)} rows to calibrate with share {SHINGLE} words in a row with evaluation rows",
            "give other rows with --data",
        )
    return kept


def apart(rows: Sequence[Row], evaluation: Sequence[Row]) -> list[Row]:
    """Return the rows that do not say what evaluation rows say."""
    same = _says_the_same(evaluation)
    return [row for row in rows if not same(row)]


def _says_the_same(evaluation: Sequence[Row]) -> Callable[[Row], bool]:
    keys = {loose_key(row) for row in evaluation}
    passages = Passages([said(row) for row in evaluation])
    return lambda row: loose_key(row) in keys or passages.stand_in(said(row))


def check_calibration(prepared: Prepared, calibration: Sequence[Batch], progress: Progress) -> tuple[Finding, ...]:
    """Return what is wrong with the calibration rows, and report it, with what was done to conversations."""
    found = list(prepared.findings)
    task, source = prepared.task, prepared.source
    rows = task.written(prepared.calibration, source)
    if rows:
        if words := in_words([row.form for row in rows], source.name):
            progress.say(words)
        judging = prepared.evaluation[:NUM_JUDGING]
        used = sum(batch.inputs["input_ids"].size for batch in calibration)
        texts = list(_texts(rows, prepared.calibration))
        found += check_texts(texts, list(_texts(task.written(judging, source), judging)), used)
    for one in found:
        progress.say(f"{one.level}: {one.says}")
    return tuple(found)


def _texts(written: Sequence[Written], rows: Sequence[Row]) -> Iterator[Text]:
    for index, (one, row) in enumerate(zip(written, rows, strict=False)):
        yield Text(one.text, one.num_tokens, one.limit, place_of(row, index), one.fills)
