"""A recipe that was applied: proven without a goal, and what can be asked of its files (evaluate, bench, compare)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer import api
from gossamer.errors import ArtifactError, DataError, TaskError
from gossamer.runtimes.manifest import MANIFEST

pytestmark = pytest.mark.timeout(300)  # the first test also waits for the run that the others look at


def test_an_applied_recipe_is_proven_without_a_goal(applied: Any) -> None:
    result = applied.result
    assert (result.verdict, result.goal, result.kind) == ("PASS", "", "apply")
    assert result.reason == "the files hold what the recipe says, and compute what was computed in memory"
    assert result.tried[0].recipe == [
        {"quantize": {"targets": ["embedding"]}}, {"quantize": {"activations": "dynamic"}},
    ]  # fmt: skip
    manifest = json.loads((applied.artifact / MANIFEST).read_text())
    assert manifest["calibration_fingerprint"] is None  # dynamic ranges look at no rows
    assert manifest["recipe"] == result.tried[0].recipe
    asked = {row.parameter: (row.asked, row.activation) for row in result.tried[0].measured.tensors}
    assert asked["classifier.weight"] == ("int8 symmetric per channel", "uint8 dynamic per tensor")
    assert asked["bert.embeddings.word_embeddings.weight"] == ("int8 symmetric per channel", "")


def test_the_reported_accuracy_is_that_of_a_plain_loop_over_the_files(applied: Any, tiny: Path) -> None:
    import onnxruntime
    from transformers import AutoTokenizer

    session = onnxruntime.InferenceSession(applied.artifact / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(applied.artifact)
    labels = json.loads((applied.artifact / "config.json").read_text())["id2label"]
    rows = [json.loads(line) for line in (tiny / "test.jsonl").read_text().splitlines()]
    names = {node.name for node in session.get_inputs()}
    right = 0
    for row in rows:
        encoded = tokenizer([row["text"]], return_tensors="np")
        (logits,) = session.run(["logits"], {n: encoded[n].astype(np.int64) for n in encoded if n in names})
        right += labels[str(int(logits.argmax()))] == row["label"]
    assert applied.result.tried[0].measured.figures["metric"].value == pytest.approx(right / len(rows))


def test_what_the_artifact_computes_was_compared_with_memory(applied: Any) -> None:
    (tried,) = applied.result.tried
    found = tried.measured.equivalence
    assert found.passed, (tried.name, found)
    assert found.num_batches == 8
    assert 0 < found.relative_error <= found.allowed
    assert found.change > 0  # the recipe did something


def test_an_artifact_scores_again_what_was_proven(applied: Any, tiny: Path) -> None:
    found = api.evaluate(applied.artifact, data=tiny / "test.jsonl", threads=1)
    assert (found.runtime, found.metric_name, found.rows) == ("onnxruntime", "accuracy", 240)
    assert found.metric == applied.result.tried[0].measured.figures["metric"]
    assert found.metric.low <= found.metric.value <= found.metric.high


def test_fewer_rows_can_be_asked_for(applied: Any, tiny: Path) -> None:
    assert api.evaluate(applied.artifact, data=tiny / "test.jsonl", threads=1, evaluation_rows=10).rows == 10
    with pytest.raises(DataError, match="1 rows are too few for an interval"):
        api.evaluate(applied.artifact, data=tiny / "test.jsonl", evaluation_rows=1)


def test_an_artifact_is_timed_alone_at_the_length_asked_for(applied: Any) -> None:
    found = api.bench(applied.artifact, tokens=24, seconds=0.5, threads=1)
    assert 0 < found.a.p50 <= found.a.p95 <= found.a.p99
    assert found.a.throughput > 0
    assert found.memory_a > 10e6
    assert (found.b, found.ratio) == (None, None)


@pytest.mark.slow
def test_two_are_timed_in_turns(applied: Any, tiny: Path) -> None:
    found = api.bench(applied.artifact, against=tiny / "model", tokens=24, seconds=0.5, threads=1)
    assert found.b is not None
    assert found.ratio is not None
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert found.memory_b is not None
    assert found.memory_b > found.memory_a  # one process imports torch, the other does not


@pytest.mark.slow
def test_a_comparison_judges_a_with_b_as_the_original(applied: Any, tiny: Path) -> None:
    goal = "quality >= 90%, size <= 90%"
    found = api.compare(applied.artifact, tiny / "model", data=tiny / "test.jsonl", goal=goal, threads=1)
    measured = applied.result.tried[0].measured
    assert found.verdict == "PASS"
    assert found.metric_b.value == 1.0
    assert found.metric_a == measured.figures["metric"]
    assert found.quality == measured.figures["quality"]
    assert found.kl == measured.figures["kl"]
    assert found.agreement.value == found.metric_a.value  # the labels are B's answers
    assert found.size_ratio.value == pytest.approx(measured.figures["size"].value / applied.result.original.size_bytes)
    harsher = api.compare(
        applied.artifact, tiny / "model", data=tiny / "test.jsonl", goal="size <= 1%", threads=1, evaluation_rows=8
    )
    assert harsher.verdict == "FAIL"


def test_a_changed_artifact_is_not_served(applied: Any, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(applied.artifact, tmp_path / "copy")
    with (tmp_path / "copy" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=r"tokenizer.json was changed after it was proven"):
        api.evaluate(tmp_path / "copy", data=tiny / "test.jsonl")
    (tmp_path / "copy" / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx is missing"):
        api.bench(tmp_path / "copy")


def test_what_is_no_artifact_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is not a folder"):
        api.evaluate(tmp_path / "nowhere", data=tiny / "test.jsonl")
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("BertForSequenceClassification", "BertModel"))
    with pytest.raises(TaskError, match=r"does not say what it is for \(architectures: BertModel\)"):
        api.evaluate(tmp_path / "model", data=tiny / "test.jsonl")
