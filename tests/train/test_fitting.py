"""How many rows of a step fit: what autograd keeps is counted, and a step comes out the same in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.run.progress import Silent
from gossamer.tasks.base import Batch
from gossamer.train.fitting import Fit, Kept, fitting_rows, free_bytes, kept, kept_bytes, remembered

WEIGHT = torch.ones(8, 8, requires_grad=True)


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def rows(count: int) -> list[Batch]:
    return [Batch({"x": np.ones((1, 8), dtype=np.float32)}, np.array([index])) for index in range(count)]


def run(some: object) -> Tensor:
    """Keep 32 bytes for each row (its input), 32 for what the exponential gave, and 256 whatever the rows."""
    count = len(some)  # type: ignore[arg-type]
    return ((torch.ones(count, 8) @ WEIGHT.exp()).exp()).sum()


def test_what_is_kept_is_counted_once_and_parameters_are_not() -> None:
    assert kept_bytes(lambda: run(rows(1))) == 256 + 64
    assert kept_bytes(lambda: run(rows(2))) == 256 + 128


@pytest.mark.parametrize(("free", "fits"), [(10**9, 16), (3500, 16), (2720, 8), (1936, 2), (1768, 1)])
def test_the_most_rows_that_fit_are_taken(free: int, fits: int) -> None:
    said = Said()
    # always 256 + 16 * 64 trained, 64 * 1.4 for each row: 1280 + 89.6 n <= 0.8 free
    assert fitting_rows(16, rows(2), run, 64, free, said, "distill") == Fit(fits)
    assert bool(said.lines) == (fits < 16)


def test_less_than_a_row_is_refused_with_both_numbers() -> None:
    with pytest.raises(TechniqueError, match=r"distill needs about .* for one row of a step, .* may be used"):
        fitting_rows(16, rows(2), run, 64, 1000, Silent(), "distill")


class Block(nn.Module):
    """Keep 32 bytes for each row (what it gives), and its input, which the block before gave."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ WEIGHT).exp()


BLOCKS = nn.Sequential(Block(), Block(), Block())


def run_blocks(some: object) -> Tensor:
    return BLOCKS(torch.ones(len(some), 8)).sum()  # type: ignore[arg-type, no-any-return]


def test_blocks_that_are_passed_again_keep_what_goes_into_them_and_all_of_one() -> None:
    """Four tensors: the input, and what each block gives. The first block keeps two of them, the others one more."""
    assert kept(lambda: run_blocks(rows(1)), list(BLOCKS)) == Kept(4 * 32, 3 * 32 + 2 * 32)
    assert kept(lambda: run_blocks(rows(2)), list(BLOCKS)) == Kept(8 * 32, 6 * 32 + 4 * 32)
    assert kept(lambda: run(rows(1))) == Kept(256 + 64, 256 + 64)


class Deep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(10):
            x = x.sin()
        return x


def test_blocks_are_passed_again_where_no_row_fits_otherwise() -> None:
    blocks = nn.Sequential(*(Deep() for _ in range(5)))
    source = torch.ones(16, 8, requires_grad=True)

    def run(some: object) -> Tensor:
        return blocks(source[: len(some)] + 0).sum()  # type: ignore[arg-type, no-any-return]

    one = kept(lambda: run(rows(1)), list(blocks))
    assert one == Kept(50 * 32, 5 * 32 + 10 * 32)
    said, free = Said(), int(1.4 * 40 * 32 / 0.8)
    for asked, some in ((None, []), (False, list(blocks))):
        with pytest.raises(TechniqueError, match="may be used"):
            fitting_rows(16, rows(2), run, 0, free, said, "distill", blocks=some, checkpointing=asked)
    assert said.lines == []
    fit = fitting_rows(16, rows(2), run, 0, free, said, "distill", blocks=list(blocks), checkpointing=None)
    assert fit == Fit(2, checkpointing=True)
    assert "passed again" in said.lines[0]
    assert fitting_rows(
        16, rows(2), run, 0, 10 * free, said, "distill", blocks=list(blocks), checkpointing=None
    ) == Fit(8)


def test_what_was_found_first_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    found = Fit(4, checkpointing=True)
    assert remembered(folder, lambda: found) == found
    assert remembered(folder, lambda: Fit(16)) == found


def test_on_a_gpu_weights_that_are_still_to_come_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = nn.Linear(8, 8), nn.Linear(8, 8)
    student.tied = student.weight  # type: ignore[assignment]  # one tensor under two names is moved once
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000 + device.index, 20_000))
    gpu = torch.device("cuda", 0)
    assert free_bytes(gpu, student, teacher, None) == 10_000 - 2 * 4 * (64 + 8)
    assert free_bytes(gpu, student.to("meta"), None) == 10_000
    assert free_bytes(torch.device("cuda", 1), None) == 10_001
