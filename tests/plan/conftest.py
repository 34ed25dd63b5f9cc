"""What the planner's tests share: tables made by hand, the tiny job on disk, short timings, finished runs."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer import api
from gossamer.measure.latency import time_in_turns
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.plan import budget
from gossamer.plan.job import Job
from gossamer.plan.predict import Tables
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.plan.profile import Effect, Profile, layer_formats
from gossamer.plan.records import Figure, LatencyRecord, Original, PlanResult, RunResult
from gossamer.run.workspace import Run
from gossamer.runtimes import get_runtime
from gossamer.runtimes.process import Served
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.quantize import Quantize

TASK = "text-classification"


@contextmanager
def brief_timing() -> Iterator[None]:
    """Time as always, in processes of their own and in turns, but for a second instead of eight."""
    assert time_in_turns.__kwdefaults__ is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(time_in_turns.__kwdefaults__, "budget_seconds", 1.0)
        patch.setitem(time_in_turns.__kwdefaults__, "round_seconds", 0.02)
        yield


@contextmanager
def noted_servings() -> Iterator[list[Path]]:
    """Note the folder of every artifact for which a process is started."""
    folders: list[Path] = []
    serve = Job.serve

    def noted(self: Job, folder: Path, runtime: str | None = None) -> Served:
        folders.append(folder)
        return serve(self, folder, runtime)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "serve", noted)
        yield folders


@pytest.fixture(autouse=True)
def brief() -> Iterator[None]:
    """Give every test here short timings."""
    with brief_timing():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny job: model/, train.jsonl, test.jsonl."""
    script = runpy.run_path(str(Path(__file__).parent / "tiny_job.py"))
    folder: Path = script["write_job"](tmp_path_factory.mktemp("tiny"))
    return folder


def arguments(tiny: Path, **more: Any) -> dict[str, Any]:
    """Return what every verb is asked here, with what a test asks besides."""
    given = {"task": TASK, "data": tiny / "train.jsonl", "evaluation": tiny / "test.jsonl", "threads": 1}
    return {**given, "calibration_rows": 24, **more}


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, Any]]:
    """Give tests the arguments of the verbs."""
    return arguments


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny Llama in bfloat16 with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("speaker")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    letters = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    return folder


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing fit: every model is read piece by piece."""
    monkeypatch.setattr(budget, "WHOLE_COPIES", 1e9)
    monkeypatch.setattr(budget, "LEAST_BUDGET", 0)
    monkeypatch.setattr(budget, "SHARE_OF_WEIGHTS", 0.0)


@dataclass
class Noted:
    """Keep what a run says about its progress."""

    lines: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
        self.lines.append(name)
        yield lambda done: None

    def say(self, message: str) -> None:
        self.lines.append(message)

    def record(self, series: str, step: int, values: Any) -> None:
        pass


@dataclass(frozen=True)
class Finished:
    """Hold a finished run: what was returned, its folder, the arguments, and what it said."""

    result: RunResult
    out: Path
    arguments: dict[str, Any]
    said: tuple[str, ...]
    plan: PlanResult | None = None
    served: tuple[Path, ...] = ()  # the folders for which a process was started

    @property
    def artifact(self) -> Path:
        return self.out / "artifact"


@pytest.fixture(scope="session")
def optimized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Plan, then optimize the tiny model for a goal that it can reach, for PyTorch, in one folder."""
    out, noted = tmp_path_factory.mktemp("optimized") / "build", Noted()
    given = arguments(tiny, goal="quality >= 97%, size <= 40%", runtime="torch", out=out)
    with brief_timing(), noted_servings() as served:
        plan = api.plan(tiny / "model", **given)
        assert not (out / "artifact").exists()
        result = api.optimize(tiny / "model", **given, track=("tensorboard",), progress=noted)
    return Finished(result, out, given, tuple(noted.lines), plan, tuple(served))


