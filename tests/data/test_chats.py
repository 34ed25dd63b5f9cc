"""Conversations as rows hold them: read alike, and told by the turn where one cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gossamer.data.chats import is_turns, read_turns
from gossamer.data.columns import bind_columns, choose_columns
from gossamer.data.rows import read_rows
from gossamer.errors import DataError
from gossamer.tasks import get_task

LM = get_task("causal-lm")
TURNS = [{"role": "user", "content": "What is a code?"}, {"role": "assistant", "content": "The nearest one."}]


@pytest.mark.parametrize(
    "cell",
    [
        TURNS,
        tuple(TURNS),
        json.dumps(TURNS),
        [{"from": "human", "value": "What is a code?"}, {"from": "gpt", "value": "The nearest one."}],
        [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a code?"}]},
         TURNS[1]],
    ],
    ids=["list", "tuple", "json", "from-value", "parts"],
)  # fmt: skip
def test_turns_are_read_alike_however_they_are_written(cell: Any) -> None:
    assert is_turns(cell)
    assert read_turns(cell, "row 1") == TURNS


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("hello", "row 7: the messages are not a list of turns"),
        (["hello"], "row 7: turn 1 is a str, not a mapping"),
        ([TURNS[0], {"content": "x"}], "row 7: turn 2 has no role or no text (found content)"),
        ([{"role": "user", "content": 3}], "row 7: turn 1 has no role or no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "row 7: turn 1 has no role or no text"),
        ([{"role": "user", "content": " "}], "row 7: none of 1 turns says anything"),
    ],
)
def test_a_turn_that_cannot_be_read_is_named(cell: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_turns(cell, "row 7")
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"messages": TURNS}, {"messages": "messages"}),
        ({"conversations": TURNS, "id": "a"}, {"messages": "conversations"}),
        ({"prompt": "Why?", "completion": "So."}, {"prompt": "prompt", "completion": "completion"}),
        ({"instruction": "Why?", "output": "So."}, {"prompt": "instruction", "completion": "output"}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"prompt": "prompt", "completion": "completion"}),
        ({"text": "finished", "messages": TURNS}, {"text": "text"}),  # a text that is there is what is meant
        ({"prompt": "Why?", "content": "So."}, {"text": "content"}),  # half a pair stands in for nothing
    ],
)
def test_columns_that_stand_in_for_a_text(row: dict[str, Any], chosen: dict[str, str]) -> None:
    assert choose_columns(read_rows([row]), LM, {}) == chosen


def test_the_users_choice_wins() -> None:
    row = {"text": "finished", "dialogue": TURNS, "body": "other"}
    assert choose_columns(read_rows([row]), LM, {"text": "body"}) == {"text": "body"}
    del row["text"]
    assert choose_columns(read_rows([row]), LM, {"messages": "dialogue"}) == {"messages": "dialogue"}


def test_bound_rows_hold_turns() -> None:
    (row,) = bind_columns(read_rows([{"conversations": json.dumps(TURNS)}]), LM)
    assert row["messages"] == TURNS
    with pytest.raises(DataError, match="row 2: turn 1 has no role"):
        bind_columns(read_rows([{"messages": TURNS}, {"messages": [{"content": "x"}]}]), LM)


def test_rows_that_say_nothing_are_left_out_where_that_is_asked_for() -> None:
    rows = [{"text": "one"}, {"text": " "}, {"text": None}, {"text": "two"}, {"text": ""}]
    skipped: list[str] = []
    assert [row["text"] for row in bind_columns(read_rows(rows), LM, skipped=skipped)] == ["one", "two"]
    assert skipped == ["rows in memory, row 2", "rows in memory, row 3", "rows in memory, row 5"]
    with pytest.raises(DataError, match="row 2: the text"):
        bind_columns(read_rows(rows), LM)
    with pytest.raises(DataError, match="all 2 rows are empty"):
        bind_columns(read_rows(rows[1:3]), LM, skipped=[])
