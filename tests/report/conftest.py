"""A run as `optimize` would return it, with plausible numbers: these tests and those of the command line draw it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from gossamer.goal import parse_goal
from gossamer.plan.records import (
    Equivalence,
    Figure,
    Judged,
    LatencyRecord,
    Measured,
    Original,
    Prediction,
    Provenance,
    RunResult,
    TensorRow,
    Tried,
)

MB = 1_000_000
GOAL = "quality >= 99%, size <= 27%, latency <= 32%, minimize size"
BOUNDS = {"quality": 0.99, "size": 0.27, "latency p50": 0.32}


def latency(median: float, spread: float = 0.06, count: int = 400, seed: int = 0) -> LatencyRecord:
    """Draw request times: a log-normal body and a few requests that something else delayed."""
    draw = random.Random(seed)
    samples = [median * draw.lognormvariate(0, spread) * (draw.uniform(1.2, 2.0) if draw.random() < 0.03 else 1)
               for _ in range(count)]  # fmt: skip
    ordered = sorted(samples)
    mean = sum(samples) / count
    return LatencyRecord(
        samples=tuple(samples),
        p50=ordered[count // 2],
        p95=ordered[int(count * 0.95)],
        p99=ordered[int(count * 0.99)],
        mean=mean,
        throughput=1 / mean,
    )


def tensors(num_layers: int = 6, bits: str = "int8 per channel") -> tuple[TensorRow, ...]:
    """Return the tensors of a small BERT, its linear layers and embeddings in 8 bits."""
    rows = [("bert.embeddings.word_embeddings.weight", "embedding", (30522, 384))]
    for layer in range(num_layers):
        prefix = f"bert.encoder.layer.{layer}"
        for name, role in (("query", "q"), ("key", "k"), ("value", "v")):
            rows.append((f"{prefix}.attention.self.{name}.weight", role, (384, 384)))
        rows.append((f"{prefix}.attention.output.dense.weight", "o", (384, 384)))
        rows.append((f"{prefix}.attention.output.LayerNorm.weight", "norm", (384,)))
        rows.append((f"{prefix}.intermediate.dense.weight", "up", (1536, 384)))
        rows.append((f"{prefix}.output.dense.weight", "down", (384, 1536)))
    rows.append(("classifier.weight", "classifier", (2, 384)))
    found = []
    for parameter, role, shape in rows:
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        quantized = role not in ("norm", "classifier")
        kind = bits if quantized else "float32"
        size = count + 4 * shape[0] if quantized else 4 * count
        activation = "int8 dynamic" if quantized and role != "embedding" else ""
        found.append(
            TensorRow(
                parameter=parameter,
                role=role,
                shape=shape,
                asked=kind,
                found=kind,
                bytes=size,
                original_bytes=4 * count,
                activation=activation,
                agrees=True,
            )
        )
    return tuple(found)


def judged(name: str, key: str, value: float, low: float, high: float) -> Judged:
    """Judge one share against the goal's bound."""
    bound = BOUNDS[key]
    more = key == "quality"
    worst, best = (low, high) if more else (high, low)
    margin = (worst - bound if more else bound - worst) / bound
    hope = (best - bound if more else bound - best) / bound
    verdict = "PASS" if margin >= 0 else "UNDECIDED" if hope >= 0 else "FAIL"
    why = f"{key} is {value * 100:.4g} %, asked was {name}"
    return Judged(
        constraint=name, verdict=verdict, value=value, low=low, high=high, bound=bound, margin=margin, why=why
    )


def candidate(
    name: str,
    recipe: list[dict[str, Any]],
    *,
    size: float,
    time: tuple[float, float, float],
    quality: tuple[float, float, float],
    predicted: tuple[float, float, float],
    seed: int = 1,
) -> Tried:
    """Make a candidate from its measured shares (low, value, high) and its predicted (size, latency, quality)."""
    original = latency(0.0208, seed=0)
    own = latency(original.p50 * time[1], seed=seed)
    figures = {
        "metric": Figure(value=0.9867 * quality[1], low=0.9867 * quality[0], high=1.0, n=1115, higher_is_better=True),
        "quality": Figure(value=quality[1], low=quality[0], high=quality[2], n=1115, higher_is_better=True),
        "size": Figure.exact(round(size * 91.4 * MB), "B"),
        "latency p50": Figure(value=own.p50, low=own.p50 * 0.98, high=own.p50 * 1.02, n=400, unit="s"),
        "latency p50 ratio": Figure(value=time[1], low=time[0], high=time[2], n=400),
        "memory": Figure.exact(round(148 * MB * (0.6 + size)), "B"),
        "kl": Figure(value=0.002 / size**2, low=0.0015 / size**2, high=0.0026 / size**2, n=1115, unit="nats"),
        "agreement": Figure(value=0.997, low=0.994, high=0.999, n=1115),
    }
    judgements = (
        judged("quality >= 99%", "quality", quality[1], quality[0], quality[2]),
        judged("size <= 27%", "size", size, size, size),
        judged("latency <= 32%", "latency p50", time[1], time[0], time[2]),
    )
    verdicts = {one.verdict for one in judgements}
    return Tried(
        name=name,
        recipe=recipe,
        predicted=Prediction(
            quality_share=predicted[2],
            kl=0.004,
            size_bytes=round(predicted[0] * 91.4 * MB),
            latency_seconds=0.0208 * predicted[1],
            latency_share=predicted[1],
            memory_bytes=131 * MB,
            seconds=48.0,
        ),
        measured=Measured(
            figures=figures,
            latency=own,
            original_latency=original,
            equivalence=Equivalence(
                relative_error=0.0031, change=0.024, allowed=0.02, top1_agreement=0.9991, num_batches=16, passed=True
            ),
            tensors=tensors(),
        ),
        judgements=judgements,
        verdict="FAIL" if "FAIL" in verdicts else "UNDECIDED" if "UNDECIDED" in verdicts else "PASS",
        violation=sum(max(0.0, -one.margin) for one in judgements),
        seconds=61.0,
        folder=f"steps/{name}",
    )


