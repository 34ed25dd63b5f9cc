"""What rejects an artifact: a tensor that is held otherwise than asked, outputs that differ from memory's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gossamer.plan.comparison import CHECKED_VALUES, compare_outputs, compare_tensors, thinned
from gossamer.plan.flow import _no_prediction
from gossamer.plan.job import InMemory, Job
from gossamer.plan.predict import Tables
from gossamer.plan.proof import apply_steps, build_artifact, check_artifact, refused_by
from gossamer.plan.search import prove
from gossamer.run.workspace import StepResult
from gossamer.runtimes import get_runtime
from gossamer.runtimes.base import StoredTensor
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.tasks.base import Arrays
from gossamer.techniques.adapt.compensate import Compensate
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.quantize import Quantize

STEPS = (Quantize(bits=4, group_size=32, symmetric=False), Quantize(targets=("word_embeddings",)))
WEIGHTS: list[dict[str, Any]] = [{"activation": "", "dtype": None}]
INPUTS = [*WEIGHTS, {"activation": "uint8 dynamic per tensor", "dtype": None}]
CACHES = [*WEIGHTS, {"activation": "", "dtype": None, "weight": "", "cache": "fp8 per tensor"}]
DOCTORED = "bert.encoder.layer.0.attention.self.query.weight"


def built_and_stored(job: Job) -> tuple[StepResult, list[StoredTensor]]:
    built = build_artifact(job, STEPS)
    return built, job.runtime.stored_tensors(built.folder / "artifact")


def test_every_parameter_is_read_back_as_asked(job: Job) -> None:
    built, stored = built_and_stored(job)
    rows = {row.parameter: row for row in compare_tensors(job.model, built.value["decisions"], stored)}
    assert all(row.agrees for row in rows.values())
    assert len(rows) == len(job.model.layers)
    query, words, norm = (
        rows[f"bert.{name}.weight"]
        for name in (
            "encoder.layer.0.attention.self.query",
            "embeddings.word_embeddings",
            "embeddings.LayerNorm",
        )
    )
    assert (query.asked, query.original_bytes) == ("int4 asymmetric group 32", 64 * 64 * 4)
    assert query.bytes < 64 * 64
    assert (words.asked, norm.asked, norm.found) == ("int8 symmetric per channel", "unchanged", "float32")


@pytest.mark.parametrize(
    "change", [{"bits": 8}, {"symmetric": True}, {"group_size": 64}, {"bits": 32}], ids=lambda change: str(change)
)
def test_a_tensor_that_is_held_otherwise_is_named(job: Job, change: dict[str, Any]) -> None:
    built, stored = built_and_stored(job)
    doctored = [replace(tensor, **change) if tensor.name == DOCTORED else tensor for tensor in stored]
    rows = compare_tensors(job.model, built.value["decisions"], doctored)
    assert [row.parameter for row in rows if not row.agrees] == [DOCTORED]


def test_a_missing_tensor_and_one_rounded_unasked_are_named(job: Job) -> None:
    built, stored = built_and_stored(job)

    def wrong(tensors: list[StoredTensor]) -> list[str]:
        return [
            row.parameter for row in compare_tensors(job.model, built.value["decisions"], tensors) if not row.agrees
        ]

    assert wrong([tensor for tensor in stored if tensor.name != DOCTORED]) == [DOCTORED]
    unasked = [replace(t, bits=8) if t.name == "bert.embeddings.position_embeddings.weight" else t for t in stored]
    assert wrong(unasked) == ["bert.embeddings.position_embeddings.weight"]


def test_a_step_that_changed_values_only_does_not_hide_the_one_that_rounds(job: Job) -> None:
    built, stored = built_and_stored(job)
    decisions = built.value["decisions"]
    smoothed = [{**decision, "weight": None, "activation": ""} for decision in decisions]
    rows = compare_tensors(job.model, [*smoothed, *decisions], stored)
    assert rows == compare_tensors(job.model, decisions, stored)
    doctored = [replace(tensor, bits=8) if tensor.name == DOCTORED else tensor for tensor in stored]
    assert not all(row.agrees for row in compare_tensors(job.model, [*smoothed, *decisions], doctored))


def check_arrays(job: Job, changed: float) -> Arrays:
    """Return three held-out batches with the original's outputs, and as the decided ones those plus `changed`."""
    run = InMemory(job.source, job.source.module(job.task), "logits")
    draw = np.random.default_rng(0)
    arrays: Arrays = {}
    for index, batch in enumerate(job.evaluation[:3]):
        arrays |= {f"{index}.input.{name}": values for name, values in batch.inputs.items()}
        original = run(batch.inputs)["logits"]
        arrays[f"{index}.original"] = original
        arrays[f"{index}.decided"] = original + changed * draw.standard_normal(original.shape).astype(np.float32)
    return arrays


