"""From what a user names to rows that are split, bound and hashed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import DataError
from gossamer.plan.prepare import Inputs, identity, prepare


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def inputs(tiny: Path) -> Inputs:
    train, test = rows_of(tiny / "train.jsonl"), rows_of(tiny / "test.jsonl")
    return Inputs(model=tiny / "model", task="text-classification", data=train, evaluation=test, calibration_rows=24)


def texts(rows: list[Any]) -> set[str]:
    return {row["text"] for row in rows}


def test_calibration_rows_are_never_among_those_that_decide(inputs: Inputs) -> None:
    assert isinstance(inputs.data, list)
    assert isinstance(inputs.evaluation, list)
    overlapping = replace(inputs, data=inputs.data[:30] + inputs.evaluation[:60])
    prepared = prepare(overlapping)
    assert len(prepared.calibration) == 24
    assert texts(prepared.calibration) <= texts(inputs.data)
    assert texts(prepared.evaluation) == texts(inputs.evaluation)
    with pytest.raises(DataError, match=r"all 60 rows of .* also occur in"):
        prepare(replace(inputs, data=inputs.evaluation[:60]))


def test_without_held_out_rows_half_of_the_data_decides(inputs: Inputs) -> None:
    prepared = prepare(replace(inputs, evaluation=None))
    assert not texts(prepared.calibration) & texts(prepared.evaluation)
    assert len(prepared.evaluation) == pytest.approx(96 / 2, abs=12)
    assert prepared.names["evaluation"].endswith("(held-out half)")


def test_too_few_rows_cannot_decide(inputs: Inputs) -> None:
    assert isinstance(inputs.evaluation, list)
    with pytest.raises(DataError, match="7 evaluation rows cannot support a verdict: at least 8 are needed"):
        prepare(replace(inputs, evaluation=inputs.evaluation[:7]))
    assert len(prepare(replace(inputs, evaluation_rows=9)).evaluation) == 9


def test_a_smaller_choice_of_rows_does_not_hang_on_their_order(inputs: Inputs) -> None:
    assert isinstance(inputs.evaluation, list)
    few = replace(inputs, evaluation_rows=20)
    turned = replace(few, evaluation=inputs.evaluation[::-1])
    assert texts(prepare(few).evaluation) == texts(prepare(turned).evaluation)
    assert prepare(few).prints["calibration"] == prepare(turned).prints["calibration"]


def test_the_identity_of_a_run_names_what_makes_it_another(inputs: Inputs) -> None:
    assert isinstance(inputs.data, list)
    before = identity(inputs, prepare(inputs), goal="size <= 30%")
    other = replace(inputs, data=[{**inputs.data[0], "text": "w1 w2"}, *inputs.data[1:]])
    after = identity(other, prepare(other), goal="size <= 30%")
    assert {name for name in before if before[name] != after[name]} == {"data"}
    seeded = replace(inputs, seed=1)
    assert identity(seeded, prepare(seeded), goal="size <= 30%")["seed"] != before["seed"]
    assert identity(inputs, prepare(inputs), goal="size <= 40%")["goal"] != before["goal"]
