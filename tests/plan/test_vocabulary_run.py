"""A recipe that cuts the vocabulary, from rows to proof: what reads the rows, what ships, what was predicted."""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gossamer import api
from gossamer.errors import DataError, RecipeError
from gossamer.measure.size import shipped_bytes
from gossamer.models.source import Source
from gossamer.plan.candidates import joined
from gossamer.plan.forecast import artifact_bytes
from gossamer.plan.job import Job, tensors_of
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.plan.proof import apply_steps, artifact_inputs, as_served, build_artifact
from gossamer.run.workspace import Run
from gossamer.runtimes.manifest import artifact_files
from gossamer.techniques.base import SearchSpace, resolved
from gossamer.techniques.distill.distill import Distill
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.prune.vocabulary import Vocabulary
from gossamer.techniques.quantize.quantize import Quantize

TINY = runpy.run_path(str(Path(__file__).parents[1] / "techniques" / "prune" / "tiny_words.py"))
STEPS = (Vocabulary(), Prune(what="ffn", to="50%"), Quantize(activations="static"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny BERT, and rows of a domain that it labels itself."""
    folder = tmp_path_factory.mktemp("texts")
    model = AutoModelForSequenceClassification.from_pretrained(TINY["write_bert"](folder / "model")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = list(dict.fromkeys(TINY["texts"](220, 3, 6)))
    with torch.no_grad():
        found = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    rows = [{"text": text, "label": ("ham", "spam")[label]} for text, label in zip(texts, found, strict=True)]
    for name, part in (("train", rows[:140]), ("test", rows[140:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def given(texts: Path, **more: Any) -> dict[str, Any]:
    rows = {"data": texts / "train.jsonl", "evaluation": texts / "test.jsonl"}
    return {"task": "text-classification", "threads": 1, "calibration_rows": 24, **rows, **more}


@pytest.fixture(params=["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def job(texts: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    inputs = Inputs(model=texts / "model", **given(texts, runtime=request.param))
    prepared = prepare(inputs)
    with Run(tmp_path / "run", {"a": "test"}) as run, opened_job(inputs, prepared, run) as opened:
        yield opened


def test_a_cut_goes_where_the_order_of_steps_allows_it(job: Job) -> None:
    space = SearchSpace(job.model, job.runtime, job.task, 24)
    tokens, cut, rounded = STEPS
    assert joined((cut,), (tokens, rounded), space) == STEPS
    assert joined((cut,), (rounded,), space) == (cut, rounded)
    assert joined((tokens,), (tokens, rounded), space) is None


def test_later_steps_and_the_proof_read_rows_with_the_tokenizer_that_ships(job: Job) -> None:
    steps = STEPS if job.runtime.name == "onnxruntime" else STEPS[:2]
    built = build_artifact(job, steps)
    served = as_served(job, built.folder / "artifact")
    rows = resolved(job.model, steps)[1].layer("bert.embeddings.word_embeddings").shape[0]
    assert max(int(batch.inputs["input_ids"].max()) for batch in served.evaluation) < rows
    ships = AutoTokenizer.from_pretrained(built.folder / "artifact")
    for row, batch in zip(job.rows.evaluation, served.evaluation, strict=True):
        assert ships(row["text"])["input_ids"] == batch.inputs["input_ids"][0].tolist()
    config = json.loads((built.folder / "artifact" / "config.json").read_bytes())
    assert config["vocab_size"] == rows
    if job.runtime.name == "torch":
        AutoModelForSequenceClassification.from_pretrained(built.folder / "artifact")


def test_a_student_of_fewer_tokens_learns_what_the_original_says_of_its_own(job: Job) -> None:
    steps = (Vocabulary(to="20%"), Distill(epochs=0.1, hidden=0, labels=0, batch_size=8, precision="fp32"))
    candidate, _ = apply_steps(job, steps)
    assert any(
        ours.inputs["input_ids"].size != theirs.inputs["input_ids"].size
        for ours, theirs in zip(job.read_by(candidate.source).training, job.training, strict=True)
    )
    (made,) = (one for one in job.run.journal() if one.get("kind") == "teacher" and one["event"] == "finished")
    original = job.source.module(job.task)
    with safe_open(job.run.folder / made["folder"] / "rows-000000.safetensors", framework="pt") as file:
        for number, row in enumerate(job.training):
            with torch.no_grad():
                logits = job.source.forward(original, tensors_of(row.inputs), "logits")
            assert torch.allclose(file.get_tensor(f"{number}.log_p"), logits.log_softmax(-1), atol=1e-5)


def test_a_vocabulary_is_known_by_its_tokens(job: Job, texts: Path) -> None:
    """The same step counted in other rows is another artifact."""
    ours = artifact_inputs(job, (Vocabulary(),))
    assert ours == artifact_inputs(job, (Vocabulary(),))
    assert "tokenizer" not in artifact_inputs(job, (Quantize(),))
    rows = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()]
    inputs = Inputs(model=texts / "model", **{**given(texts, runtime="torch"), "data": rows[:60]})
    with Run(job.run.folder.parent / "other", {"a": "b"}) as run, opened_job(inputs, prepare(inputs), run) as other:
        assert artifact_inputs(other, (Vocabulary(),))["tokenizer"] != ours["tokenizer"]


def test_bytes_are_predicted_with_the_tokenizer(job: Job) -> None:
    unchanged = shipped_bytes(artifact_files(build_artifact(job, ()).folder / "artifact"))
    built = build_artifact(job, (Vocabulary(to=150),))
    found = shipped_bytes(artifact_files(built.folder / "artifact"))
    left = resolved(job.model, (Vocabulary(to=150),))
    saved = artifact_bytes(job, ()) - artifact_bytes(job, *left)
    assert abs(unchanged - saved - found) < 200, "a few digits of config.json and of the graph"
    assert saved > 5000


def test_held_out_rows_are_not_counted(texts: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()]
    hidden = {"text": "quaquadri estostqua", "label": "ham"}
    test = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
    inputs = Inputs(
        model=texts / "model",
        **{**given(texts, runtime="torch"), "data": [*rows, hidden], "evaluation": [*test, hidden]},
    )
    with Run(tmp_path / "run", {"a": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        words = job.model.words
        assert words is not None
        tokens = words.numbers_of(hidden["text"])
        assert any(words.counts[number] == 0 for number in tokens)
        seen = set().union(*(words.numbers_of(row["text"]) for row in rows))
        assert seen <= {number for number, count in words.counts.items() if count}


def test_an_effect_is_measured_on_rows_that_were_not_counted(texts: Path, tmp_path: Path) -> None:
    inputs = Inputs(model=texts / "model", **given(texts, runtime="torch"))
    with Run(tmp_path / "run", {"a": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        assert job.model.words is not None
        apart = job.model.words.apart
        assert apart is not job.model.words
        calibrating = sum(batch.inputs["input_ids"].size for batch in job.calibration)
        assert sum(job.model.words.counts.values()) - sum(apart.counts.values()) == calibrating


def test_a_model_that_is_read_piece_by_piece_gives_the_same_files(
    texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def built(name: str) -> tuple[bytes, ...]:
        inputs = Inputs(model=texts / "model", **given(texts, runtime="torch"))
        with Run(tmp_path / name, {"a": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
            assert (job.budget is not None) == (name == "streamed")
            folder = build_artifact(job, (Vocabulary(to=150), Quantize())).folder / "artifact"
            return tuple(
                (folder / name).read_bytes() for name in ("model.safetensors", "tokenizer.json", "config.json")
            )

    whole = built("whole")
    request.getfixturevalue("tight")
    assert built("streamed") == whole


def test_what_a_candidate_computes_is_what_the_original_does_on_known_tokens(job: Job) -> None:
    candidate, _ = apply_steps(job, (Vocabulary(),))
    reading = job.read_by(candidate.source)
    assert job.read_by(job.source) is job
    run = [next(job.computed(model, [batch.inputs])) for model, batch in (
        (candidate, reading.calibration[0]), (job.candidate(), job.calibration[0])
    )]  # fmt: skip
    np.testing.assert_allclose(run[0]["logits"], run[1]["logits"], atol=1e-6)


@pytest.mark.slow
def test_apply_proves_it(texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- vocabulary: {}\n- quantize: {activations: dynamic}\n- quantize: {targets: [embedding]}\n")
    result = api.apply(
        recipe, texts / "model", **given(texts, runtime="onnxruntime", out=tmp_path / "build", goal="quality >= 50%")
    )
    (tried,) = result.tried
    assert tried.rejected == ""
    assert tried.measured is not None
    assert tried.measured.figures["quality"].value > 0.8
    again = api.evaluate(tmp_path / "build" / "artifact", data=texts / "test.jsonl", threads=1)
    assert again.metric.value == pytest.approx(tried.measured.figures["metric"].value)


@pytest.mark.slow
def test_the_planner_reaches_a_size_that_rounding_does_not(texts: Path, tmp_path: Path) -> None:
    unchanged = shipped_bytes(Source.open(texts / "model").shipped_files())
    asked = int(unchanged * 0.3)  # with 4 bits everywhere, and 16 for the rest, it is 34 %
    result = api.optimize(
        texts / "model",
        **given(texts, runtime="torch", out=tmp_path / "build", goal=f"quality >= 60%, size <= {asked}B"),
        max_candidates=3,
    )
    assert result.verdict == "PASS"
    assert result.chosen is not None
    assert "vocabulary" in result.tried[result.chosen].name
    others = [one for one in (*result.tried, *result.not_tried) if "vocabulary" not in one.name]
    assert all(one.predicted is None or one.predicted.size_bytes > asked for one in others)


def test_rows_are_needed(texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- vocabulary: {to: 50%}\n")
    with pytest.raises(DataError, match="needs 1 calibration rows, 0 are there"):
        api.apply(recipe, texts / "model", **{**given(texts), "data": None, "evaluation": None, "out": tmp_path / "a"})


def test_a_task_scored_by_tokens_is_refused_by_name(speaker: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- vocabulary: {to: 90%}\n")
    rows = [{"text": f"row {number} says {random.Random(number).random()}"} for number in range(40)]
    with pytest.raises(RecipeError, match="tokens stay as they are: causal-lm: its score is a sum over tokens"):
        api.apply(recipe, speaker, task="causal-lm", data=rows, out=tmp_path / "a", task_settings={"context": 32})
