"""What the predictions rest on: the effect of each step on quality, and the time of each layer in the real runtime.

    effect(step)       mean KL to the original and share of quality kept, on calibration rows, in memory
    seconds(format)    one layer alone, with its real input shape, written by the runtime and timed in a child process

Both are tables of measured figures; `predict.py` adds them up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.models.candidate import Candidate
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.models.source import Source
from gossamer.plan.job import KEPT_OPEN, InMemory, Job, load_evaluation, save_evaluation
from gossamer.plan.proof import apply_steps, tokens_print
from gossamer.plan.records import Record
from gossamer.run.workspace import StepResult
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.process import Served
from gossamer.tasks.base import Evaluation
from gossamer.techniques.base import Decision, Technique

EVALUATION = "evaluation.safetensors"
INPUT = "x"
REPEATS, ROUNDS = 20, 5


@dataclass(frozen=True)
class Effect:
    """Hold what one step alone does on calibration rows: mean KL (nats), share of quality kept, agreement."""

    kl: float
    quality: float
    agreement: float


class LayerFormat(Record):
    """Name how a layer is held and fed, so that equal layers in equal formats are timed once."""

    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    weight: str
    activation: str


@dataclass(frozen=True)
class Profile:
    """Hold the measured tables: input shape of each layer, effect of each step, seconds of each layer format."""

    shapes: dict[str, tuple[int, ...]]
    effects: dict[Technique, Effect]
    seconds: dict[LayerFormat, float]

    def knows(self, steps: Iterable[Technique]) -> bool:
        """Say whether every step has been measured, but for repairs, which do nothing alone."""
        return all(step in self.effects for step in steps if step.divergence_left == 1)


def input_shapes(job: Job) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's first input for the request whose latency is the goal's."""
    shapes: dict[str, tuple[int, ...]] = {}
    module = job.candidate().module
    with ExitStack() as stack:
        for layer in job.model.layers:
            if layer.kind in ("linear", "conv") and layer.experts is None:  # experts see what the router sends them

                def note(_: nn.Module, inputs: tuple[Any, ...], name: str = layer.name) -> None:
                    shapes[name] = tuple(inputs[0].shape)

                handle = module.get_submodule(layer.name).register_forward_pre_hook(note)
                stack.callback(handle.remove)
        InMemory(job.source, module, job.task.output)(job.latency_inputs)
    return shapes


def layer_formats(
    model: ModelMap, decisions: Sequence[Decision], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LayerFormat]:
    """Return the format of every linear and convolution layer under some decisions, by layer name.

    A tied head is left out: its time is the embedding's matter, and it is not stored alone.
    """
    by_layer = {decision.layer.name: decision for decision in decisions if decision.weight is not None}
    formats = {}
    for layer in model.layers:
        if layer.name in shapes and layer.tied_to is None:
            decision = by_layer.get(layer.name)
            formats[layer.name] = LayerFormat(
                kind=layer.kind,
                shape=layer.shape,
                input_shape=_input_shape(layer, shapes[layer.name]),
                weight=str(decision.weight) if decision else "float32",
                activation=str(decision.activation) if decision and decision.activation else "",
            )
    return formats


