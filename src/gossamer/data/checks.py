"""What is wrong with the rows that a model is calibrated on: told with counts and the first places, before hours go by.

    duplicates   equal but for white space and case
    constant     text that zlib packs to less than CONSTANT of its bytes: one line again and again
    truncated    rows with more tokens than the model is given of them, and the share of tokens that is lost
    short        rows of far fewer tokens than fit, when they are most of them
    language     rows in another script, or in other words, than those that quality is judged on

The language of a row is not guessed: it is compared with the judging rows themselves. A script (read from the Unicode
name of each letter) is foreign when they hardly use it. Among those of its own script a row is foreign when both
    - few of its words are among the judging rows' FREQUENT most frequent ones (in any language these are a third to a
      half of a text, and hardly any of them are shared between two languages), and
    - it takes clearly more or fewer tokens a character than they do, as the tokenizer was made for one of the two.
Each threshold follows how far the judging rows differ among themselves. What was left out: models that guess languages.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np

from gossamer.data.overlap import words_of
from gossamer.errors import DataError

CONSTANT = 0.1
SHORT, MOSTLY = 0.125, 0.5  # share of the tokens that fit; share of the rows
FOREIGN_SHARE = 0.01  # of the judging rows' letters: a script below it is foreign to them
MIN_LETTERS, MIN_WORDS, MIN_BYTES = 20, 30, 400  # a row of less says too little
READ = 20_000  # characters of a row that are looked at
FREQUENT = 100
FEWER_WORDS, OTHER_TOKENS = 0.35, 1.15  # of the judging rows' median; the latter as a factor either way
NUM_NAMED = 3


@dataclass(frozen=True)
class Text:
    """Hold one row as the checks see it: its text, its tokens, how many tokens fit, and where it stands.

    `fills` says that rows are meant to be as long as fits.
    """

    text: str
    num_tokens: int
    limit: int
    place: str
    fills: bool = False


@dataclass(frozen=True)
class Finding:
    """Hold what is wrong with some rows: how many of how many, the first of them, and a sentence that says it all."""

    kind: Literal["empty", "duplicates", "constant", "truncated", "short", "language", "overlap"]
    level: Literal["note", "warning"]
    count: int
    of: int
    first: tuple[str, ...]
    says: str


def finding(kind: str, level: str, places: Sequence[str], of: int, what: str, remedy: str = "") -> Finding:
    """Return a finding whose sentence counts the rows and names the first.

    >>> finding("empty", "warning", ["a.csv, line 13", "a.csv, line 3"], 9, "are empty").says
    '2 of 9 calibration rows are empty (a.csv, line 3, line 13)'
    """
    first = tuple(sorted(places, key=_numbers)[:NUM_NAMED])
    files = {place.rpartition(", ")[0] for place in first}
    named = [first[0], *(place.rpartition(", ")[2] for place in first[1:])] if len(files) == 1 else list(first)
    more = ", ..." if len(places) > NUM_NAMED else ""
    says = f"{len(places)} of {of} calibration rows {what} ({', '.join(named)}{more})"
    says += f": {remedy}" if remedy else ""
    return Finding(kind, level, len(places), of, first, says)  # type: ignore[arg-type]


def _numbers(place: str) -> tuple[str, int]:
    """Return a place's words and its number, to sort by: line 9 stands before line 10."""
    words, _, number = place.rpartition(" ")
    return (words, int(number)) if number.isdigit() else (place, 0)


def check_texts(rows: Sequence[Text], judging: Sequence[Text], used_tokens: int) -> list[Finding]:
    """Return what is wrong with calibration rows, of whose tokens `used_tokens` reach the model.

    `judging` are the rows that quality is judged on. Raises DataError when no row tells anything.
    """
    found = [_duplicates(rows), _constant(rows), _truncated(rows, used_tokens), _short(rows), _language(rows, judging)]
    return [finding for finding in found if finding is not None]


def _duplicates(rows: Sequence[Text]) -> Finding | None:
    seen: set[str] = set()
    places = []
    for row in rows:
        key = loose(row.text)
        if key in seen:
            places.append(row.place)
        seen.add(key)
    if not places:
        return None
    return finding("duplicates", "warning", places, len(rows), "say what an earlier one says", "they add nothing")


