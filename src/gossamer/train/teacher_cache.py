"""The teacher's predictions on disk: it runs once over all rows, and no training that follows runs it again.

For every prediction (a row's class, or each of its tokens) files hold log-probabilities at the temperature that they
are compared at:

    all V classes                        float32, where V is at most FEW or all are asked for
    the K most likely, and the rest      float16, whose error of 2^-11 is far below what a step's rows differ by, and
    as one                               int32 ids

so that a token of a vocabulary of 50,000 takes 6 K + 2 bytes instead of 200,000 (Anshumann et al., "Sparse Logit
Sampling", 2025, say what is lost with the rest's share). Trainings learn from what the teacher beside them would say.

Shape suffixes: T predictions of a row, N of all rows of a pass, V classes or tokens, K the most likely of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.run.progress import Progress
from gossamer.tasks.base import Batch
from gossamer.train.objectives import Divergence, Seen, divergence, with_the_rest_as_one
from gossamer.train.rows import Lengths, collate, parts_of

FEW = 1024  # classes that are all held
ROWS_OF_A_FILE = 256
ROWS_AT_ONCE = 16


def write(
    folder: Path,
    rows: Sequence[Batch],
    predict: Callable[[dict[str, Tensor]], Tensor],
    *,
    top_k: int | None,
    temperature: float,
    progress: Progress,
    label: str,
) -> None:
    """Run the teacher over rows and write what it predicts: files of ROWS_OF_A_FILE rows each."""
    with progress.stage(f"{label}: the original's predictions", len(rows)) as advance, torch.no_grad():
        for first in range(0, len(rows), ROWS_OF_A_FILE):
            held: dict[str, Tensor] = {}
            some = rows[first : first + ROWS_OF_A_FILE]
            for start in range(0, len(some), ROWS_AT_ONCE):
                together = some[start : start + ROWS_AT_ONCE]
                for number, logits_TV in enumerate(_predictions(together, predict), start):
                    held |= {f"{number}.{what}": values for what, values in _kept(logits_TV / temperature, top_k)}
                advance(len(together))
            save_file(held, folder / _name(first))


def _predictions(rows: Sequence[Batch], predict: Callable[[dict[str, Tensor]], Tensor]) -> Iterator[Tensor]:
    """Yield the logits [T, V] of each row, float32, without what is padding."""
    for inputs, some in parts_of(collate(rows)):
        lengths, outputs = Lengths.of(some), predict(inputs).float().cpu()
        counts = lengths.by_width.get(outputs.shape[1]) if outputs.ndim == 3 else None
        for index in range(len(some)):
            row = outputs[index : index + 1, : counts[index] if counts else None]
            yield Lengths({}).valid(row)


def _kept(logits_TV: Tensor, top_k: int | None) -> Iterator[tuple[str, Tensor]]:
    if top_k is None or top_k >= logits_TV.shape[-1]:
        yield "log_p", logits_TV.log_softmax(-1).contiguous()
        return
    top_TK = logits_TV.topk(top_k, -1).indices
    yield "log_p", with_the_rest_as_one(logits_TV, top_TK).half()
    yield "ids", top_TK.int()


def _name(first: int) -> str:
    return f"rows-{first:06d}.safetensors"


def print_of(rows: Sequence[Batch]) -> str:
    """Return the hash of what a teacher reads: another tokenizer makes other inputs of the same texts."""
    found = hashlib.sha256()
    for row in rows:
        for name, values in row.inputs.items():
            found.update(f"{name} {values.dtype} {values.shape}".encode())
            found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


class TeacherCache:
    """Read what `write` wrote for the same rows; a file is mapped, and only rows that are asked for are read."""

    def __init__(self, folder: Path, rows: Sequence[Batch]) -> None:
        self._places = {id(row): index for index, row in enumerate(rows)}
        self._rows = list(rows)  # so that no other row is ever given one of these places
        starts = range(0, len(rows), ROWS_OF_A_FILE)
        self._files: list[Any] = [safe_open(folder / _name(first), framework="pt") for first in starts]

    def of(self, rows: Sequence[Batch]) -> tuple[Tensor, Tensor | None]:
        """Return (log-probabilities [N, V] or [N, K + 1], ids [N, K] or None) of some rows, float32, in their order."""
        found: dict[str, list[Tensor]] = {"log_p": [], "ids": []}
        for row in rows:
            number, inside = divmod(self._places[id(row)], ROWS_OF_A_FILE)
            file = self._files[number]
            for what, parts in found.items():
                if (name := f"{inside}.{what}") in file.keys():  # noqa: SIM118 (a file is no mapping)
                    parts.append(file.get_tensor(name))
        ids = torch.cat(found["ids"]).long() if found["ids"] else None
        return torch.cat(found["log_p"]).float(), ids


@dataclass(frozen=True)
class CachedLogits:
    """Follow predictions of the teacher that were written before: what `Logits` does with the teacher beside."""

    cache: TeacherCache
    divergence: Divergence = "forward"
    temperature: float = 1.0
    needs_teacher: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        """Return the mean divergence in nats times the square of the temperature."""
        ours_NV = seen.lengths.valid(seen.student).float() / self.temperature
        log_p, top_NK = self.cache.of(seen.rows)
        device = ours_NV.device
        log_q = ours_NV.log_softmax(-1) if top_NK is None else with_the_rest_as_one(ours_NV, top_NK.to(device))
        return self.temperature**2 * divergence(log_p.to(device), log_q, self.divergence)
