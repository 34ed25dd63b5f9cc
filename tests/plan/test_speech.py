"""Recordings go through a whole run: words are heard again from the files, in a process of their own."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from gossamer import api
from gossamer.recipe import Recipe

pytestmark = pytest.mark.timeout(180)  # six processes of their own, each of which imports torch
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


@pytest.mark.slow
def test_without_rows_a_made_up_recording_proves_the_files(whisper: str, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml("- quantize: {bits: 4, group_size: 16, targets: [linear]}")
    found = api.apply(recipe, whisper, out=tmp_path / "out", task="speech-recognition", threads=1)
    assert found.verdict == "PASS", found.reason
