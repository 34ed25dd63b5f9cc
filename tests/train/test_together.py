"""Two processes train as one does: the same steps, the same losses, the same weights in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gossamer
from gossamer.errors import TechniqueError
from gossamer.run.team import Team
from gossamer.train.lesson import rows_of_one

SCRIPT = Path(__file__).parent / "train_together.py"
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 20, "micro_batch": 5, "precision": "fp32"}
PRUNED = ["prune", {"what": "ffn", "to": "25%", "by": "magnitude", "refit": False}]
ZEROED = ["sparsify", {"sparsity": 0.3, "by": "magnitude"}]
SPLIT = {**SHORT, "sharding": "fsdp"}
NARROW = ["prune", {"what": "width", "to": "75%"}]
ROUNDED = ["quantize", {"bits": 3, "group_size": 16, "targets": ["q", "k", "v", "o", "up", "gate", "down"]}]


def ran(folder: Path, recipe: list[Any], processes: int, *steps: str) -> subprocess.CompletedProcess[str]:
    """Carry out a recipe in some processes, or its first steps."""
    folder.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), str(folder), json.dumps(recipe), *steps],
        env={**os.environ, "PYTHONPATH": str(Path(gossamer.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def trained(folder: Path, recipe: list[Any], processes: int) -> list[dict[str, Any]]:
    """Return what each process found."""
    done = ran(folder, recipe, processes)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(processes)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param([PRUNED, ["distill", {**SHORT, "rate": 5e-4}]], id="distill", marks=pytest.mark.slow),
        pytest.param(
            [NARROW, ["distill", {**SHORT, "rate": 5e-4, "projection": "learned", "relations": 1}]],
            id="narrower",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [ROUNDED, ["qat", SHORT], ["lora", {**SHORT, "rank": 4, "merge": True}]],
            id="qat and lora",
            marks=pytest.mark.slow,
        ),
        pytest.param([ZEROED, ["distill", {**SPLIT, "rate": 5e-4}]], id="split"),
        pytest.param(
            [ZEROED, ["distill", {**SPLIT, "rate": 5e-4}], ROUNDED, ["qat", SPLIT], ["lora", {**SPLIT, "rank": 4}]],
            id="split, rounded, adapted",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, recipe: list[Any]) -> None:
    (alone,) = trained(tmp_path / "alone", recipe, 1)
    first, second = trained(tmp_path / "both", recipe, 2)
    assert len(alone["losses"]) > 12  # of 144 rows to learn from and 16 to judge on: both are no whole steps
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-4)
    assert first["losses"] == second["losses"]
    assert first["weights"] == second["weights"]
    for name, weights in alone["weights"].items():
        np.testing.assert_allclose(first["weights"][name], weights, atol=2e-4, err_msg=name)
        assert [value == 0 for value in first["weights"][name]] == [value == 0 for value in weights], name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gates_shut_the_same_units_in_all_processes(tmp_path: Path) -> None:
    recipe = [["gates", {**SHORT, "epochs": 2, "rate": 5e-4, "ffn": "50%"}]]
    (alone,) = trained(tmp_path / "alone", recipe, 1)
    first, second = trained(tmp_path / "both", recipe, 2)
    assert first["weights"] == second["weights"]
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=0.02)
    assert {name: len(one) for name, one in first["weights"].items()} == {
        name: len(one) for name, one in alone["weights"].items()
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("by", ["magnitude", "movement"])
def test_masks_that_grow_are_the_same_in_all_processes(tmp_path: Path, by: str) -> None:
    recipe = [["gradual", {**SHORT, "epochs": 2, "rate": 5e-4, "sparsity": 0.6, "by": by}]]
    (alone,) = trained(tmp_path / "alone", recipe, 1)
    first, second = trained(tmp_path / "both", recipe, 2)
    assert first["weights"] == second["weights"]
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=0.02)
    for name, weights in alone["weights"].items():
        gone, here = (np.array(one) == 0 for one in (weights, first["weights"][name]))
        assert gone.mean() == pytest.approx(0.6, abs=0.002) or not gone.any(), name
        assert (gone != here).mean() < 0.01, name  # two that are nearly equal may change places


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("processes", "others", "settings"),
    [
        pytest.param(2, 1, SHORT, id="fewer", marks=pytest.mark.slow),
        pytest.param(1, 2, SHORT, id="more", marks=pytest.mark.slow),
        pytest.param(2, 3, {**SPLIT, "batch_size": 24, "micro_batch": 4}, id="split anew", marks=pytest.mark.slow),
    ],
)
def test_a_training_goes_on_in_another_number_of_processes(
    tmp_path: Path, processes: int, others: int, settings: dict[str, Any]
) -> None:
    recipe = [PRUNED, ["distill", {**settings, "rate": 5e-4}]]
    (alone,) = trained(tmp_path / "alone", recipe, 1)
    assert ran(tmp_path / "cut", recipe, processes, "6").returncode != 0
    if settings.get("sharding"):
        told = ran(tmp_path / "cut", recipe, 1)
        assert told.returncode != 0
        assert "begun with sharding: fsdp by several processes, and is to go on in one" in told.stderr
    assert not list((tmp_path / "cut").glob("*.json"))
    found = trained(tmp_path / "cut", recipe, others)
    assert len(found) == others
    for one in found:
        assert 0 < len(one["losses"]) < len(alone["losses"]) - 3, (
            "the steps before the last checkpoint are not repeated"
        )
        for name, weights in alone["weights"].items():
            np.testing.assert_allclose(one["weights"][name], weights, atol=2e-4, err_msg=name)


def test_rows_that_cannot_be_shared_evenly_are_refused_with_both_numbers() -> None:
    assert rows_of_one(16, Team(rank=1, size=4), "distill") == 4
    with pytest.raises(TechniqueError, match=r"a step of 16 rows cannot be shared evenly by 3 processes"):
        rows_of_one(16, Team(rank=0, size=3), "distill")