def answering(arrays: Arrays, error: float) -> Callable[[Sequence[Arrays]], Iterator[Arrays]]:
    """Return a session that gives the decided outputs plus an error, batch by batch."""
    draw = np.random.default_rng(1)

    def run_all(batches: Sequence[Arrays]) -> Iterator[Arrays]:
        for index, inputs in enumerate(batches):
            decided = arrays[f"{index}.decided"]
            assert all(np.array_equal(values, arrays[f"{index}.input.{name}"]) for name, values in inputs.items())
            yield {"logits": decided + error * draw.standard_normal(decided.shape).astype(np.float32)}

    return run_all


def test_outputs_are_compared_in_units_of_their_spread(job: Job) -> None:
    arrays = check_arrays(job, changed=0.3)
    found = compare_outputs(job, arrays, answering(arrays, 0.0), WEIGHTS)
    assert (found.relative_error, found.top1_agreement, found.num_batches, found.passed) == (0.0, 1.0, 3, True)
    logits = [arrays[f"{index}.decided"].astype(float) for index in range(3)]
    spread = np.sqrt(np.mean(np.concatenate([(one - one.mean()).ravel() ** 2 for one in logits])))
    change = [arrays[f"{index}.decided"] - arrays[f"{index}.original"] for index in range(3)]
    assert found.change == pytest.approx(np.sqrt(np.mean(np.square(change))) / spread, rel=1e-5)


def test_rounded_caches_may_move_outputs_by_half_of_what_they_changed(job: Job) -> None:
    arrays = check_arrays(job, changed=0.1)
    change = compare_outputs(job, arrays, answering(arrays, 0.0), CACHES).change
    spread = float(np.std(np.concatenate([arrays[f"{index}.decided"] for index in range(3)])))
    assert change > 0.03
    assert compare_outputs(job, arrays, answering(arrays, 0.4 * change * spread), CACHES).passed
    assert not compare_outputs(job, arrays, answering(arrays, 0.7 * change * spread), CACHES).passed


def test_a_wrong_artifact_does_not_pass(job: Job) -> None:
    arrays = check_arrays(job, changed=0.001)
    spread = float(np.std(np.concatenate([arrays[f"{index}.decided"] for index in range(3)])))
    assert compare_outputs(job, arrays, answering(arrays, 0.0002 * spread), WEIGHTS).passed
    assert not compare_outputs(job, arrays, answering(arrays, 0.01 * spread), WEIGHTS).passed
    assert compare_outputs(job, arrays, answering(arrays, 0.01 * spread), INPUTS).passed
    assert not compare_outputs(job, arrays, answering(arrays, 0.2 * spread), INPUTS).passed
    nothing = compare_outputs(job, arrays, answering(arrays, float("nan")), INPUTS)
    assert not nothing.passed


@pytest.mark.parametrize(("dtype", "step"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_a_cast_allows_for_16_bit_arithmetic_and_no_more(job: Job, dtype: str, step: float) -> None:
    arrays = check_arrays(job, changed=0.001)
    spread = float(np.std(np.concatenate([arrays[f"{index}.decided"] for index in range(3)])))
    cast = [{"activation": "", "dtype": dtype}]
    assert compare_outputs(job, arrays, answering(arrays, 4 * step * spread), cast).passed
    assert not compare_outputs(job, arrays, answering(arrays, 40 * step * spread), cast).passed


def test_rounded_inputs_may_differ_by_half_of_what_the_recipe_changed(job: Job) -> None:
    arrays = check_arrays(job, changed=0.5)
    found = compare_outputs(job, arrays, answering(arrays, 0.0), INPUTS)
    assert found.allowed == pytest.approx(0.5 * found.change)
    assert found.allowed > 0.05


class Wrong(TorchFolder):
    """Write a folder whose classifier has changed after the decision, or say that a tensor is held otherwise."""

    def __init__(self, spoil: str) -> None:
        self.spoil = spoil

    def write(self, candidate: Any, folder: Any, request: Any) -> None:
        if self.spoil == "outputs":
            candidate.module.classifier.weight.data *= -1
        super().write(candidate, folder, request)

    def stored_tensors(self, folder: Any) -> list[StoredTensor]:
        stored = super().stored_tensors(folder)
        if self.spoil == "outputs":
            return stored
        return [replace(tensor, bits=2) if tensor.name == DOCTORED else tensor for tensor in stored]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("outputs", "re-opened in torch, its outputs differ from the in-memory model's by"),
        ("tensors", "the file does not hold what the recipe says of"),
    ],
)
def test_a_wrong_artifact_is_rejected_whatever_it_scores(job: Job, tables: Tables, spoil: str, why: str) -> None:
    wrong = replace(job, runtime=Wrong(spoil), scored=False)
    tried, _ = prove(
        wrong, None, (Quantize(ignore=("classifier",)),), _no_prediction(tables.original), tables.original, None
    )
    assert tried.verdict == "FAIL"
    assert why in tried.rejected
    assert tried.measured is not None


