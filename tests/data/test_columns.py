"""Columns are found by name, then by content; what is not clear is an error that names the columns and the flag."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.data import PLACE, bind_columns, choose_columns, read_rows
from gossamer.data.table import Table
from gossamer.errors import DataError
from gossamer.tasks import get_task

TEXT = get_task("text-classification")


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"text": "a", "label": 1}, {"text": "text", "label": "label"}),
        ({"Sentence": "a", "LABEL": 1}, {"text": "Sentence", "label": "LABEL"}),
        ({"text": "a", "message": "b", "y": 1}, {"text": "text", "label": "y"}),
        (
            {"sentence1": "a", "sentence2": "b", "label": 1},
            {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        ),
        ({"id": 7, "mail": "a", "class": "x"}, {"text": "mail", "label": "class"}),
    ],
)
def test_guesses(row: dict[str, Any], chosen: dict[str, str]) -> None:
    assert choose_columns(read_rows([row]), TEXT, {}) == chosen


def test_overrides_win_and_free_the_guess() -> None:
    table = read_rows([{"text": "a", "review": "b", "label": 0, "stars": 5}])
    assert choose_columns(table, TEXT, {"text": "review", "label": "stars"}) == {"text": "review", "label": "stars"}


@pytest.mark.parametrize(
    ("row", "says", "hint"),
    [
        (
            {"review": "a", "body": "b", "label": 1},
            "several columns may be the text: review, body",
            "--column text=NAME",
        ),
        ({"one": "a", "two": "b", "label": 1}, "several columns may be the text: one, two", "--column text=NAME"),
        ({"text": "a", "mood": 1}, "no column is the label; found text, mood", "--column label=NAME"),
        ({"number": 3, "label": 1}, "no column is the text; found number, label", "--column text=NAME"),
    ],
)
def test_unclear_columns(row: dict[str, Any], says: str, hint: str) -> None:
    with pytest.raises(DataError) as error:
        bind_columns(read_rows([row]), TEXT)
    assert says in error.value.message
    assert hint in error.value.hint


def test_wrong_overrides() -> None:
    table = read_rows([{"text": "a", "label": 1}])
    with pytest.raises(DataError, match="no column 'words'; found text, label"):
        bind_columns(table, TEXT, {"text": "words"})
    with pytest.raises(DataError, match="no column role 'txt'"):
        bind_columns(table, TEXT, {"txt": "text"})


def test_optional_label() -> None:
    rows = bind_columns(read_rows([{"text": "a"}]), TEXT, optional=("label",))
    assert rows == [{"text": "a", PLACE: "rows in memory, row 1"}]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"text": "", "label": 1}, "row 2: the text (column 'text') is empty"),
        ({"text": " \n", "label": 1}, "row 2: the text (column 'text') is empty"),
        ({"text": None, "label": 1}, "row 2: the text (column 'text') is empty"),
        ({"text": 5, "label": 1}, "row 2: the text (column 'text') is a int, not text"),
        ({"text": "b", "label": None}, "row 2: the label (column 'label') is missing"),
        ({"text": "b", "label": float("nan")}, "row 2: the label (column 'label') is missing"),
        ({"text": "b"}, "row 2: the label (column 'label') is missing"),
    ],
)
def test_a_bad_cell_names_its_row(second: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as error:
        bind_columns(read_rows([{"text": "a", "label": 0}, second], name="mails"), TEXT)
    assert f"mails, {says}" in error.value.message


def test_class_names_come_along() -> None:
    table = Table("t", [{"img": b"1", "label": 1}], ["img", "label"], "", class_names={"label": ("cat", "dog")})
    image = get_task("image-classification")
    assert bind_columns(table, image) == [{"image": b"1", "label": 1, "label_name": "dog", PLACE: "t, row 1"}]
    table.rows[0]["label"] = 2
    with pytest.raises(DataError, match="t, row 1: label 2 is not one of the 2 classes"):
        bind_columns(table, image)


def test_the_only_image_is_found_by_content() -> None:
    table = read_rows([{"scan": {"bytes": b"1", "path": None}, "target": 0}])
    assert choose_columns(table, get_task("image-classification"), {}) == {"image": "scan", "label": "target"}
