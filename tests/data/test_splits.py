"""Splits share no content, use every row, and do not depend on the order of the file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.data import row_key, split_rows, without_overlap
from gossamer.data.splits import Splits
from gossamer.errors import DataError

texts = st.text(alphabet="abc \n", min_size=1, max_size=4).filter(str.strip)
labelled = st.builds(lambda text, label: {"text": text, "label": label}, texts, st.integers(0, 1))


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": number % 2, "place": f"row {number + 1}"} for number in range(count)]


def parts(splits: Splits) -> list[list[Any]]:
    return [splits.calibration, splits.train, splits.validate, splits.test]


def plain(rows: list[Any]) -> list[tuple[str, int]]:
    return [(" ".join(row["text"].split()), row["label"]) for row in rows]


@settings(max_examples=30, deadline=None)
@given(st.lists(labelled, min_size=30, max_size=60), st.randoms(use_true_random=False))
def test_disjoint_complete_and_stable(rows: list[dict[str, Any]], shuffler: random.Random) -> None:
    sizes = {"calibration": 0.1, "test": 0.2, "validate": 0.0}
    try:
        splits = split_rows(rows, sizes=sizes)
    except DataError:
        assert len({row["text"].strip() for row in rows}) < len(rows)  # only duplicates can stand in the way
        return
    seen = [{" ".join(row["text"].split()) for row in part} for part in parts(splits)]
    for first in range(4):
        for second in range(first):
            assert not seen[first] & seen[second]
    assert sorted(plain([row for part in parts(splits) for row in part])) == sorted(plain(rows))
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert [plain(part) for part in parts(split_rows(shuffled, sizes=sizes))] == [plain(part) for part in parts(splits)]


def test_exact_sizes_and_the_rest() -> None:
    splits = split_rows(numbered(100), sizes={"calibration": 16, "validate": 7, "test": 0.25})
    assert [len(part) for part in parts(splits)] == [16, 52, 7, 25]
    assert [len(part) for part in parts(split_rows(numbered(100)))] == [10, 50, 10, 30]
    assert [len(part) for part in parts(split_rows(numbered(3), sizes={"test": 0.01}))] == [0, 2, 0, 1]


def test_the_order_is_not_that_of_the_file() -> None:
    test = [int(row["text"].split()[1]) for row in split_rows(numbered(1000)).test]
    assert test != sorted(test)
    assert 430 < sum(test) / len(test) < 570  # a fair draw from 0 to 999: standard error 14


def test_white_space_labels_and_places_do_not_tell_rows_apart() -> None:
    key = row_key({"text": "one two"})
    assert key == row_key({"text": " one\n  two ", "label": 3, "place": "row 9"})
    assert key != row_key({"text": "one two", "text_pair": "three"})
    assert key != row_key({"text": "One two"})
    assert row_key({"text": "caf\u00e9"}) == row_key({"text": "cafe\u0301"})
    assert row_key({"text": "\ud800"}) != key  # a lone surrogate, as json may carry


def test_an_image_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    path.write_bytes(b"pixels")
    keys = {row_key({"image": cell}) for cell in (b"pixels", {"bytes": b"pixels", "path": "x"}, path)}
    assert len(keys) == 1
    assert row_key({"image": b"other"}) not in keys


def test_too_few_rows() -> None:
    with pytest.raises(DataError, match=r"10 rows, but 12 are needed \(4 test, 8 calibration\)"):
        split_rows(numbered(10), sizes={"calibration": 8, "test": 4})
    same = [{"text": "same", "label": 0}] * 10
    with pytest.raises(DataError, match="3 test rows are asked for, but only 0"):
        split_rows(same, sizes={"test": 0.3})
    with pytest.raises(DataError, match="6 test rows are asked for, but only 1"):
        split_rows([*same, {"text": "other", "label": 1}], sizes={"test": 6})


@pytest.mark.parametrize("sizes", [{"tests": 3}, {"test": -1}, {"test": 1.0}])
def test_sizes_that_mean_nothing(sizes: dict[str, float]) -> None:
    with pytest.raises(DataError):
        split_rows(numbered(10), sizes=sizes)


@settings(max_examples=40, deadline=None)
@given(st.lists(labelled, max_size=20), st.lists(labelled, max_size=20))
def test_without_overlap(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    kept, dropped = without_overlap(rows, others)
    evaluated = {" ".join(row["text"].split()) for row in others}
    assert plain(kept) == [pair for pair in plain(rows) if pair[0] not in evaluated]
    assert dropped == len(rows) - len(kept)
