"""Moments: panel by panel the same as all at once, in whatever turns they are added, asked for and merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.techniques.quantize.moments import PANEL, Moments


def rows(num_tokens: int, num_inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(seed))


def check(seen: Moments, x_tI: Tensor) -> None:
    assert seen.num_tokens == len(x_tI)
    second_II = seen.second_II
    torch.testing.assert_close(second_II.double(), x_tI.double().t() @ x_tI.double() / len(x_tI), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second_II, second_II.t())
    assert torch.equal(second_II[PANEL:, :PANEL], second_II[:PANEL, PANEL:].t())
    torch.testing.assert_close(seen.mean_I, x_tI.mean(0))
    torch.testing.assert_close(seen.covariance_II, torch.cov(x_tI.t(), correction=0).reshape(second_II.shape),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(seen.mean_abs_I, x_tI.abs().mean(0))
    assert torch.equal(seen.max_abs_I, x_tI.abs().amax(0))


@pytest.mark.parametrize("num_inputs", [1, PANEL - 1, PANEL, 2 * PANEL + 5])
def test_moments_are_those_of_all_rows_however_they_come(num_inputs: int) -> None:
    first, second, third = (rows(count, num_inputs, seed) for seed, count in enumerate((7, 12, 5)))
    seen, other = Moments.empty(num_inputs), Moments.empty(num_inputs)
    seen.add(first)
    check(seen, first)  # asked for in between: the sum becomes a mean, and a sum again
    seen.add(second[None])
    check(seen, torch.cat([first, second]))
    other.add(third)
    check(other, third)
    seen.merge(other)
    check(seen, torch.cat([first, second, third]))
    check(other, third)  # merging takes nothing away


def test_nothing_seen_is_no_moments() -> None:
    seen = Moments.empty(3)
    assert seen.num_tokens == 0
    assert seen.second_II.count_nonzero() == 0
    seen.merge(Moments.empty(3))
    assert seen.num_tokens == 0
