"""What a run knows and hands on: predictions, measurements, verdicts, provenance. Plain records that become JSON.

The report, the command line and `--json` read these and nothing else.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

VerdictName = Literal["PASS", "FAIL", "UNDECIDED"]


class Record(BaseModel):
    """Freeze every record; unknown fields are errors."""

    # JSON has no infinity: as strings, figures of a collapsed model and of one never built read back as they were
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Figure(Record):
    """Hold one figure with its interval: `low` and `high` equal `value` where the figure is exact (bytes)."""

    value: float
    low: float
    high: float
    n: int = 1
    unit: str = ""
    higher_is_better: bool = False

    @classmethod
    def exact(cls, value: float, unit: str, *, higher_is_better: bool = False) -> Figure:
        """Return a figure without uncertainty."""
        return cls(value=value, low=value, high=value, unit=unit, higher_is_better=higher_is_better)


class Prediction(Record):
    """Hold what the planner expects of a recipe: shares of the original where the name says share."""

    quality_share: float
    kl: float
    size_bytes: int
    latency_seconds: float
    latency_share: float
    memory_bytes: int
    seconds: float  # wall time to build, prove and measure it
    num_parameters: int = 0  # 0: those of the original
    macs: int = 0


class Stage(Record):
    """Hold what one stage of carrying out a recipe is expected to take: bytes of all processes then, seconds in all.

    `device_bytes` is what lies on the GPU, where one computes.
    """

    name: str
    memory_bytes: int
    seconds: float
    device_bytes: int = 0


class DiskUse(Record):
    """Hold what will lie in the run folder, and how many bytes of it."""

    what: str
    bytes: int


class Covered(Record):
    """Say what a recipe does to one module's weight (`done`, empty where nothing), or why it leaves it as it is."""

    module: str
    role: str
    shape: tuple[int, ...]
    num_parameters: int
    done: str
    why: str = ""


class Forecast(Record):
    """Hold what carrying out one recipe is expected to take, before anything is spent; `refusal` says why it cannot be.

    `memory_limit` is what the run may take, `disk_free` what the run folder's disk holds besides what lies there
    already; `streamed` says that the model is read piece by piece. `device` is where calibration computes, and
    `device_limit` what it may take there (on the CPU both figures are 0: that is `memory_bytes`).
    """

    streamed: bool
    stages: tuple[Stage, ...]
    disk: tuple[DiskUse, ...]
    memory_bytes: int  # the most that any stage takes
    memory_limit: int
    disk_bytes: int
    disk_free: int
    seconds: float  # of all stages
    device: str = "cpu"
    device_bytes: int = 0  # the most that any stage takes there
    device_limit: int = 0
    coverage: tuple[Covered, ...] = ()
    refusal: str = ""


class Judged(Record):
    """Hold one constraint's judgement in the words and numbers that a person reads."""

    constraint: str
    verdict: VerdictName
    value: float
    low: float
    high: float
    bound: float
    margin: float
    why: str


class LatencyRecord(Record):
    """Hold a latency distribution: seconds of every run kept, percentiles in seconds."""

    samples: tuple[float, ...]
    p50: float
    p95: float
    p99: float
    mean: float
    throughput: float  # requests per second

    @classmethod
    def not_measured(cls) -> LatencyRecord:
        """Return the record of something that was not timed: a model served piece by piece says nothing of latency."""
        return cls(samples=(), p50=math.nan, p95=math.nan, p99=math.nan, mean=math.nan, throughput=math.nan)

    @property
    def known(self) -> bool:
        """Say whether anything was timed."""
        return bool(self.samples)


class Equivalence(Record):
    """Say how the re-opened artifact's outputs compare with the in-memory model's on the same inputs.

    `relative_error` is rms(artifact - memory) / rms(memory - its mean); `change` the same between the in-memory
    candidate and the original, the size of what the recipe itself did.
    """

    relative_error: float
    change: float
    allowed: float
    top1_agreement: float
    num_batches: int
    passed: bool


class TensorRow(Record):
    """Hold one row of the per-module table: what the recipe asked for and what the file was found to hold."""

    parameter: str
    role: str
    shape: tuple[int, ...]
    asked: str
    found: str
    bytes: int
    original_bytes: int
    activation: str = ""
    agrees: bool


