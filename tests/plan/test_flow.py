"""The verbs on a tiny real job: every step is the real one, only the timings are short."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gossamer import api
from gossamer.errors import DataError, RunError
from gossamer.plan.forecast import artifact_bytes
from gossamer.plan.job import Job
from gossamer.plan.records import RunResult
from gossamer.recipe import Recipe, Step
from gossamer.run.journal import read_journal
from gossamer.runtimes.manifest import CARD, MANIFEST
from gossamer.techniques.registry import resolve

pytestmark = pytest.mark.timeout(300)  # the first test also waits for the run that the others look at


def bytes_of(artifact: Path) -> dict[str, str]:
    """Return the sha256 of every file but the model card, which tells what was measured."""
    return {
        path.relative_to(artifact).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(artifact.rglob("*"))
        if path.is_file() and path.name != CARD
    }


def shipped(folder: Path) -> int:
    return sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, CARD)
    )


def built(out: Path) -> list[str]:
    return [entry["kind"] for entry in read_journal(out / "journal.jsonl") if entry["event"] == "started"]


# ---------------------------------------------------------------- plan


def test_a_plan_predicts_and_builds_no_artifact(optimized: Any) -> None:
    plan, entries = optimized.plan, read_journal(optimized.out / "journal.jsonl")
    again = next(i for i, e in enumerate(entries) if e["event"] == "reused" and e["kind"] == "effect")
    kinds = {entry["kind"] for entry in entries[:again] if entry["event"] == "started"}
    assert {"original", "unchanged", "effect"} <= kinds
    assert not kinds & {"artifact", "checked", "scored", "timed"}
    assert len(plan.candidates) > 5
    assert plan.original.metric.value == 1.0  # the labels are its own answers
    for candidate in plan.candidates:
        assert candidate.measured is None
        assert 0 < candidate.predicted.size_bytes <= 0.4 * plan.original.size_bytes
        assert candidate.predicted.quality_share <= 1


def test_optimize_goes_on_from_what_the_plan_measured(optimized: Any) -> None:
    started = [e["key"] for e in read_journal(optimized.out / "journal.jsonl") if e["event"] == "started"]
    assert len(started) == len(set(started))
    assert optimized.result.tried[0].name == optimized.plan.candidates[0].name


def test_each_candidate_is_opened_to_be_judged_and_to_be_timed_and_the_original_once_for_all(optimized: Any) -> None:
    opened = Counter(optimized.served)
    assert opened.pop(Path(optimized.arguments["data"]).parent / "model") == 2  # scored; timed in turns with each
    assert sorted(folder.name for folder in opened) == ["artifact"] * len(optimized.result.tried)
    assert set(opened.values()) == {2}


def test_a_plan_says_what_the_most_promising_take(optimized: Any) -> None:
    first = optimized.plan.candidates[0]
    assert first.forecast is not None
    assert first.forecast.coverage
    assert first.predicted.seconds == first.forecast.seconds
    assert all(one.forecast is not None and not one.forecast.coverage for one in optimized.plan.candidates[3:])


# ---------------------------------------------------------------- optimize


def test_a_goal_that_can_be_met_is_met_and_proven(optimized: Any, tiny: Path) -> None:
    result = optimized.result
    assert (result.verdict, result.kind, result.chosen) == ("PASS", "optimize", len(result.tried) - 1)
    chosen = result.tried[result.chosen]
    assert {judged.constraint: judged.verdict for judged in chosen.judgements} == {
        "quality >= 97%": "PASS", "size <= 40%": "PASS",
    }  # fmt: skip
    figures = chosen.measured.figures
    assert figures["quality"].low >= 0.97
    assert figures["quality"].n == result.rows["evaluation"] == 240
    # counted here: what the user ships today, and what lies in the artifact's folder
    assert result.original.size_bytes == shipped(tiny / "model")
    assert figures["size"].value == shipped(optimized.artifact) <= 0.4 * shipped(tiny / "model")
    assert figures["latency p50"].low <= figures["latency p50"].value <= figures["latency p50"].high
    assert chosen.measured.latency.samples
    assert f"trying {chosen.name}" in optimized.said


def test_bytes_of_the_artifact_are_those_of_a_real_one(optimized: Any, job: Job) -> None:
    for tried in optimized.result.tried:
        settings = [Step(technique=name, settings=found) for entry in tried.recipe for name, found in entry.items()]
        decisions = [d for step in resolve(Recipe(steps=tuple(settings))) for d in step.resolve(job.model)]
        assert artifact_bytes(job, decisions) == pytest.approx(
            tried.measured.figures["size"].value, rel=0.08
        )  # config.json grows


def test_the_prediction_of_bytes_is_exact_but_for_text(optimized: Any) -> None:
    for tried in optimized.result.tried:
        predicted, found = tried.predicted.size_bytes, tried.measured.figures["size"].value
        # tensors are counted to the byte; config.json and the file's header grow by the names of the grids
        named = sum("weight_scale" in name or "input_" in name for name in _names(optimized.out / tried.folder))
        assert 0 < found - predicted < 1_800 + 110 * named


def _names(artifact: Path) -> list[str]:
    with safe_open(artifact / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_the_file_was_read_back_tensor_by_tensor(optimized: Any) -> None:
    chosen = optimized.result.tried[optimized.result.chosen]
    with safe_open(optimized.artifact / "model.safetensors", "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    rows = {row.parameter: row for row in chosen.measured.tensors}
    assert len(rows) > 15
    for parameter, row in rows.items():
        assert row.agrees
        parts = [tensor for name, tensor in held.items() if name.startswith(parameter)]
        assert row.bytes == sum(part.numel() * part.element_size() for part in parts), parameter
    assert any(row.asked.startswith("int") for row in rows.values())


def test_what_the_artifact_computes_was_compared_with_memory(optimized: Any) -> None:
    for tried in optimized.result.tried:
        found = tried.measured.equivalence
        assert found.passed, (tried.name, found)
        assert found.relative_error <= found.allowed
        assert found.num_batches == 8
        assert found.change > 0  # the recipe did something


def test_the_folder_holds_report_manifest_and_card(optimized: Any) -> None:
    out, result = optimized.out, optimized.result
    assert RunResult.model_validate_json((out / "report.json").read_text()) == result
    page = api.report(out)
    assert page == out / "report.html"
    assert result.tried[result.chosen].name in page.read_text()
    manifest = json.loads((optimized.artifact / MANIFEST).read_text())
    files = bytes_of(optimized.artifact)
    del files[MANIFEST]
    assert manifest["files"] == files
    assert manifest["recipe"] == result.tried[result.chosen].recipe
    assert (manifest["runtime"], manifest["task"], manifest["seed"]) == ("torch", "text-classification", 0)
    assert manifest["model_fingerprint"] == result.provenance.model_fingerprint
    assert "PASS" in (optimized.artifact / CARD).read_text() or "97" in (optimized.artifact / CARD).read_text()


def test_the_same_call_again_builds_nothing_and_hands_over_the_same_bytes(optimized: Any, tiny: Path) -> None:
    before, num_entries = bytes_of(optimized.artifact), len(read_journal(optimized.out / "journal.jsonl"))
    again = api.optimize(tiny / "model", **optimized.arguments)
    entries = read_journal(optimized.out / "journal.jsonl")[num_entries:]
    assert {entry["event"] for entry in entries} == {"reused", "tried", "finished-run"}
    assert bytes_of(optimized.artifact) == before
    same = {"original", "verdict", "reason", "not_tried", "chosen", "artifact", "rows", "goal", "kind", "load_snippet"}
    assert again.model_dump(include=same) == optimized.result.model_dump(include=same)
    assert [t.measured for t in again.tried] == [t.measured for t in optimized.result.tried]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"goal": "quality >= 97%, size <= 41%"}, "goal changed"),
        ({"seed": 1}, "seed changed"),
        ({"runtime": "onnxruntime"}, "runtime changed"),
        ({"task_settings": {"max_length": 16}}, "task settings.max_length"),
        ({"calibration_rows": 20}, "rows changed"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_run_folder_refuses_another_job_and_names_the_part(
    optimized: Any, tiny: Path, change: dict[str, Any], named: str
) -> None:
    before = bytes_of(optimized.artifact)
    with pytest.raises(RunError, match="holds another run") as caught:
        api.optimize(tiny / "model", **{**optimized.arguments, **change})
    assert named in caught.value.message
    assert "--fresh" in caught.value.hint
    assert bytes_of(optimized.artifact) == before


def test_changed_rows_and_changed_weights_are_refused_too(optimized: Any, tiny: Path, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text((tiny / "train.jsonl").read_text().replace("w1 ", "w2 "))
    with pytest.raises(RunError, match=r"\(data changed\)"):
        api.optimize(tiny / "model", **{**optimized.arguments, "data": rows})
    shutil.copytree(tiny / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["classifier.bias"][0] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"\(model changed\)"):
        api.optimize(tmp_path / "model", **optimized.arguments)


@pytest.mark.slow
def test_what_cannot_be_met_fails_naming_what_stands_in_the_way(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any]
) -> None:
    goal = "quality >= 100.5%, size <= 1%"
    result = api.optimize(tiny / "model", **ask(tiny, goal=goal, runtime="torch", out=tmp_path / "build"))
    assert result.verdict == "FAIL"
    chosen = result.tried[result.chosen or 0]
    assert all(judged.verdict == "FAIL" for judged in chosen.judgements)
    assert "`size <= 1%` stands in the way of the nearest" in result.reason
    assert chosen.name in result.reason
    assert result.artifact == str(tmp_path / "build" / "artifact")
    assert (tmp_path / "build" / "artifact" / "model.safetensors").exists()
    smallest = min(tried.predicted.size_bytes for tried in (*result.tried, *result.not_tried))
    assert chosen.predicted.size_bytes == smallest  # the nearest to a bound on bytes is the smallest


@pytest.mark.slow
def test_too_few_rows_leave_it_undecided_and_say_how_many_would_do(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any]
) -> None:
    given = ask(tiny, goal="quality >= 97%", runtime="torch", out=tmp_path / "build", evaluation_rows=12)
    result = api.optimize(tiny / "model", **given, max_candidates=1)
    assert result.verdict == "UNDECIDED"
    assert "1 candidates were tried" in result.reason
    words = result.reason.split()
    more = int(words[words.index("more") - 1])
    # all 12 agree, so only n counts: no discordant pair in n rows bounds the loss at about 3 / n
    assert 80 <= 12 + more <= 130


def test_a_tracker_is_told_of_every_candidate_and_the_report(optimized: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = optimized.out / "tracking" / "tensorboard"
    (events,) = (folder / "gossamer").glob("events.*")
    found = EventAccumulator(str(events)).Reload()
    tried = optimized.result.tried
    for name in ("quality", "size", "latency p50 ratio"):
        told = [one.value for one in found.Scalars(f"candidates/{name}")]
        assert told == pytest.approx([one.measured.figures[name].value for one in tried])
    assert [one.value for one in found.Scalars("candidates/predicted size")] == [
        pytest.approx(one.predicted.size_bytes) for one in tried
    ]
    assert (folder / "report.html").read_text() == (optimized.out / "report.html").read_text()
    assert "size <= 40%" in next((folder / "gossamer").rglob("hparams.yml")).read_text()


def test_what_needs_rows_says_so_before_anything_is_built(tiny: Path, tmp_path: Path) -> None:
    static = Recipe(steps=(Step(technique="quantize", settings={"activations": "static"}),))
    with pytest.raises(DataError, match="the recipe needs 8 calibration rows, 0 are there"):
        api.apply(static, tiny / "model", out=tmp_path / "build", runtime="onnxruntime")
    plain = Recipe(steps=(Step(technique="quantize", settings={}),))
    with pytest.raises(DataError, match="the goal bounds quality, but there are no rows"):
        api.apply(plain, tiny / "model", out=tmp_path / "build", goal="quality >= 99%")
    assert not (tmp_path / "build").exists()


@pytest.mark.slow
def test_a_recipe_without_rows_is_carried_out_and_checked(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe(steps=(Step(technique="quantize", settings={"bits": 4, "group_size": 32}),))
    result = api.apply(recipe, tiny / "model", out=tmp_path / "build", goal="size <= 90%", threads=1)
    assert result.verdict == "PASS"
    assert "quality was not measured: no rows were given" in result.reason
    assert result.original.metric is None
    assert "quality" not in result.tried[0].measured.figures
    assert result.tried[0].measured.equivalence.passed


class Words(torch.nn.Module):
    """The mean of some embeddings, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 32)
        self.inner = torch.nn.Linear(32, 64)
        self.classifier = torch.nn.Linear(64, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.relu(self.inner(self.embed(input_ids).mean(1))))


@pytest.mark.slow
def test_a_network_in_memory_with_a_forward_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Words().eval()
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 50, int(draw.integers(4, 9))).tolist() for _ in range(60)]
    with torch.no_grad():
        rows = [{"input_ids": one, "label": int(network(torch.tensor([one])).argmax())} for one in ids]
    result = api.apply(
        Recipe(steps=(Step(technique="quantize", settings={"activations": "static"}),)),
        network, forward=lambda module, inputs: module(inputs["input_ids"]), task="text-classification",
        data=rows[:20], evaluation=rows[20:], goal="quality >= 80%", runtime="onnxruntime", out=tmp_path, threads=1,
    )  # fmt: skip
    assert result.verdict == "PASS"
    assert (tmp_path / "artifact" / "model.onnx").exists()
    manifest = json.loads((tmp_path / "artifact" / MANIFEST).read_text())
    assert len(manifest["calibration_fingerprint"]) == 64
