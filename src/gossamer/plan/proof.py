"""Build one candidate, write its artifact, open it again in a fresh process, and measure it against the original.

Four steps, each remembered by the run: `artifact` (apply the recipe, write the files), `checked` (what the files hold
and what they compute, against the recipe and the in-memory model), `scored` (the held-out rows, in pairs with the
original), `timed` (latency in turns with the original; peak memory).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from gossamer.measure.latency import time_in_turns
from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import paired_quality, score_interval
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.tokenizer_files import TOKENIZER
from gossamer.plan.budget import samples_memory
from gossamer.plan.comparison import compare_outputs, compare_tensors, thinned
from gossamer.plan.job import Job, load_evaluation, save_evaluation
from gossamer.plan.original import baseline, latency_record, metric_figure, reported
from gossamer.plan.records import Equivalence, Figure, LatencyRecord, Measured, TensorRow
from gossamer.run.workspace import StepResult
from gossamer.runtimes.base import Runtime
from gossamer.runtimes.manifest import artifact_files, copy_companions, write_manifest
from gossamer.tasks.base import Arrays, Evaluation, Scores, spread
from gossamer.techniques.base import Context, Decision, Technique, resolved
from gossamer.techniques.registry import recipe_of

APPLY = "apply"  # what the process that leads tells the others
NUM_CHECKED_BATCHES = 8
NUM_STREAMED_BATCHES = 2  # of a model that is read from disk for each pass


def build_artifact(job: Job, steps: Sequence[Technique]) -> StepResult:
    """Return the step that holds `artifact/`, what it should compute, and (its value) the decisions that made it."""
    inputs = artifact_inputs(job, steps)
    entries, rows_used = inputs["recipe"], inputs["calibration"]

    def keep(name: str, write: Callable[[Path], None]) -> Path:
        kept = job.run.step("shard", {**inputs, "file": name}, lambda folder: write(folder / name))
        return kept.folder / name

    def build(folder: Path) -> dict[str, Any]:
        job.team.everywhere(APPLY)  # the other processes wait for this, and apply the steps too
        candidate, decisions = apply_steps(job, steps)
        save_file(_checked_arrays(job, candidate), folder / "expected.safetensors")
        target = folder / "artifact"
        target.mkdir()
        began = time.monotonic()
        with job.progress.stage(f"writing for {job.runtime.name}", None):
            job.runtime.write(candidate, target, replace(job.read_by(candidate.source).request(), keep=keep))
        job.run.record("written", runtime=job.runtime.name, seconds=round(time.monotonic() - began, 3))
        copy_companions(candidate.source, target)
        write_manifest(
            target,
            runtime=job.runtime.name,
            task=job.task.name,
            task_settings=dict(job.task_settings),
            recipe=entries,
            model=job.source.name,
            model_fingerprint=job.prints["model"],
            calibration_fingerprint=rows_used,
            seed=job.seed,
            versions=dict(package_versions()),
        )
        experts = [{"name": name, **found} for name, found in candidate.routed.items()]
        made = [_decision_json(decision) for decision in decisions]
        return {"decisions": made, "experts": experts, "fallbacks": candidate.fallbacks}

    made = job.run.step("artifact", inputs, build)
    for path in (made.folder / "artifact").glob("*.safetensors"):  # from here on they are the artifact's alone
        job.run.discard("shard", {**inputs, "file": path.name})
    return made


def artifact_inputs(job: Job, steps: Sequence[Technique]) -> dict[str, Any]:
    """Return what the step that writes a recipe's artifact depends on."""
    rows_used = job.prints["calibration"] if any(step.rows_needed() for step in steps) else None
    entries = [step.entry() for step in steps]
    inputs = job.step_inputs(recipe=entries, runtime=job.runtime.name, calibration=rows_used, seed=job.seed)
    if any(step.needs.training for step in steps):
        inputs["training"] = job.prints["training"]
    return inputs | tokens_print(job, steps)


