"""Recordings go through a whole run: words are heard again from the files, in a process of their own."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from gossamer import api
from gossamer.plan.fewer_blocks import FewerBlocks, is_taken
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.recipe import Recipe
from gossamer.run.workspace import Run
from gossamer.techniques.base import resolved

pytestmark = pytest.mark.timeout(180)  # processes of their own, each of which imports torch
TINY = runpy.run_path(str(Path(__file__).parents[1] / "tasks" / "tiny_whisper.py"))
sound, RATE = TINY["sound"], TINY["RATE"]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(TINY["write_whisper"](tmp_path_factory.mktemp("whisper")))


def test_apply_scores_the_files_as_the_model_in_memory(whisper: str, tmp_path: Path) -> None:
    rows = [
        {"audio": {"array": sound(seed, 0.1 + 0.01 * seed).tolist(), "sampling_rate": RATE}, "text": text}
        for seed, text in enumerate(["ab", "c d", "e", "f g h"] * 10)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    found = api.apply(
        Recipe.from_yaml("- quantize: {bits: 8, targets: [linear]}"),
        whisper,
        out=tmp_path / "out",
        task="speech-recognition",
        data=data,
        runtime="onnxruntime",
        task_settings={"max_tokens": 24},
        threads=1,
    )
    measured = found.tried[0].measured
    assert measured is not None
    assert measured.equivalence.passed
    assert measured.figures["agreement"].value > 0.9
    assert found.original.metric is not None


def test_of_two_stacks_blocks_of_both_go_where_little_time_is_left(tmp_path: Path) -> None:
    deep = TINY["write_whisper"](tmp_path / "deep", blocks=4)
    inputs = Inputs(model=deep, task="speech-recognition", runtime="onnxruntime", threads=1, data=[
        {"audio": {"array": sound(seed, 0.2), "sampling_rate": RATE}, "text": "ab"} for seed in range(20)
    ])  # fmt: skip
    with Run(tmp_path / "run", {"a": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        steps = FewerBlocks(job).steps(0.25)
        stacks = {one.stack: one.size for one in job.model.dimensions if one.kind == "layers"}
        assert len(stacks) == 2
        assert [step.targets for step in steps] == [(stack,) for stack in stacks]
        after = resolved(job.model, steps)[1]
        assert {one.name: one.num_blocks for one in after.stacks} == dict.fromkeys(stacks, 2)
        for one in job.model.dimensions:
            if one.block is not None:
                (step,) = (step for step in steps if one.stack in step.targets)
                assert is_taken(one, steps) == (one.block in step.remove)  # type: ignore[operator]


@pytest.mark.slow
def test_without_rows_a_made_up_recording_proves_the_files(whisper: str, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(
        "- quantize: {bits: 4, group_size: 16, targets: [linear]}\n- quantize: {bits: 8, targets: [embedding]}"
    )
    found = api.apply(recipe, whisper, out=tmp_path / "out", task="speech-recognition", threads=1)
    assert found.verdict == "PASS", found.reason
