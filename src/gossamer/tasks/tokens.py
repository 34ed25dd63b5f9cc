"""What tasks on text share: the tokenizer's limits, the inputs a model takes, and a request of a given length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from numpy.typing import NDArray

from gossamer.data.columns import is_token_ids
from gossamer.data.table import place_of
from gossamer.errors import DataError, TaskError
from gossamer.tasks.base import Arrays, Batch, Row, Written

if TYPE_CHECKING:
    from gossamer.models.source import Source

_UNLIMITED = 10**6  # tokenizers without a limit say 1e30


def accepted_inputs(source: Source, names: Sequence[str]) -> list[str]:
    """Return those of the tokenizer's outputs that the model's forward takes, in their order.

    A model that is not one of transformers' classes (or whose forward takes anything) is given all of them.
    """
    for architecture in getattr(source.config, "architectures", None) or ():
        model_class = getattr(transformers, architecture, None)
        if model_class is not None:
            parameters = inspect.signature(model_class.forward).parameters
            if "input_ids" in parameters:
                return [name for name in names if name in parameters]
    return list(names)


def check_length(length: int, setting: str, source: Source, tokenizer: Any) -> None:
    """Raise TaskError when `length` tokens are more than the model or its tokenizer was made for."""
    config_limit = getattr(source.config, "max_position_embeddings", None) or _UNLIMITED
    limit = min(config_limit, getattr(tokenizer, "model_max_length", None) or _UNLIMITED)
    if length > limit:
        raise TaskError(
            f"{setting} {length} is more than the {limit} positions of {source.name}", f"use {setting}={limit}"
        )


def text_of(row: Row, role: str, index: int) -> str:
    """Return a row's text. Raises DataError naming the row when there is none."""
    text: Any = row.get(role)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place_of(row, index)}: the {role} is empty", "remove the row, or fill it in")
    return text


def median_request(batches: Sequence[Batch], length: int | None) -> Arrays:
    """Return the row of median length without its padding, as a batch of one; made `length` tokens long when given.

    The first of several rows of that length is taken. A row is lengthened by repeating the tokens between its first and
    last one, and shortened by dropping tokens before the last one, so that [CLS] and [SEP] stay where they are.
    """
    rows = [_unpadded(batch, index) for batch in batches for index in range(len(batch.samples))]
    if not rows:
        raise TaskError("there is no row to make a request of", "give at least one row")
    lengths = np.array([row["input_ids"].shape[1] for row in rows])
    median = int(np.sort(lengths)[(len(lengths) - 1) // 2])
    row = rows[int(np.flatnonzero(lengths == median)[0])]
    if length is None:
        return row
    take = _stretched(median, length)
    return {name: np.ascontiguousarray(values[:, take]) for name, values in row.items()}


def _unpadded(batch: Batch, index: int) -> Arrays:
    row = {name: values[index : index + 1] for name, values in batch.inputs.items()}
    mask = row.get("attention_mask")
    if mask is None:
        return row
    real = np.flatnonzero(mask[0])
    return {name: np.ascontiguousarray(values[:, real]) for name, values in row.items()}


def _stretched(have: int, want: int) -> NDArray[np.int64]:
    """Return which of `have` positions stand at each of `want` positions."""
    if have < 3:
        return np.resize(np.arange(have), want)
    if want < 3:
        return np.arange(want)
    middle = np.resize(np.arange(1, have - 1), want - 2)
    return np.concatenate([[0], middle, [have - 1]]).astype(np.int64)


def described(rows: Sequence[Row], source: Source, describe: Callable[[Row, int, Any], Written]) -> list[Written]:
    """Return `describe(row, index, tokenizer)` of each row; rows that are tokens already are passed over."""
    texts = [(index, row) for index, row in enumerate(rows) if not is_token_ids(row.get("text"))]
    tokenizer = source.processor() if texts else None
    return [describe(row, index, tokenizer) for index, row in texts]