def candidates() -> tuple[Tried, ...]:
    """Return four candidates: one that collapsed, one too large, one undecided, one that passes."""

    def weights(bits: int, **more: Any) -> list[dict[str, Any]]:
        return [{"quantize": {"bits": bits, "activations": "none", **more}}]

    eight = [{"quantize": {"bits": 8, "activations": "dynamic", "reduce_range": True}},
             {"quantize": {"bits": 8, "only": ["re:.*word_embeddings"], "group_size": 0}}]  # fmt: skip
    return (
        candidate("2-bit weights, groups of 32", weights(2, group_size=32), size=0.094, time=(0.46, 0.47, 0.49),
                  quality=(0.53, 0.56, 0.59), predicted=(0.094, 0.44, 0.981), seed=2),
        candidate("8-bit weights, embeddings kept", weights(8, ignore=["embeddings"]), size=0.626,
                  time=(0.29, 0.296, 0.303), quality=(0.9965, 0.9989, 1.0012), predicted=(0.626, 0.31, 0.998), seed=3),
        candidate("4-bit weights, groups of 64", weights(4, group_size=64), size=0.158, time=(0.305, 0.312, 0.318),
                  quality=(0.9871, 0.9928, 0.9972), predicted=(0.158, 0.34, 0.9935), seed=4),
        candidate("8-bit weights and activations, embeddings too", eight, size=0.2531,
                  time=(0.272, 0.279, 0.286), quality=(0.9946, 0.9982, 1.0009),
                  predicted=(0.2529, 0.27, 0.9978), seed=5),
    )  # fmt: skip


def a_run(*, verdict: str = "PASS", **changes: Any) -> RunResult:
    """Return a run of four candidates that ends as `verdict` says; `changes` replace fields of the record."""
    tried = candidates()
    chosen = {"PASS": 3, "FAIL": 1, "UNDECIDED": 2}[verdict]
    reasons = {
        "PASS": "every bound is met with 95 % confidence by 8-bit weights and activations, embeddings too",
        "FAIL": "size stands in the way: the nearest candidate needs 62.6 % of the bytes where 27 % was asked",
        "UNDECIDED": "quality cannot be decided on 1115 rows: about 2400 more are needed",
    }
    unbuilt: dict[str, Any] = {"measured": None, "judgements": (), "verdict": None, "violation": float("inf")}
    unbuilt |= {"name": "3-bit weights, groups of 32", "rejected": "predicted to keep 97.1 % of the quality"}
    left_out = tried[2].model_copy(update=unbuilt)
    fields: dict[str, Any] = {
        "kind": "optimize",
        "goal": GOAL,
        "goal_in_words": parse_goal(GOAL).describe(),
        "verdict": verdict,
        "reason": reasons[verdict],
        "metric_name": "accuracy",
        "original": Original(
            metric=Figure(value=0.9867, low=0.981, high=0.9915, n=1115, higher_is_better=True),
            size_bytes=round(91.4 * MB),
            num_parameters=22_713_986,
            macs=1_380_000_000,
            latency=latency(0.0208, seed=0),
            memory_bytes=412 * MB,
            same_runtime_latency=latency(0.0107, seed=9),
            same_runtime_bytes=round(91.5 * MB),
        ),
        "tried": tried if verdict == "PASS" else tried[:3],
        "not_tried": (left_out,),
        "chosen": chosen,
        "artifact": "build/artifact",
        "load_snippet": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("build/artifact/model.onnx")\n',
        "provenance": Provenance(
            model="models/minilm-spam",
            model_fingerprint="9f2c1b7e4d" * 6,
            data="spam/train.jsonl",
            data_fingerprint="51ab02c3d4" * 6,
            evaluation="spam/test.jsonl",
            evaluation_fingerprint="77aa31fe90" * 6,
            task="text-classification",
            task_settings={"max_length": 128},
            runtime="onnxruntime",
            seed=0,
            versions={"gossamer": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0", "transformers": "5.23.0"},
            machine={
                "cores": 2,
                "cpu": "AMD EPYC 9R14",
                "instruction_sets": ["avx2", "avx512f", "avx512_vnni"],
                "memory_total": 16_400_000_000,
                "system": "Linux 6.1",
            },
            command='gossamer optimize models/minilm-spam --task text-classification --data spam/train.jsonl --eval '
            'spam/test.jsonl --goal "quality >= 99%, size <= 27%, latency <= 32%, minimize size" --out build',
        ),
        "rows": {"calibration": 128, "evaluation": 1115},
        "seconds": 214.0,
    }  # fmt: skip
    return RunResult(**(fields | changes))


@pytest.fixture
def make_run() -> Callable[..., RunResult]:
    """Give tests `a_run`."""
    return a_run
