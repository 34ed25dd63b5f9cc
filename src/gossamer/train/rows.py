"""Rows as mini-batches: padded where a mask says so, and what is padding is known to every objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gossamer.tasks.base import Batch

MASK, DECODER = "attention_mask", "decoder_input_ids"


class Rows(Dataset[Batch]):
    """Hold batches of one row each, as `Task.batches` gives them; the last step is filled with the first of them again.

    >>> len(Rows([row_0, row_1, row_2], 2))  # doctest: +SKIP
    4
    """

    def __init__(self, batches: Sequence[Batch], step: int = 1) -> None:
        self.batches = batches
        self.length = math.ceil(len(batches) / step) * step

    def __len__(self) -> int:
        """Return how many rows an epoch has: whole steps, so that each is the same however it is cut into parts."""
        return self.length

    def __getitem__(self, index: int) -> Batch:
        """Return one row."""
        return self.batches[index % len(self.batches)]


def collate(rows: Sequence[Batch]) -> dict[str, Any]:
    """Return {"inputs": tensors [B, ...], "rows": the rows}; shorter rows are padded at the end with zeros.

    Rows that cannot be padded (no mask tells the model what is padding) stay apart: "inputs" is a list then.

    >>> collate([row_of_3_tokens, row_of_5_tokens])["inputs"]["input_ids"].shape  # doctest: +SKIP
    torch.Size([2, 5])
    """
    names = list(rows[0].inputs)
    alike = {name for name in names if len({row.inputs[name].shape for row in rows}) == 1}
    padded = [name for name in names if name not in alike]
    if any(not _may_pad(name, names, rows) for name in padded):
        return {"inputs": [_tensors(row) for row in rows], "rows": list(rows)}
    inputs = {name: torch.from_numpy(_stacked([row.inputs[name] for row in rows])) for name in names}
    return {"inputs": inputs, "rows": list(rows)}


def parts_of(batch: dict[str, Any]) -> list[tuple[dict[str, Tensor], list[Batch]]]:
    """Return what one pass each is made of: (inputs, their rows)."""
    inputs, rows = batch["inputs"], batch["rows"]
    if isinstance(inputs, list):
        return [(one, [row]) for one, row in zip(inputs, rows, strict=True)]
    return [(inputs, rows)]


@dataclass(frozen=True)
class Lengths:
    """Hold how long each row of a padded pass is, by the length that all are padded to."""

    by_width: dict[int, list[int]]

    @classmethod
    def of(cls, rows: Sequence[Batch]) -> Lengths:
        """Return the lengths along the second axis of the rows' inputs, the decoder's last."""
        found: dict[int, list[int]] = {}
        for name in sorted(rows[0].inputs, key=lambda name: name == DECODER):
            lengths = [row.inputs[name].shape[1] for row in rows if row.inputs[name].ndim == 2]
            if lengths:
                found[max(lengths)] = lengths
        return Lengths(found)

    def valid(self, values: Tensor) -> Tensor:
        """Return the rows of values [B, T, C] that are no padding, as [N, C]; [B, C] and images stay as they are."""
        if values.ndim != 3 or values.shape[1] not in self.by_width:
            return values.flatten(0, -2) if values.ndim <= 3 else values.flatten(1)
        return values[self.real(values.shape[1], values.device)]

    def real(self, width: int, device: torch.device) -> Tensor | None:
        """Return which of `width` places of each row are no padding, [B, T]; None where none of them can be."""
        if width not in self.by_width:
            return None
        lengths_B = torch.tensor(self.by_width[width], device=device)
        return torch.arange(width, device=device) < lengths_B[:, None]


def _may_pad(name: str, names: Sequence[str], rows: Sequence[Batch]) -> bool:
    tokens = all(row.inputs[name].ndim == 2 and row.inputs[name].dtype.kind == "i" for row in rows)
    return tokens and (MASK in names or name == DECODER)  # a causal decoder does not see what comes behind


def _stacked(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if len({array.shape for array in arrays}) == 1:
        return np.concatenate(arrays)
    longest = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays])


def _tensors(row: Batch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in row.inputs.items()}