def loose(text: str) -> str:
    """Return a text without case and without what its white space is."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _constant(rows: Sequence[Text]) -> Finding | None:
    places = [row.place for row in rows if is_constant(row.text)]
    if not places:
        return None
    if len(places) == len(rows):
        raise DataError(f"all {len(rows)} calibration rows repeat themselves over and over", "give rows of real use")
    return finding("constant", "warning", places, len(rows), "repeat themselves over and over", "leave them out")


def is_constant(text: str) -> bool:
    """Say whether a text is so uniform that it tells hardly anything."""
    content = text[:READ].encode("utf-8", "surrogatepass")
    return len(content) >= MIN_BYTES and len(zlib.compress(content, 6)) < CONSTANT * len(content)


def _truncated(rows: Sequence[Text], used_tokens: int) -> Finding | None:
    places = [row.place for row in rows if row.num_tokens > row.limit]
    if not places:
        return None
    lost = max(0.0, 1 - used_tokens / sum(row.num_tokens for row in rows))
    what = f"are longer than the {rows[0].limit} tokens that fit; {lost:.0%} of all tokens are not used"
    return finding("truncated", "note", places, len(rows), what)


def _short(rows: Sequence[Text]) -> Finding | None:
    places = [row.place for row in rows if row.fills and row.num_tokens < SHORT * row.limit]
    if not places or len(places) < MOSTLY * len(rows):
        return None
    typical = int(np.median([row.num_tokens for row in rows]))
    what = f"are much shorter than the {rows[0].limit} tokens that fit (the median is {typical})"
    return finding("short", "warning", places, len(rows), what, "give longer rows, or a context like theirs")


def _language(rows: Sequence[Text], judging: Sequence[Text]) -> Finding | None:
    places = [row.place for row, foreign in zip(rows, foreign_rows(rows, judging), strict=True) if foreign]
    if not places:
        return None
    what = "are in another script or language than the rows that quality is judged on"
    return finding("language", "warning", places, len(rows), what, "calibrate with rows like those that will be served")


def foreign_rows(rows: Sequence[Text], judging: Sequence[Text]) -> list[bool]:
    """Say of each row whether it is in another script or language than the judging rows."""
    usual = _total(scripts(row.text) for row in judging)
    letters = sum(usual.values())
    if not letters:
        return [False] * len(rows)
    familiar = {script for script, count in usual.items() if count >= FOREIGN_SHARE * letters}
    by_script: dict[str, list[Text]] = {}
    for row in judging:
        by_script.setdefault(_main_script(row.text), []).append(row)
    words = {script: _Words(alike) for script, alike in by_script.items()}

    def foreign(row: Text) -> bool:
        script = _main_script(row.text)
        return _in_other_script(row.text, familiar) or (script in words and words[script].foreign(row))

    return [foreign(row) for row in rows]


def _main_script(text: str) -> str:
    """Return the script of most letters of a text; empty where it has none."""
    return next((script for script, _ in scripts(text).most_common(1)), "")


def _in_other_script(text: str, familiar: set[str]) -> bool:
    found = scripts(text)
    letters = sum(found.values())
    strange = sum(count for script, count in found.items() if script not in familiar)
    return letters >= MIN_LETTERS and strange > letters / 2


def scripts(text: str) -> Counter[str]:
    """Count a text's letters by script.

    >>> scripts("Ab д")
    Counter({'LATIN': 2, 'CYRILLIC': 1})
    """
    counts: Counter[str] = Counter()
    for character, count in Counter(text[:READ]).items():
        script = _script(character)
        if script:
            counts[script] += count
    return counts


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """Return the script of a letter: the first word of its name; empty for what is no letter."""
    if not character.isalpha():
        return ""
    script = unicodedata.name(character, "").partition(" ")[0]
    # Japanese mixes three scripts in one sentence, Chinese borrows one of them
    return "CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC") else script


class _Words:
    """Tell rows of other words, and of other tokens for them, than the judging rows have."""

    def __init__(self, judging: Sequence[Text]) -> None:
        words = [words_of(row.text[:READ]) for row in judging]
        self.frequent = {word for word, _ in Counter(chain.from_iterable(words)).most_common(FREQUENT)}
        known = [row for row, found in zip(judging, words, strict=True) if len(found) >= MIN_WORDS]
        shares = [self.share(row.text) for row in known]
        rates = [fertility(row) for row in known]
        self.least = min(FEWER_WORDS * float(np.median(shares)), float(np.quantile(shares, 0.02))) if known else 0.0
        self.rate = float(np.median(rates)) if known else 0.0

    def share(self, text: str) -> float:
        """Return the share of a text's words that are frequent among the judging rows."""
        words = words_of(text[:READ])
        return sum(word in self.frequent for word in words) / max(1, len(words))

    def foreign(self, row: Text) -> bool:
        """Say whether a row has few of the frequent words, and other tokens a character."""
        if len(words_of(row.text[:READ])) < MIN_WORDS or self.share(row.text) >= self.least:
            return False
        return not self.rate / OTHER_TOKENS <= fertility(row) <= self.rate * OTHER_TOKENS


def fertility(row: Text) -> float:
    """Return the tokens that a character of a row takes."""
    return row.num_tokens / max(1, len(row.text))


def _total(counts: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total += one
    return total
