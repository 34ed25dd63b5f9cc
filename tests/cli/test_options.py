"""Options with a grammar: typed settings, columns, durations."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.cli.options import OptionError, read_columns, read_settings, read_time
from gossamer.errors import DataError, GoalError


def test_settings_are_typed_by_how_they_look() -> None:
    given_settings = [
        "max_length=64",
        "p=1e-3",
        "lower=true",
        "name=plain text",
        "list=[1, 2]",
        "eq=a=b",
        'quoted="64"',
    ]
    assert read_settings(given_settings) == {
        "max_length": 64, "p": 0.001, "lower": True, "name": "plain text", "list": [1, 2], "eq": "a=b", "quoted": "64",
    }  # fmt: skip


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(min_size=1), st.lists, max_leaves=5))
def test_a_setting_written_as_json_reads_back(value: object) -> None:
    assert read_settings([f"key={json.dumps(value)}"]) == {"key": value}


@pytest.mark.parametrize("pair", ["max_length", "=64", "max_length="])
def test_a_setting_without_both_sides_is_refused(pair: str) -> None:
    with pytest.raises(OptionError, match="not KEY=VALUE"):
        read_settings([pair])


def test_columns_keep_names_as_they_are_and_refuse_doubles() -> None:
    assert read_columns(["text=mail body", "label= y"]) == {"text": "mail body", "label": " y"}
    assert read_columns(None) == {}
    with pytest.raises(DataError, match="given twice"):
        read_columns(["text=a", "text=b"])


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30min", 1800), ("1.5h", 5400), (None, None)])
def test_durations_are_those_of_the_goal(text: str | None, seconds: float | None) -> None:
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["90", "soon", "-3s", "1h, size <= 3MB"])
def test_what_is_not_one_duration_is_refused(text: str) -> None:
    with pytest.raises(GoalError):
        read_time(text)