def test_steps_are_applied_in_order_and_all_decisions_kept(job: Job) -> None:
    candidate, decisions = apply_steps(job, (*STEPS, Cast()))
    assert [list(entry) for entry in candidate.applied] == [["quantize"], ["quantize"], ["cast"]]
    assert sorted(candidate.quantized) == sorted(d.parameter for d in decisions if d.weight)
    again, _ = apply_steps(job, (*STEPS, Cast()))
    for name, values in candidate.module.named_parameters():
        np.testing.assert_array_equal(values.detach().numpy(), again.module.get_parameter(name).detach().numpy())


def test_the_first_layer_that_a_runtime_refuses_is_named(job: Job) -> None:
    per_token = Quantize(activations="dynamic", activation_scope="token")
    reason = refused_by(get_runtime("onnxruntime"), job.model, [per_token])
    assert reason is not None
    assert reason.startswith("bert.encoder.layer.0.attention.self.query: ")
    assert "not one per token" in reason
    assert refused_by(get_runtime("onnxruntime"), job.model, [Quantize(activations="dynamic")]) is None


def test_thin_layers_beside_weights_need_a_place_in_the_files(job: Job) -> None:
    steps = [Quantize(bits=8), Compensate(rank=4)]
    assert refused_by(get_runtime("torch"), job.model, steps) is None
    assert "have no place for thin layers" in str(refused_by(get_runtime("gguf"), job.model, steps[1:]))


def test_four_bit_floats_are_held_beside_bf16_only(job: Job) -> None:
    codes = Quantize(format="nvfp4", ignore=("classifier",))
    reason = refused_by(get_runtime("torch"), job.model, [codes])
    assert reason is not None
    assert "cast: {dtype: bf16}" in reason
    assert refused_by(get_runtime("torch"), job.model, [codes, Cast(dtype="bf16")]) is None
    assert refused_by(get_runtime("torch"), job.model, [codes, Cast(dtype="fp16")]) is not None
    assert refused_by(get_runtime("onnxruntime"), job.model, [codes]) is None
    assert "no place for nf4" in str(refused_by(get_runtime("torch"), job.model, [Quantize(format="nf4")]))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(Quantize(format="fp8"),), (Quantize(format="mxfp4"), Cast())], ids=["fp8", "mxfp4"])
def test_other_formats_are_read_back_as_asked(job: Job, steps: tuple[Quantize, ...]) -> None:
    built = build_artifact(job, steps)
    stored = job.runtime.stored_tensors(built.folder / "artifact")
    rows = compare_tensors(job.model, built.value["decisions"], stored)
    assert all(row.agrees for row in rows)
    query = next(row for row in rows if row.parameter == DOCTORED)
    assert query.asked == query.found == ("fp8 per channel" if len(steps) == 1 else "mxfp4 group 32")
    integers = [replace(tensor, dtype="int8") if tensor.name == DOCTORED else tensor for tensor in stored]
    wrong = compare_tensors(job.model, built.value["decisions"], integers)
    assert [row.parameter for row in wrong if not row.agrees] == [DOCTORED]
    found, inputs = check_artifact(job, built, steps), predicted_size(job, steps)
    assert found[0].passed
    assert inputs == sum(row.bytes for row in rows)


def predicted_size(job: Job, steps: tuple[Quantize, ...]) -> int:
    """Return what the runtime predicts of the layers' bytes."""
    decided = {d.parameter: d.weight for step in steps for d in step.resolve(job.model) if d.weight is not None}
    dtype_bytes = 4 if len(steps) == 1 else 2
    return sum(
        job.runtime.stored_bytes(layer.role, layer.shape, decided.get(f"{layer.name}.weight"), dtype_bytes)
        for layer in job.model.layers
    )


def test_only_so_many_rows_of_a_large_output_are_kept() -> None:
    wide = np.arange(2 * 300 * 20_000, dtype=np.float32).reshape(2, 300, 20_000)
    rows = thinned(wide)
    assert rows.shape == (CHECKED_VALUES // 20_000, 20_000)
    assert rows[0, 0] == 0
    assert rows[-1, 0] > 0.9 * wide.max()
    assert thinned(wide[:, :3]).shape == (6, 20_000)
    assert thinned(np.ones((1, 2 * CHECKED_VALUES), np.float32)).shape == (1, 2 * CHECKED_VALUES)
