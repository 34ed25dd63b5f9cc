"""Text classification: one text (or a pair) in, one of the model's classes out; scored by accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gossamer.data.columns import is_token_ids
from gossamer.errors import DataError, TaskError
from gossamer.tasks.base import Arrays, Batch, Row, Written
from gossamer.tasks.classification import LABEL_NAMES, Classification, labels_of
from gossamer.tasks.tokens import accepted_inputs, check_length, described, median_request, text_of

if TYPE_CHECKING:
    from gossamer.models.source import Source

_AXES = {0: "batch", 1: "sequence"}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TextClassification(Classification):
    """Set how texts become tokens: longer ones are cut to `max_length`; a timed request has `latency_tokens` tokens.

    Without `latency_tokens` a timed request is the row of median length as it is.

    >>> task = TextClassification(max_length=128, latency_tokens=128)
    """

    max_length: Annotated[int, Field(ge=1)] = 128
    latency_tokens: Annotated[int, Field(ge=1)] | None = None

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": (
            "sentence", "sentence1", "premise", "question", "question1", "content", "review", "body", "message",
            "document", "article", "tweet", "comment", "utterance", "query", "text1", "input_ids",
        ),
        "text_pair": ("sentence2", "hypothesis", "question2", "text2", "passage"),
        "label": LABEL_NAMES,
    }  # fmt: skip
    optional_columns: ClassVar[frozenset[str]] = frozenset({"text_pair"})
    tokens_fixed: ClassVar[str] = ""
    input_axes: ClassVar[dict[str, dict[int, str]]] = dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), _AXES
    )

    def batches(self, rows: Sequence[Row], source: Source, *, batch_size: int = 1) -> list[Batch]:
        """Return tokenised rows in their order, padded to the longest of each batch (one row: no padding), as int64.

        A text may also be a list of token ids, for models without a tokenizer.
        """
        if not rows:
            raise DataError("there are no rows", "give at least one row")
        labels_N = labels_of(rows, source)
        if all(is_token_ids(row.get("text")) for row in rows):
            return self._token_batches(rows, source, labels_N, batch_size)
        tokenizer = source.processor()
        check_length(self.max_length, "max_length", source, tokenizer)
        names = accepted_inputs(source, tokenizer.model_input_names)
        if batch_size > 1 and tokenizer.pad_token is None:
            raise TaskError(f"the tokenizer of {source.name} has no padding token", "use batch_size=1, or give it one")
        found = []
        for start in range(0, len(rows), batch_size):
            stop = min(start + batch_size, len(rows))
            encoded = tokenizer(
                [text_of(rows[index], "text", index) for index in range(start, stop)],
                _pairs(rows, start, stop),
                truncation=True,
                max_length=self.max_length,
                padding="longest" if stop - start > 1 else False,
                return_tensors="np",
            )
            inputs: Arrays = {name: encoded[name].astype(np.int64) for name in names if name in encoded}
            targets = {} if labels_N is None else {"labels": labels_N[start:stop]}
            found.append(Batch(inputs, np.arange(start, stop), targets))
        return found

    def _token_batches(
        self, rows: Sequence[Row], source: Source, labels_N: NDArray[np.int64] | None, batch_size: int
    ) -> list[Batch]:
        names = accepted_inputs(source, ["input_ids", "attention_mask"])
        found = []
        for start in range(0, len(rows), batch_size):
            part = [
                np.asarray(row["text"], dtype=np.int64)[: self.max_length] for row in rows[start : start + batch_size]
            ]
            longest = max(len(tokens) for tokens in part)
            ids = np.stack([np.pad(tokens, (0, longest - len(tokens))) for tokens in part])
            mask = np.stack([np.arange(longest) < len(tokens) for tokens in part]).astype(np.int64)
            inputs = {name: values for name, values in (("input_ids", ids), ("attention_mask", mask)) if name in names}
            stop = start + len(part)
            targets = {} if labels_N is None else {"labels": labels_N[start:stop]}
            found.append(Batch(inputs, np.arange(start, stop), targets))
        return found

    def written(self, rows: Sequence[Row], source: Source) -> list[Written]:
        """Return the text (of both parts) and the number of tokens of each row."""

        def describe(row: Row, index: int, tokenizer: Any) -> Written:
            parts = [text_of(row, role, index) for role in ("text", "text_pair") if role in row]
            return Written("\n".join(parts), len(tokenizer(*parts, verbose=False)["input_ids"]), self.max_length)

        return described(rows, source, describe)

    def latency_inputs(self, batches: Sequence[Batch]) -> Arrays:
        """Return the row of median length, batch 1, made `latency_tokens` tokens long when that is set."""
        if self.latency_tokens is not None and self.latency_tokens > self.max_length:
            raise TaskError(
                f"latency_tokens {self.latency_tokens} is more than max_length {self.max_length}",
                f"no request is that long: raise max_length to {self.latency_tokens}",
            )
        return median_request(batches, self.latency_tokens)


def _pairs(rows: Sequence[Row], start: int, stop: int) -> list[str] | None:
    if not any("text_pair" in rows[index] for index in range(start, stop)):
        return None
    return [text_of(rows[index], "text_pair", index) for index in range(start, stop)]
