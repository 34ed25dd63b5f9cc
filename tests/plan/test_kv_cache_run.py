"""A recipe with `kv_cache` from settings to proof, whole and piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import RuntimeUnavailable
from gossamer.goal import parse_goal
from gossamer.plan.comparison import compare_tensors
from gossamer.plan.flow import apply_run
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.run.workspace import Run
from gossamer.runtimes.base import StoredTensor
from gossamer.techniques.quantize.kv_cache import KvCache
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.registry import recipe_of

STEPS = (Quantize(bits=8), KvCache(format="fp8"))
ROWS = [{"text": f"{number}: what was proven is served, and a code is the nearest one"} for number in range(30)]


def inputs_of(speaker: Path, runtime: str = "torch") -> Inputs:
    return Inputs(model=speaker, task="causal-lm", data=ROWS, runtime=runtime, task_settings={"context": 48},
                  threads=1, calibration_rows=8)  # fmt: skip


@pytest.mark.timeout(300)  # four processes are started, one after another
@pytest.mark.parametrize(
    "pieces", [pytest.param(False, id="whole"), pytest.param(True, id="pieces", marks=pytest.mark.slow)]
)
def test_the_files_are_judged_with_the_caches_that_they_ask_for(
    speaker: Path, tmp_path: Path, request: pytest.FixtureRequest, pieces: bool
) -> None:
    if pieces:
        request.getfixturevalue("tight")
    found = apply_run(inputs_of(speaker), recipe_of(STEPS), parse_goal("size <= 100%"), tmp_path / "run", fresh=False)
    assert found.verdict == "PASS", found.reason
    measured = found.tried[0].measured
    assert measured is not None
    assert measured.equivalence.passed
    rows = {row.parameter: row for row in measured.tensors if row.role == "cache"}
    assert len(rows) == 6
    row = rows["model.layers.2.self_attn.v_scale"]
    assert (row.asked, row.found, row.agrees, row.bytes) == ("fp8 per tensor", "fp8 per tensor", True, 4)
    settings = json.loads((tmp_path / "run" / "artifact" / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["type"] == "float"
    assert all(row.agrees for row in measured.tensors)


def test_a_scale_that_is_not_in_the_file_is_a_disagreement(speaker: Path, tmp_path: Path) -> None:
    inputs = inputs_of(speaker)
    with Run(tmp_path / "run", {"verb": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        name = "model.layers.0.self_attn.k_scale"
        asked: Any = {"parameter": name, "weight": None, "activation": "", "dtype": None, "cache": "fp8 per tensor"}
        held = StoredTensor(name, "fp8 per tensor", 8, None, True, (1,), 4)
        other = StoredTensor(name, "int8 per tensor", 8, None, True, (1,), 4)
        for stored, agrees in (([held], True), ([other], False), ([], False)):
            row = compare_tensors(job.model, [asked], stored)[-1]
            assert (row.parameter, row.agrees) == (name, agrees)


def test_a_runtime_whose_files_have_no_place_for_scales_refuses_beforehand(speaker: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="no place for scales of keys and values; use --runtime torch"):
        apply_run(inputs_of(speaker, "onnxruntime"), recipe_of(STEPS), None, tmp_path / "onnx", fresh=False)
    assert not any((tmp_path / "onnx").glob("steps/*"))