def tokens_print(job: Job, steps: Sequence[Technique]) -> dict[str, str]:
    """Return what identifies the tokens that some steps leave, as an input of what they make; nothing if all stay."""
    words = resolved(job.model, steps)[1].words
    if words is None or words is job.model.words:
        return {}
    return {"tokenizer": hashlib.sha256(words.source.beside.read(TOKENIZER)).hexdigest()}


def apply_steps(job: Job, steps: Sequence[Technique]) -> tuple[Candidate, list[Decision]]:
    """Return a fresh candidate with every step applied, and all that was decided, wider grids of gates included."""
    candidate = job.candidate()
    context = Context(
        task=job.task,
        example=job.evaluation[0].inputs,
        calibration=job.calibration,
        progress=job.progress,
        seed=job.seed,
        run=job.run,
        identity=job.step_inputs(calibration=job.prints["calibration"], seed=job.seed),
        team=job.team,
        device=job.device,
        training=partial(getattr, job, "training"),
        training_print=job.prints["training"],
        holds=lambda layer, spec: job.runtime.refusal(layer.role, layer.shape, spec, None) is None,
    )
    decisions: list[Decision] = []
    model = job.model
    for step in steps:
        decisions += step.resolve(model)
        context = replace(context, samples_memory=samples_memory(job, step))
        source = candidate.source
        candidate = step.apply(candidate, model, context)
        if candidate.source is not source:  # from here on the rows are read by another tokenizer
            reading = job.read_by(candidate.source)
            context = replace(
                context,
                calibration=reading.calibration,
                example=reading.evaluation[0].inputs,
                training=partial(getattr, reading, "training"),
                as_original=partial(getattr, job, "training"),
            )
        model = step.after(model)
    wide = candidate.widened
    return candidate, [replace(one, weight=wide[one.parameter]) if one.parameter in wide else one for one in decisions]


def _checked_arrays(job: Job, candidate: Candidate) -> Arrays:
    """Return inputs of a few held-out batches with the in-memory candidate's and the original's outputs on them."""
    output = job.task.output
    arrays: dict[str, NDArray[Any]] = {}
    for kind, model in (("original", job.candidate()), ("decided", candidate)):  # the inputs kept are the second's
        reading = job.read_by(model.source)
        batches = spread(reading.evaluation, NUM_CHECKED_BATCHES if job.budget is None else NUM_STREAMED_BATCHES)
        with job.progress.stage(f"outputs to compare with: {kind}", len(batches)) as advance:
            for index, (batch, found) in enumerate(
                zip(batches, job.computed(model, [batch.inputs for batch in batches]), strict=True)
            ):
                arrays |= {f"{index}.input.{name}": np.ascontiguousarray(v) for name, v in batch.inputs.items()}
                arrays[f"{index}.{kind}"] = thinned(found[output])
                advance(1)
    return arrays


def _decision_json(decision: Decision) -> dict[str, Any]:
    return {
        "parameter": decision.parameter,
        "role": decision.layer.role,
        "shape": list(decision.layer.shape),
        "weight": decision.weight.model_dump() if decision.weight else None,
        "activation": str(decision.activation) if decision.activation else "",
        "dtype": decision.dtype,
        "cache": str(decision.cache) if decision.cache else "",
        "cut": str(decision.cut) if decision.cut else "",
    }


def as_served(job: Job, artifact: Path) -> Job:
    """Return the job with its rows as the artifact's own tokenizer reads them, where that is not the original's."""
    ours = artifact / TOKENIZER
    if TOKENIZER not in job.source.beside.names or not ours.exists():
        return job
    if ours.read_bytes() == job.source.beside.read(TOKENIZER):
        return job
    return job.read_by(Source.companions(artifact, trust_remote_code=job.source.trust_remote_code))


def check_artifact(
    job: Job, built: StepResult, steps: Sequence[Technique]
) -> tuple[Equivalence, tuple[TensorRow, ...]]:
    """Open the artifact in a fresh process and compare its tensors with the recipe, its outputs with memory's."""
    inputs = {"artifact": built.folder.name}
    model = resolved(job.model, steps)[1]
    value = job.run.step("checked", inputs, lambda _: _check(job, model, built.folder, built.value["decisions"])).value
    return Equivalence.model_validate(value["equivalence"]), tuple(
        TensorRow.model_validate(r) for r in value["tensors"]
    )


