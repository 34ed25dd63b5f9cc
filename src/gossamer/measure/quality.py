"""Quality of an artifact: its scores beside the original's, and whether it computes what was in memory.

*Equivalence* compares the outputs of a re-opened artifact with the in-memory model's on the same inputs. The error is
read relative to the spread of the reference (its standard deviation over all entries): logits have no natural unit, and
an error of 0.01 is nothing beside logits that spread by 5 and everything beside logits that spread by 0.005.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ArtifactError, MeasureError
from gossamer.measure.statistics import paired_quality, score_interval
from gossamer.measure.types import Frozen, Interval, Measurement

if TYPE_CHECKING:
    from gossamer.tasks.base import Arrays, Batch, Evaluation, Metric, Task


class OutputDifference(Frozen):
    """Hold how outputs differ from a reference: absolute, relative to the reference's spread, and in the top choice.

    `max_relative` and `rms_relative` divide by the standard deviation of the reference; `top1_agreement` is the share
    of rows (all axes but the last) with the same largest entry, None for outputs without a last axis to choose from.
    """

    max_abs: float
    max_relative: float
    rms_relative: float
    top1_agreement: float | None
    num_values: int


class Equivalence(Frozen):
    """Hold the difference of each output by name, and name the worst."""

    outputs: dict[str, OutputDifference]

    @property
    def worst(self) -> tuple[str, OutputDifference]:
        """Return the output with the largest relative difference."""
        return max(self.outputs.items(), key=lambda item: item[1].max_relative)

    def check(self, *, max_relative: float, what: str = "the artifact") -> None:
        """Raise ArtifactError when any output is off by more than `max_relative` standard deviations."""
        name, difference = self.worst
        if not difference.max_relative <= max_relative:
            raise ArtifactError(
                f"{what} computes something else than the model in memory: {name} differs by up to "
                f"{difference.max_relative:.3g} standard deviations "
                f"({difference.max_abs:.3g}), allowed: {max_relative:g}",
                "the runtime lowers a layer differently: try another runtime, or put suspicious layers under `ignore`",
            )


class PairedQuality(Frozen):
    """Hold a candidate's quality beside the original's, on the same samples.

    `candidate` and `original` are the metric's own figures (accuracy, perplexity); `kept` is the share of quality kept;
    `divergence` (nats) and `agreement` (share) compare what the two models say, where the task scores it.
    """

    candidate: Measurement
    original: Measurement
    kept: Measurement
    divergence: Measurement | None = None
    agreement: Measurement | None = None


def compare_arrays(reference: NDArray[Any], found: NDArray[Any]) -> OutputDifference:
    """Compare one output with its reference, in float64.

    Raises MeasureError when the shapes differ or there is nothing to compare. What is infinite or NaN in one and not in
    the other is an infinite difference; what is equally infinite in both (masked logits) is none.
    """
    if reference.shape != found.shape or reference.size == 0:
        raise MeasureError(
            f"cannot compare outputs {found.shape} with {reference.shape}", "were the same inputs given?"
        )
    expected, actual = reference.astype(np.float64), found.astype(np.float64)
    same = (expected == actual) | (np.isnan(expected) & np.isnan(actual))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(actual - expected))
    off = np.where(np.isnan(off), np.inf, off)
    finite = expected[np.isfinite(expected)]
    spread = float(finite.std()) if finite.size else 0.0
    spread = spread or float(np.abs(finite).max(initial=0.0)) or 1.0  # all entries alike: their size is the measure
    top1 = None
    if reference.ndim >= 1 and reference.shape[-1] > 1:
        top1 = float((expected.argmax(-1) == actual.argmax(-1)).mean())
    return OutputDifference(
        max_abs=float(off.max()),
        max_relative=float(off.max()) / spread,
        rms_relative=float(np.sqrt(np.mean(off**2))) / spread,
        top1_agreement=top1,
        num_values=reference.size,
    )


def compare_outputs(reference: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> Equivalence:
    """Compare all outputs of the reference by name. Raises MeasureError when one is missing or has another shape.

    Example: `compare_outputs(in_memory(inputs), served.run(inputs)).check(max_relative=0.01)`.
    """
    missing = [name for name in reference if name not in found]
    if missing or not reference:
        raise MeasureError(
            f"outputs {missing} are missing, there are {sorted(found)}", "does the artifact fit the task?"
        )
    return Equivalence(outputs={name: compare_arrays(array, found[name]) for name, array in reference.items()})


def evaluate_pair(
    task: Task,
    run_candidate: Callable[[Arrays], Arrays],
    run_original: Callable[[Arrays], Arrays],
    batches: Iterable[Batch],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedQuality:
    """Score both models on the same batches and compare them in pairs.

    Example: `evaluate_pair(task, served.run, original.run, task.batches(rows, source)).kept`.
    """
    batches = list(batches)
    reference = task.evaluate(run_original, batches)
    return paired(task.evaluate(run_candidate, batches, reference), reference, task.metric, confidence, seed)


def paired(
    candidate: Evaluation, original: Evaluation, metric: Metric, confidence: float = 0.95, seed: int = 0
) -> PairedQuality:
    """Compare two evaluations of the same samples, the candidate's made with the original's as reference."""

    def figure(interval: Interval, unit: str, higher_is_better: bool) -> Measurement:
        return Measurement.from_interval(interval, unit=unit, higher_is_better=higher_is_better)

    own, theirs = (
        figure(
            score_interval(e.scores, metric.figure, confidence=confidence, seed=seed),
            metric.unit,
            metric.higher_is_better,
        )
        for e in (candidate, original)
    )
    kept = paired_quality(candidate.scores, original.scores, metric, confidence=confidence, seed=seed)
    divergence = agreement = None
    if candidate.divergence is not None:
        divergence = figure(score_interval(candidate.divergence, confidence=confidence, seed=seed), "nats", False)
    if candidate.agreement is not None:
        agreement = figure(score_interval(candidate.agreement, confidence=confidence, seed=seed), "", True)
    return PairedQuality(
        candidate=own, original=theirs, kept=figure(kept, "", True), divergence=divergence, agreement=agreement
    )
