"""What a model is for: which class opens it, how rows become batches, the loss, and one score for each sample.

A metric is an aggregate of per-sample scores, so that two models can be compared in pairs on the same samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from gossamer.models.source import Source

Arrays = dict[str, NDArray[Any]]
Row = Mapping[str, Any]
RunAll = Callable[[Sequence[Arrays]], Iterable[Arrays]]  # a model: inputs of many passes -> their outputs, in order


@dataclass(frozen=True)
class Batch:
    """Hold what one forward pass eats: `inputs` by the name of the model's argument, and what is needed to score it.

    `samples` [B] says which sample each row of the batch belongs to: a long document is several rows of one sample.
    """

    inputs: Arrays
    samples: NDArray[np.int64]
    targets: Arrays = field(default_factory=dict)
    extra: Any = None  # what else its own task needs to score it


@dataclass(frozen=True)
class Metric:
    """Name a figure made of per-sample scores: `name`, `unit`, whether more is better, and how it is printed.

    A sample's score is a sum with a weight (right answers of 1 answer; log-likelihood of n tokens); the mean is
    sum of sums / sum of weights; `figure` turns a mean into what people read (perplexity = exp(-mean)); `quality`
    turns the means of candidate and original into the share of quality kept (1.0 = all of it).
    """

    name: str
    unit: str
    higher_is_better: bool
    figure: Callable[[Any], Any]
    quality: Callable[[Any, Any], Any]  # (candidate mean, original mean) -> share kept; works on arrays too


@dataclass(frozen=True)
class Scores:
    """Hold one score for each sample, `sums` [N] and `weights` [N]; sample i of one model pairs with i of another."""

    sums: NDArray[np.float64]
    weights: NDArray[np.float64]

    def mean(self) -> float:
        """Return the weighted mean of all samples."""
        return float(self.sums.sum() / self.weights.sum())


@dataclass(frozen=True)
class Evaluation:
    """Hold what a pass over the evaluation rows found.

    `kept` is what a later model is compared with (log-probabilities, the most likely tokens); `divergence` and
    `agreement` (per sample: mean KL in nats to the original, share of equal top choices) exist when there was an
    original to compare with.
    """

    scores: Scores
    kept: Arrays
    divergence: Scores | None = None
    agreement: Scores | None = None


@dataclass(frozen=True)
class Written:
    """Hold what a model reads of one row: the text, its tokens, and how many of them fit one input.

    `fills` says that inputs are meant to be as long as fits: windows of a document, not sentences. `form` is how the
    text came about (see `tasks/chat.py`).
    """

    text: str
    num_tokens: int
    limit: int
    fills: bool = False
    form: str = "text"


class Task(ABC):
    """Say what a model is for. One file a task; `gossamer.tasks.get_task(name)` finds it."""

    name: ClassVar[str]
    auto_class: ClassVar[str]  # transformers' Auto class that opens the model
    output: ClassVar[str] = "logits"  # the output that is scored
    metric: ClassVar[Metric]
    columns: ClassVar[dict[str, tuple[str, ...]]]  # role of a column -> names that are recognised as it
    optional_columns: ClassVar[frozenset[str]] = frozenset()  # roles that a row may do without
    instead: ClassVar[dict[str, tuple[tuple[str, ...], ...]]] = {}  # role -> groups of roles that may stand in for it
    leaves_out_empty: ClassVar[bool] = False  # True: a row that says nothing is no mistake, and is not used
    made_up_words: ClassVar[int] = 400  # of a row that stands in where there is no data
    tokens_fixed: ClassVar[str] = "it reads no text"  # why its models cannot be given other tokens; empty: they can
    profile_samples: ClassVar[int] = 128  # calibration inputs that tell what a step does to quality
    input_axes: ClassVar[dict[str, dict[int, str]]]  # input -> {axis: name} of axes that may vary; what exporters need

    @abstractmethod
    def batches(self, rows: Sequence[Row], source: Source, *, batch_size: int = 1) -> list[Batch]:
        """Return rows as batches of at most `batch_size` model inputs, in a stable order.

        Raises DataError naming the row when a row is empty, cannot be read, or has a label the model does not know.
        """

    def calibration(self, rows: Sequence[Row], source: Source, count: int) -> list[Batch]:
        """Return at most `count` model inputs of one sample each, evenly spread over the rows."""
        return spread(self.batches(rows, source, batch_size=1), count)

    def written(self, rows: Sequence[Row], source: Source) -> list[Written]:
        """Return what the model reads of each row, where that is text; else nothing."""
        return []

    @abstractmethod
    def latency_inputs(self, batches: Sequence[Batch]) -> Arrays:
        """Return the inputs of one typical request: the row of median length, batch 1."""

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the training loss (a scalar) of torch outputs for a batch."""

    @abstractmethod
    def evaluate(self, run_all: RunAll, batches: Sequence[Batch], reference: Evaluation | None = None) -> Evaluation:
        """Run a model over batches and score each sample; compare with `reference` when given.

        `run_all` maps the input arrays of many passes to their outputs, whichever runtime is behind it; a model that is
        read from disk layer by layer is read once for all of them. A task may call it more than once.
        """


def each(run: Callable[[Arrays], Arrays]) -> RunAll:
    """Return the `run_all` of a model that answers one pass at a time.

    >>> [int(found["y"][0]) for found in each(lambda inputs: {"y": inputs["x"] + 1})([{"x": np.array([1])}])]
    [2]
    """
    return lambda passes: map(run, passes)


def spread(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return at most `count` batches, evenly spread over all."""
    kept = min(count, len(batches))
    return [batches[position * len(batches) // kept] for position in range(kept)]
