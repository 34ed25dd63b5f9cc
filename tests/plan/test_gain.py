"""What more rows would bring: exact where the law holds, and felt where rows are few and where they are many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gossamer.plan.gain import expected_share, gain_of_twice, in_words
from gossamer.plan.job import Job, tensors_of
from gossamer.tasks.base import Batch
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.quantize import Quantize


@pytest.mark.parametrize("chance", [0.0, 0.02, 0.3])
def test_the_share_is_exact_where_errors_fall_as_one_over_the_rows(chance: float) -> None:
    def error(rows: float) -> float:  # in units of n
        return 0.7 * (1 + chance / rows)

    exact = (error(1) - error(2)) / error(1)
    assert expected_share(error(1 / 4), error(1 / 2)) == pytest.approx(exact, abs=1e-12)


def test_more_rows_never_seem_to_harm() -> None:
    assert expected_share(1.0, 1.1) == 0.0


def with_rows(job: Job, calibration: tuple[Batch, ...], name: str) -> Job:
    return replace(job, calibration=calibration, prints={**job.prints, "calibration": name})


def test_few_rows_gain_more_than_many_and_the_model_is_left_as_it_was(job: Job) -> None:
    step = Gptq(bits=3, group_size=32, targets=("q", "k", "v", "o", "up", "down"))
    candidate, sample = job.candidate(), tensors_of(job.calibration[0].inputs)
    before = job.source.forward(candidate.module, sample, job.task.output)
    few = gain_of_twice(with_rows(job, job.calibration[:16], "few"), [step])
    many = gain_of_twice(with_rows(job, job.calibration * 4, "many"), [step])
    assert few is not None
    assert many is not None
    assert 0 < few < 1
    after = job.source.forward(job.candidate().module, sample, job.task.output)
    assert torch.equal(before, after)
    assert many < few  # the same rows again: chance has less to fit


def test_what_looks_at_no_rows_gains_nothing_from_them(job: Job) -> None:
    assert gain_of_twice(job, [Quantize()]) is None
    assert gain_of_twice(replace(job, calibration=job.calibration[:15]), [Gptq(group_size=32)]) is None


def test_in_words() -> None:
    assert in_words(None, 64) == ""
    assert in_words(0.031, 64) == "twice the 64 calibration inputs are expected to lower the divergence by about 3%"
    assert in_words(0.004, 64).endswith("by less than 1%: enough")
