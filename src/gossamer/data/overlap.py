"""Passages that two sets of texts share: what was calibrated with must not be what quality is judged on.

A text becomes words (letters and digits, without case and punctuation; each ideograph is a word). A passage is SHINGLE
words in a row, known by a polynomial over the words' numbers modulo 2^64,

    h_i = sum_j w_(i+j) B^(SHINGLE-1-j)

computed for all positions at once. Two texts share a passage where they share an h; with 64 bits an accident is less
likely than 1 in 10^6 for texts of a million words each. A passage that stands in many of the judging texts is
boilerplate (a footer, a licence), not a leak, and does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.data.splits import NOT_CONTENT

SHINGLE = 50
BOILERPLATE = 3  # judging texts, at least; and a share of BOILERPLATE_SHARE of them
BOILERPLATE_SHARE = 0.02
WORD = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W_]+")
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no factor is lost


class Passages:
    """Hold the passages of the judging texts, and find them in others.

    >>> judging = Passages(["so: " + " ".join(map(str, range(5, 70)))])
    >>> judging.stand_in(" ".join(map(str, range(60)))), judging.stand_in("so: 5 6 7")
    (True, False)
    """

    def __init__(self, judging: Sequence[str]) -> None:
        self._numbers: dict[str, int] = {}
        self._leaks = _leaks([_passages(text, self._numbers) for text in judging])

    def stand_in(self, text: str) -> bool:
        """Say whether a text shares a passage of SHINGLE words with a judging text."""
        if not self._leaks.size:
            return False
        found = _passages(text, self._numbers)
        nearest = np.searchsorted(self._leaks, found).clip(max=self._leaks.size - 1)  # they are sorted
        return bool((self._leaks[nearest] == found).any())


def said(row: Mapping[str, Any]) -> str:
    """Return all text of a row but its label and its place: what is looked through for shared passages."""
    return "\n".join(_strings([cell for column, cell in row.items() if column not in NOT_CONTENT]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([part for name, part in value.items() if name != "role"])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def words_of(text: str) -> list[str]:
    """Return a text's words: letters and digits without case; each ideograph is one."""
    return WORD.findall(text.casefold())


def _passages(text: str, numbers: dict[str, int]) -> NDArray[np.uint64]:
    """Return the distinct passages of a text; a word's number is the place at which it was first seen."""
    seen = [numbers.setdefault(word, len(numbers) + 1) for word in words_of(text)]
    if len(seen) < SHINGLE:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        # spread over 64 bits: small numbers in a row would collide
        word_T = _mixed(np.array(seen, dtype=np.uint64))
        count = len(seen) - SHINGLE + 1
        hash_P = np.zeros(count, dtype=np.uint64)
        for place in range(SHINGLE):
            hash_P = hash_P * BASE + word_T[place : place + count]
    return np.unique(hash_P)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return values with every bit depending on every other (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _leaks(judging: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Return the passages of the judging texts that are no boilerplate."""
    if not judging:
        return np.zeros(0, dtype=np.uint64)
    passages, counts = np.unique(np.concatenate(judging), return_counts=True)
    most = max(BOILERPLATE, BOILERPLATE_SHARE * len(judging))
    return passages[counts < most]