class Measured(Record):
    """Hold everything measured about one artifact, re-opened in its runtime; figures by quantity.

    `figures` has `metric` (the task's own), `quality` (share kept, paired), `size`, `latency p50|p95|p99|mean` (s),
    `latency pXX ratio` (of the original, paired), `throughput`, `memory`, `params`, `flops`, `kl`, `agreement`.
    """

    figures: dict[str, Figure]
    latency: LatencyRecord
    original_latency: LatencyRecord  # the original, timed in turns with this artifact
    equivalence: Equivalence
    tensors: tuple[TensorRow, ...]


class ExpertTokens(Record):
    """Hold how many calibration tokens each expert of a block was sent, and the layers for which they were too few."""

    name: str  # of what holds the experts
    tokens: tuple[int, ...]
    starved: tuple[str, ...] = ()  # each with its count, and what was done instead


class Tried(Record):
    """Hold one candidate: its recipe, what was predicted, what was measured, and how the goal judged it."""

    name: str
    recipe: list[dict[str, Any]]
    predicted: Prediction
    measured: Measured | None = None
    judgements: tuple[Judged, ...] = ()
    verdict: VerdictName | None = None
    rejected: str = ""  # why it was not measured to the end: the artifact computes something else, a refusal
    violation: float = float("inf")
    seconds: float = 0.0
    folder: str = ""  # of the artifact, relative to the run
    forecast: Forecast | None = None
    experts: tuple[ExpertTokens, ...] = ()  # where a step calibrated them
    fallbacks: tuple[str, ...] = ()  # what calibrated steps did instead of what they were asked, and why

    def numbers(self) -> dict[str, float | str]:
        """Return what there is to plot: figures with their bounds, what was predicted of them, recipe and verdict."""
        found: dict[str, float | str] = {"recipe": self.name, "verdict": self.verdict or self.rejected}
        for name, figure in (self.measured.figures if self.measured is not None else {}).items():
            found |= {name: figure.value, f"{name} low": figure.low, f"{name} high": figure.high}
        predicted = self.predicted
        return found | {
            "predicted quality": predicted.quality_share,
            "predicted size": predicted.size_bytes,
            "predicted latency p50 ratio": predicted.latency_share,
            "seconds": self.seconds,
        }


class Original(Record):
    """Hold what was measured of the original, as its owner runs it today (PyTorch, float32, this machine)."""

    metric: Figure | None  # None: no rows were given, so quality was not measured
    size_bytes: int
    num_parameters: int
    macs: int
    latency: LatencyRecord
    memory_bytes: int  # 0: not measured, the model was served piece by piece
    same_runtime_latency: LatencyRecord | None = None  # the unchanged model in the runtime that will serve
    same_runtime_bytes: int | None = None


class Provenance(Record):
    """Hold where everything came from: content hashes, versions, seeds, the machine."""

    model: str
    model_fingerprint: str
    data: str
    data_fingerprint: str
    evaluation: str
    evaluation_fingerprint: str
    task: str
    task_settings: dict[str, Any]
    runtime: str
    seed: int
    versions: dict[str, str]
    machine: dict[str, Any]
    command: str = ""


class PlanResult(Record):
    """Hold what `plan` prints: the original, and every recipe with its prediction, most promising first.

    Without a goal nothing is measured: there is no `original`, and the one recipe's prediction is its bytes alone.
    `calibration` says in words what was found about the calibration rows, and what more of them would bring.
    """

    goal: str
    goal_in_words: list[str]
    original: Original | None
    candidates: tuple[Tried, ...]
    notes: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()


class RunResult(Record):
    """Hold what `optimize` and `apply` return and `report` draws."""

    kind: Literal["optimize", "apply"]
    goal: str
    goal_in_words: list[str]
    verdict: VerdictName
    reason: str  # one plain sentence: why PASS, or which constraint stands in the way
    metric_name: str
    original: Original
    tried: tuple[Tried, ...]
    not_tried: tuple[Tried, ...] = ()
    chosen: int | None = None  # index into tried
    artifact: str | None = None  # path of the published artifact
    load_snippet: str = ""
    notes: tuple[str, ...] = ()  # what else there is to know of the artifact: who opens it besides its runtime
    provenance: Provenance
    rows: dict[str, int]  # rows used: calibration, evaluation
    seconds: float
