"""What tasks with one right class per sample share: labels, loss, accuracy, and divergence from the original.

A sample's score is 1 when the largest logit is that of its label, else 0. The divergence of sample i is
KL(original || candidate) = sum_c p_c (log p_c - log q_c) in nats; agreement is 1 where both choose the same class.

Legend: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.data.table import Row, place_of
from gossamer.errors import DataError, MeasureError
from gossamer.tasks.base import Arrays, Batch, Evaluation, Metric, RunAll, Scores, Task

if TYPE_CHECKING:
    from gossamer.models.source import Source

LABEL_NAMES = ("labels", "class", "category", "target", "y", "sentiment")


def share_kept(candidate: Any, original: Any) -> Any:
    """Return the share of the original's mean that the candidate keeps; works on arrays too."""
    return candidate / original


class Classification(Task):
    """Score one class per sample; subclasses say how rows become inputs."""

    metric: ClassVar[Metric] = Metric("accuracy", "", True, figure=lambda mean: mean, quality=share_kept)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the mean cross entropy of logits [B, C] against the labels."""
        logits_BC = outputs[self.output]
        labels_B = torch.as_tensor(_labels(batch), device=logits_BC.device)
        return torch.nn.functional.cross_entropy(logits_BC, labels_B)

    def evaluate(self, run_all: RunAll, batches: Sequence[Batch], reference: Evaluation | None = None) -> Evaluation:
        """Score every sample; `kept["log_probs"]` [N, C] float32 is what a later model is compared with.

        Raises MeasureError when an output is not finite, or the reference saw other samples.
        """
        outputs = run_all([batch.inputs for batch in batches])
        found = [
            (batch.samples, _labels(batch), self._log_probs(found, batch))
            for batch, found in zip(batches, outputs, strict=True)
        ]
        if not found:
            raise MeasureError("there is nothing to evaluate: no batches", "give at least one evaluation row")
        samples_N = np.concatenate([samples for samples, _, _ in found])
        order = np.argsort(samples_N, kind="stable")
        labels_N = np.concatenate([labels for _, labels, _ in found])[order]
        log_probs_NC = np.concatenate([log_probs for _, _, log_probs in found])[order]
        if labels_N.max() >= log_probs_NC.shape[1]:
            raise DataError(
                f"label {labels_N.max()} occurs, but the model has {log_probs_NC.shape[1]} outputs",
                "labels count from 0; give the model that was trained for these labels",
            )
        chosen_N = log_probs_NC.argmax(axis=1)
        ones_N = np.ones(len(labels_N))
        scores = Scores((chosen_N == labels_N).astype(np.float64), ones_N)
        kept = {"log_probs": log_probs_NC.astype(np.float32)}
        if reference is None:
            return Evaluation(scores, kept)
        original_NC = reference.kept["log_probs"]
        if original_NC.shape != log_probs_NC.shape:
            raise MeasureError(
                f"the reference holds {original_NC.shape} log-probabilities, the candidate {log_probs_NC.shape}",
                "both must be evaluated on the same batches",
            )
        agreement = Scores((chosen_N == original_NC.argmax(axis=1)).astype(np.float64), ones_N)
        return Evaluation(scores, kept, Scores(divergence(original_NC, kept["log_probs"]), ones_N), agreement)

    def _log_probs(self, outputs: Arrays, batch: Batch) -> NDArray[np.float64]:
        logits_BC = np.asarray(outputs[self.output], dtype=np.float64)
        if not np.isfinite(logits_BC).all():
            sample = int(batch.samples[np.flatnonzero(~np.isfinite(logits_BC).all(axis=1))[0]])
            raise MeasureError(
                f"the output {self.output!r} for sample {sample} is not finite",
                "the model overflows or holds NaN weights",
            )
        shifted_BC = logits_BC - logits_BC.max(axis=1, keepdims=True)
        log_probs_BC: NDArray[np.float64] = shifted_BC - np.log(np.exp(shifted_BC).sum(axis=1, keepdims=True))
        return log_probs_BC


def divergence(original_NC: NDArray[Any], candidate_NC: NDArray[Any]) -> NDArray[np.float64]:
    """Return KL(original || candidate) in nats for each row of log-probabilities, [N] float64."""
    original = original_NC.astype(np.float64)
    return np.asarray((np.exp(original) * (original - candidate_NC)).sum(axis=1))


def labels_of(rows: Sequence[Row], source: Source) -> NDArray[np.int64] | None:
    """Return the model's class number of each row [N] int64, or None when no row has a label.

    A label is the name of one of the model's classes (upper and lower case are the same), else a class number. When the
    data names its classes and the model does too, the names decide: the same numbers may mean other classes.
    Raises DataError naming the row and the label that the model does not know.
    """
    if not any("label" in row for row in rows):
        return None
    known = _Labels(source)
    return np.array([known.number(row, place_of(row, index)) for index, row in enumerate(rows)], dtype=np.int64)


class _Labels:
    """Find a row's class number by the model's names."""

    def __init__(self, source: Source) -> None:
        labels = source.labels or ()
        self.count = len(labels) or getattr(source.config, "num_labels", None)
        self.listed = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
        # LABEL_0, LABEL_1: transformers' placeholders name nothing
        self.named = bool(labels) and any(label != f"LABEL_{number}" for number, label in enumerate(labels))
        exact = {label: number for number, label in enumerate(labels)}
        self.numbers = {label.casefold().strip(): number for label, number in exact.items()} | exact

    def number(self, row: Row, place: str) -> int:
        label = row.get("label")
        name = row.get("label_name")
        asked = name if name is not None and self.named else label
        if isinstance(asked, str):
            number = self.numbers.get(asked, self.numbers.get(asked.casefold().strip()))
            if number is not None:
                return number
        if not (name is not None and self.named):
            number = _as_number(label)
            if number is not None and number >= 0 and (self.count is None or number < self.count):
                return number
        knows = f"the model's labels are {self.listed}" if self.listed else f"the model has {self.count} classes"
        hint = "give a model that was trained for these labels, or rename them"
        if isinstance(asked, str) and not self.named:
            hint = "name the model's classes under id2label in its config.json, or write class numbers into the data"
        raise DataError(f"{place}: the model does not know the label {asked!r}; {knows}", hint)


def _as_number(label: Any) -> int | None:
    if isinstance(label, bool | np.bool_ | int | np.integer):
        return int(label)
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, str) and label.strip().isascii() and label.strip().isdigit():
        return int(label)
    return None


def _labels(batch: Batch) -> NDArray[np.int64]:
    if "labels" not in batch.targets:
        raise DataError("the rows have no labels to compare with", "say which column holds them: --column label=NAME")
    return batch.targets["labels"]