def _input_shape(layer: LayerInfo, seen: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a layer's input, which was seen before anything was cut."""
    if layer.kind == "linear":
        return (*seen[:-1], layer.shape[1])
    return (seen[0], layer.shape[1] * layer.groups, *seen[2:])


def profile(job: Job, steps: Iterable[Technique], known: Profile | None = None) -> Profile:
    """Return the measured tables for these steps, added to what is known: effects, and times of layer formats."""
    shapes = known.shapes if known else input_shapes(job)
    effects: dict[Technique, Effect] = dict(known.effects) if known else {}
    distinct = [step for step in dict.fromkeys(steps) if step not in effects and step.divergence_left == 1]
    reference = _reference(job)
    unchanged = _unchanged_layers(job, shapes)
    formats: dict[LayerFormat, Path] = {}
    with job.progress.stage("effect of each step on calibration rows", len(distinct)) as advance:
        for step in distinct:
            effects[step], layers = _effect(job, step, reference, shapes)
            formats |= {found: folder for found, folder in layers.items() if found not in formats}
            advance(1)
    seconds = _seconds(job, unchanged, formats, known.seconds if known else {})
    return Profile(shapes=shapes, effects=effects, seconds=seconds)


def _seconds(
    job: Job,
    unchanged: Mapping[LayerFormat, Path],
    formats: Mapping[LayerFormat, Path],
    known: Mapping[LayerFormat, float],
) -> dict[LayerFormat, float]:
    """Return what is known of layers' seconds, and those of formats that are new.

    They take turns with the layers as they are, whose seconds of now and of then say how far the machine has drifted.
    """
    new = {one: folder for one, folder in formats.items() if one not in known and one not in unchanged}
    if known and not new:
        return dict(known)
    timed = _layer_seconds(job, {**unchanged, **new})
    drift = median([known[one] / timed[one] for one in unchanged if one in known] or [1.0])
    return {**{one: drift * seconds for one, seconds in timed.items()}, **known}


def _reference(job: Job) -> Evaluation:
    """Return the original's evaluation of the calibration batches on which steps are measured."""

    def build(folder: Path) -> dict[str, Any]:
        save_evaluation(job.evaluate(job.candidate(), job.profiled), folder / EVALUATION)
        return {}

    inputs = job.step_inputs(rows=job.prints["calibration"], batches=len(job.profiled))
    return load_evaluation(job.run.step("calibration-reference", inputs, build).folder / EVALUATION)


def _effect(
    job: Job, step: Technique, reference: Evaluation, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Effect, dict[LayerFormat, Path]]:
    """Return what one step does to quality, and its layers as small artifacts to be timed."""

    def build(folder: Path) -> dict[str, Any]:
        # a vocabulary that was counted on the very rows that judge it would seem to lose nothing
        model = replace(job.model, words=job.model.words.apart) if job.model.words is not None else job.model
        candidate, decisions = apply_steps(replace(job, model=model), [step])
        found = job.evaluate(candidate, job.read_by(candidate.source).profiled, reference)
        assert found.divergence is not None
        assert found.agreement is not None
        return {
            "kl": max(0.0, found.divergence.mean()),
            "quality": float(job.task.metric.quality(found.scores.mean(), reference.scores.mean())),
            "agreement": found.agreement.mean(),
            "layers": _write_layers(job, candidate, layer_formats(job.model, decisions, shapes), folder)
            if not any(decision.cut for decision in decisions)
            else [],  # cut blocks are timed as such (`block_times.py`)
        }

    inputs = job.step_inputs(
        step=step.entry(),
        rows=job.prints["calibration"],
        seed=job.seed,
        runtime=job.runtime.name,
        shapes={name: list(shape) for name, shape in shapes.items()},
        **tokens_print(job, [step]),
    )
    result = job.run.step("effect", inputs, build)
    value = result.value
    return Effect(kl=value["kl"], quality=value["quality"], agreement=value["agreement"]), _read_layers(result)


def _unchanged_layers(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> dict[LayerFormat, Path]:
    """Return the layers as they are, as small artifacts to be timed."""

    def build(folder: Path) -> dict[str, Any]:
        if not job.runtime.holds_layers:
            return {"layers": []}
        candidate = Candidate(source=job.source, module=job.source.module(job.task))
        return {"layers": _write_layers(job, candidate, layer_formats(job.model, [], shapes), folder)}

    shapes_json = {name: list(shape) for name, shape in shapes.items()}
    inputs = job.step_inputs(runtime=job.runtime.name, shapes=shapes_json)
    return _read_layers(job.run.step("layers", inputs, build))


def _write_layers(
    job: Job, candidate: Candidate, formats: Mapping[str, LayerFormat], folder: Path
) -> list[dict[str, Any]]:
    """Write one small artifact for each distinct format, and return [{format, folder}]; none if none can be held."""
    if not job.runtime.holds_layers:
        return []
    named = {layer_format: name for name, layer_format in reversed(list(formats.items()))}
    written = []
    for index, (layer_format, name) in enumerate(sorted(named.items(), key=lambda item: item[1])):
        target = folder / f"layer-{index}"
        target.mkdir()
        alone = _alone(candidate, name)
        example = np.random.default_rng(0).standard_normal(layer_format.input_shape).astype(np.float32)
        request = ExportRequest(
            task=job.task, example={INPUT: example}, axes={}, outputs=(job.task.output,), cache=job.request().cache
        )
        job.runtime.write(alone, target, request)
        written.append({"format": layer_format.model_dump(mode="json"), "folder": target.name})
    return written


def _read_layers(result: StepResult) -> dict[LayerFormat, Path]:
    return {LayerFormat.model_validate(e["format"]): result.folder / e["folder"] for e in result.value["layers"]}


def _alone(candidate: Candidate, name: str) -> Candidate:
    """Return one layer of a candidate as a candidate of its own."""
    network = _OneLayer(candidate.module.get_submodule(name))
    blank = copy.deepcopy(network)  # layers that differ in their values alone share one exported graph
    with torch.no_grad():
        for values in blank.parameters():
            values.zero_()
    source = Source.open(blank, forward=lambda module, inputs: module(inputs[INPUT]), name=name)
    alone = Candidate(source=source, module=network, dtype=candidate.dtype)
    codes = candidate.quantized.get(f"{name}.weight")
    if codes is not None:
        alone.quantized["layer.weight"] = codes
    if name in candidate.activations:
        alone.activations["layer"] = candidate.activations[name]
    return alone


class _OneLayer(nn.Module):
    """Hold one layer, so that it can be exported and timed alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return cast("Tensor", self.layer(x))


def _layer_seconds(job: Job, formats: Mapping[LayerFormat, Path]) -> dict[LayerFormat, float]:
    """Return the median seconds of each format, the layers taken in turns so that drift meets all alike."""
    if not formats:
        return {}

    def build(_: Path) -> list[float]:
        return _time_in_rounds(job, formats)

    inputs: dict[str, Any] = {
        "layers": [f"{path.parent.name}/{path.name}" for path in formats.values()],
        "threads": job.threads,
    }
    seconds = job.run.step("layer-times", inputs, build).value
    return dict(zip(formats, seconds, strict=True))


def _time_in_rounds(job: Job, formats: Mapping[LayerFormat, Path]) -> list[float]:
    found: dict[LayerFormat, list[float]] = {layer_format: [] for layer_format in formats}
    files = (path for folder in formats.values() for path in folder.rglob("*") if path.is_file())
    keep = sum(path.stat().st_size for path in files) <= KEPT_OPEN
    with job.progress.stage(f"timing layers in {job.runtime.name}", ROUNDS * len(formats)) as advance:
        served = Served(job.runtime.name, next(iter(formats.values())), threads=job.threads)
        with served:
            for _ in range(ROUNDS):
                for layer_format, folder in formats.items():
                    served.reopen(folder, keep=keep)
                    example = np.random.default_rng(0).standard_normal(layer_format.input_shape).astype(np.float32)
                    found[layer_format].append(min(served.time({INPUT: example}, REPEATS, warmup=3)))
                    advance(1)
    return [median(times) for times in found.values()]