def _check(job: Job, model: ModelMap, folder: Path, decisions: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = compare_tensors(model, decisions, job.runtime.stored_tensors(folder / "artifact"))
    arrays = load_file(folder / "expected.safetensors")
    with job.proved.out(folder, partial(job.serve, folder / "artifact")) as served:
        equivalence = compare_outputs(job, arrays, served.run_all, decisions)
    return {
        "equivalence": equivalence.model_dump(mode="json"),
        "tensors": [row.model_dump(mode="json") for row in tensors],
    }


def score_artifact(job: Job, folder: Path, original: Evaluation) -> Evaluation:
    """Return the artifact's scores on the held-out rows, with divergence and agreement to the original."""

    def build(step: Path) -> dict[str, Any]:
        batches = as_served(job, folder / "artifact").evaluation
        with job.proved.out(folder, partial(job.serve, folder / "artifact")) as served:
            run_all = reported(served.run_all, job.progress, "scoring the artifact")
            evaluation = job.task.evaluate(run_all, batches, original)
        # what the artifact kept is only needed of the original: scores are small, log-probabilities are not
        save_evaluation(Evaluation(evaluation.scores, {}, evaluation.divergence, evaluation.agreement), step / NAME)
        return {}

    inputs = {"artifact": folder.name, "rows": job.prints["evaluation"]}
    return load_evaluation(job.run.step("scored", inputs, build).folder / NAME)


NAME = "evaluation.safetensors"
LONGER: dict[str, Any] = {"budget_seconds": 32.0, "max_rounds": 240}
SECOND_LOOK = 0.975


def time_artifact(job: Job, folder: Path, *, longer: bool = False) -> dict[str, Any]:
    """Return {latency, original, ratio by statistic, memory} of the artifact and the original, timed in turns.

    `longer` is the second look at what the first left undecided: four times as long, with intervals that hold in 97.5 %
    of all cases. Two looks err more often than one: at most 5 % and 2.5 % together.
    """

    def build(_: Path) -> dict[str, Any]:
        request = as_served(job, folder / "artifact").latency_inputs
        with job.serve(folder / "artifact") as served, baseline(job) as original:
            with job.progress.stage(f"timing in turns with the original{', longer' if longer else ''}", None):
                pair = time_in_turns(served, original, request, job.latency_inputs, **(LONGER if longer else {}))
            memory = served.peak_memory()
        assert pair.b is not None
        confidence = SECOND_LOOK if longer else 0.95
        ratios = {s: pair.ratio_of(s, confidence=confidence) for s in ("p50", "p95", "p99", "mean")}
        return {
            "latency": latency_record(pair.a).model_dump(mode="json"),
            "original": latency_record(pair.b).model_dump(mode="json"),
            "ratios": {s: [r.value, r.low, r.high, r.n] for s, r in ratios.items()},
            "memory": memory,
        }

    inputs: dict[str, Any] = {"artifact": folder.name, "threads": job.threads}
    if longer:
        inputs["longer"] = True
    return dict(job.run.step("timed", inputs, build).value)


def measure(
    job: Job,
    folder: Path,
    equivalence: Equivalence,
    tensors: tuple[TensorRow, ...],
    reference: Evaluation | None,
    model: ModelMap,
    *,
    longer: bool = False,
) -> Measured:
    """Return every figure of an artifact that was written and checked; quality only where there are rows.

    `model` is the map of what the recipe left; `longer` as of `time_artifact`.
    """
    figures = {}
    if reference is not None:
        figures = quality_figures(job, score_artifact(job, folder, reference), reference)
    job.proved.close()  # what is timed and weighed has computed nothing before
    latency = original_latency = LatencyRecord.not_measured()
    if job.budget is None:
        times = time_artifact(job, folder, longer=longer)
        latency, original_latency = (LatencyRecord.model_validate(times[side]) for side in ("latency", "original"))
        for statistic, (value, low, high, n) in times["ratios"].items():
            figures[f"latency {statistic}"] = _seconds(getattr(latency, statistic), value, low, high, n)
            figures[f"latency {statistic} ratio"] = Figure(value=value, low=low, high=high, n=n)
        figures["throughput"] = Figure.exact(latency.throughput, "1/s", higher_is_better=True)
        figures["memory"] = Figure.exact(times["memory"], "B")
    figures["size"] = Figure.exact(shipped_bytes(artifact_files(folder / "artifact")), "B")
    figures["params"] = Figure.exact(model.num_parameters, "")
    figures["flops"] = Figure.exact(2 * model.macs, "")
    return Measured(
        figures=figures,
        latency=latency,
        original_latency=original_latency,
        equivalence=equivalence,
        tensors=tensors,
    )


def quality_figures(job: Job, evaluation: Evaluation, reference: Evaluation) -> dict[str, Figure]:
    """Return the metric, the share of quality kept (paired), divergence and agreement, with their intervals."""
    share = paired_quality(evaluation.scores, reference.scores, job.task.metric, seed=job.seed)
    found = {
        "metric": metric_figure(job, evaluation),
        "quality": Figure(value=share.value, low=share.low, high=share.high, n=share.n, higher_is_better=True),
    }
    for name, scores, unit, more in (
        ("kl", evaluation.divergence, "nats", False),
        ("agreement", evaluation.agreement, "", True),
    ):
        if isinstance(scores, Scores):
            interval = score_interval(scores)
            found[name] = Figure(
                value=interval.value,
                low=interval.low,
                high=interval.high,
                n=interval.n,
                unit=unit,
                higher_is_better=more,
            )
    return found


def _seconds(value: float, ratio: float, low: float, high: float, n: int) -> Figure:
    """Return a latency in seconds with the relative width that its paired ratio was found to have."""
    return Figure(value=value, low=value * low / ratio, high=value * high / ratio, n=n, unit="s")


def package_versions() -> dict[str, str]:
    """Return the versions that decide what bytes an artifact has."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in (
        "gossamer",
        "torch",
        "transformers",
        "compressed-tensors",
        "onnx",
        "onnxruntime",
        "openvino",
        "gguf",
        "peft",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def steps_recipe(steps: Sequence[Technique]) -> list[dict[str, Any]]:
    """Return the recipe entries of some steps, as they are printed and kept."""
    return [{step.technique: dict(step.settings)} for step in recipe_of(list(steps)).steps]


def refused_by(runtime: Runtime, model: ModelMap, steps: Sequence[Technique]) -> str | None:
    """Return why the runtime cannot hold what a recipe decides, naming the first such layer, or None when it can."""
    decisions, after = resolved(model, steps)
    if not runtime.holds_adapters and any(layer.role == "adapter" for layer in after.layers):
        return f"files for {runtime.name} have no place for thin layers beside weights; merge them: lora, merge: true"
    floats = next((decision.dtype for decision in decisions if decision.dtype), "float32")
    for decision in decisions:
        block = decision.weight.block_format if decision.weight is not None else None
        reason: str | None
        if block is not None and not runtime.holds_blocks:
            reason = f"{block.name} blocks are those of GGUF files; use --runtime gguf"
        elif decision.cut is not None:
            reason = runtime.cut_refusal(decision.cut)
        elif decision.cache is not None:
            reason = runtime.cache_refusal
        else:
            reason = runtime.refusal(decision.layer.role, decision.layer.shape, decision.weight, decision.activation)
        if reason is None and decision.weight is not None:
            reason = runtime.refusal_beside(decision.weight, floats)
        if reason is not None:
            return f"{decision.layer.name}: {reason}"
    chosen = {decision.layer.name: decision.weight for decision in decisions if decision.weight is not None}
    return runtime.refusal_together(after, chosen)