@pytest.fixture(scope="session")
def applied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Apply a recipe to the tiny model for ONNX Runtime, without a goal."""
    folder, noted = tmp_path_factory.mktemp("applied"), Noted()
    recipe = folder / "recipe.yaml"
    recipe.write_text("- quantize: {targets: [embedding]}\n- quantize: {activations: dynamic}\n", encoding="utf-8")
    given = arguments(tiny, runtime="onnxruntime", out=folder / "build")
    with brief_timing():
        result = api.apply(recipe, tiny / "model", **given, progress=noted)
    return Finished(result, folder / "build", given, tuple(noted.lines))


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> Iterator[Job]:
    """Open the tiny job for PyTorch over an empty run folder."""
    inputs = Inputs(model=tiny / "model", runtime="torch", **arguments(tiny))
    prepared = prepare(inputs)
    with Run(tmp_path / "run", {"a": "test"}) as run, opened_job(inputs, prepared, run) as opened:
        yield opened


# ---------------------------------------------------------------- tables made by hand

LAYERS = (
    LayerInfo(name="embed", kind="embedding", role="embedding", shape=(100, 16), num_parameters=1600),
    LayerInfo(name="up", kind="linear", role="up", shape=(32, 16), num_parameters=512, macs=512),
    LayerInfo(name="down", kind="linear", role="down", shape=(16, 32), num_parameters=512, macs=512),
    LayerInfo(name="norm", kind="norm", role="norm", shape=(16,), num_parameters=16),
    LayerInfo(name="head", kind="linear", role="head", shape=(100, 16), num_parameters=0, tied_to="embed.weight"),
)
SHAPES = {"up": (1, 4, 16), "down": (1, 4, 32), "head": (1, 4, 16)}
SECONDS = {"float32": (0.30, 0.25), "int8": (0.20, 0.10), "int4": (0.28, 0.15)}
EFFECTS = {
    Cast(dtype="bf16"): Effect(kl=0.0002, quality=1.0, agreement=1.0),
    Quantize(bits=8): Effect(kl=0.0008, quality=0.99, agreement=0.996),
    Quantize(bits=4, group_size=16): Effect(kl=0.02, quality=0.97, agreement=0.96),
    Quantize(bits=2): Effect(kl=0.5, quality=0.6, agreement=0.5),
    Quantize(targets=("embedding",)): Effect(kl=0.0003, quality=1.0, agreement=1.0),
}


def latency(p50: float) -> LatencyRecord:
    """Return a distribution whose p95 is 1.5 times and whose p99 is twice its median."""
    return LatencyRecord(
        samples=(p50,), p50=p50, p95=1.5 * p50, p99=2 * p50, mean=1.1 * p50, throughput=1 / (1.1 * p50)
    )


@pytest.fixture
def tables() -> Tables:
    """Give tables of five layers whose every figure is written down above."""
    model = ModelMap(layers=LAYERS, stacks=(), num_parameters=2640, num_bytes=10560, macs=1024)
    original = Original(
        metric=Figure(value=0.9, low=0.85, high=0.95, n=200, higher_is_better=True),
        size_bytes=16_000, num_parameters=2640, macs=1024, latency=latency(2.0), memory_bytes=400_000,
        same_runtime_latency=latency(1.0), same_runtime_bytes=20_000,
    )  # fmt: skip
    seconds = {}
    for step in (None, Quantize(bits=8), Quantize(bits=4, group_size=16)):
        formats = layer_formats(model, step.resolve(model) if step else [], SHAPES)
        for name, found in zip(("up", "down"), SECONDS[f"int{step.bits}" if step else "float32"], strict=True):
            seconds[formats[name]] = found
    return Tables(
        model=model, runtime=get_runtime("torch"), original=original,
        profile=Profile(shapes=dict(SHAPES), effects=dict(EFFECTS), seconds=seconds),
        likelihood_metric=False, unchanged_memory=300_000, proof_seconds=7.5,
    )  # fmt: skip
