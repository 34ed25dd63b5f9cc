"""A search that repairs: the recipe with `tune_scales` is built, proven and reported like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gossamer.goal import parse_goal
from gossamer.plan import menu, search
from gossamer.plan.candidates import Steps
from gossamer.plan.flow import optimize_run
from gossamer.plan.prepare import Inputs
from gossamer.techniques.quantize.quantize import Quantize

TEXTS = ["the grid holds every weight of a group", "a code is the nearest one on the grid", "what was proven is served"]
ROWS = [{"text": f"{number}: {text}, and {text} again"} for number in range(40) for text in TEXTS]
ROUNDED: Steps = (Quantize(bits=4, group_size=32, symmetric=False),)


@pytest.mark.slow
@pytest.mark.timeout(300)  # processes are started for the original, and for each of two candidates
def test_what_falls_short_in_quality_is_repaired_before_the_search_goes_elsewhere(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.plan.flow.proposals", lambda *_: ([ROUNDED], None))
    monkeypatch.setattr(menu, "LIKELY", -1e9)  # whatever is predicted, the plain recipe is tried first
    monkeypatch.setattr(search, "HOPELESS", -1e9)
    inputs = Inputs(model=speaker, task="causal-lm", data=ROWS, runtime="torch", task_settings={"context": 48},
                    threads=1, calibration_rows=40)  # fmt: skip
    goal = parse_goal("quality >= 99.99%, size <= 90%")
    found = optimize_run(inputs, goal, tmp_path / "run", fresh=False, max_candidates=2, time_budget_seconds=None)
    assert [list(entry) for entry in (step for tried in found.tried for step in tried.recipe)] == [
        ["quantize"], ["quantize"], ["tune_scales"]
    ]  # fmt: skip
    plain, repaired = (tried.measured for tried in found.tried)
    assert plain is not None
    assert repaired is not None
    assert repaired.equivalence.passed
    assert repaired.figures["size"].value == pytest.approx(plain.figures["size"].value, rel=1e-3)
    kept: Any = [float(measured.figures["kl"].value) for measured in (plain, repaired)]
    assert kept[1] < 0.9 * kept[0]
