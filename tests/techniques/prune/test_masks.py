"""Masks: exact counts, ties to the first, patterns, and clear errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import TechniqueError
from gossamer.techniques.prune.masks import kept, magnitude_scores, read_pattern, wanda_scores


@given(sparsity=st.floats(0.01, 0.99), inputs=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_row_keeps_the_asked_share_and_the_largest(sparsity: float, inputs: int, seed: int) -> None:
    scores_OI = torch.rand(3, inputs, generator=torch.Generator().manual_seed(seed))
    mask_OI = kept(scores_OI, sparsity)
    assert (mask_OI.sum(1) == inputs - int(sparsity * inputs)).all()
    for scores_I, mask_I in zip(scores_OI, mask_OI, strict=True):
        if not mask_I.all():
            assert scores_I[mask_I].min() >= scores_I[~mask_I].max()


def test_ties_go_to_the_first() -> None:
    assert kept(torch.ones(1, 4), 0.5).tolist() == [[True, True, False, False]]


def test_a_pattern_keeps_n_of_every_m() -> None:
    scores_OI = torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0]])
    assert kept(scores_OI, 0.9, (2, 4)).tolist() == [[True, True, False, False, False, False, True, True]]


def test_wanda_weighs_with_the_size_of_the_input() -> None:
    weight_OI, second_II = torch.tensor([[3.0, -1.0]]), torch.diag(torch.tensor([1.0, 100.0]))
    assert kept(magnitude_scores(weight_OI), 0.5).tolist() == [[True, False]]
    assert kept(wanda_scores(weight_OI, second_II), 0.5).tolist() == [[False, True]]


@pytest.mark.parametrize("text", ["2", "4:2", "0:4", "a:b", "2:4:8", ":4", "4:4"])
def test_what_is_no_pattern_is_said(text: str) -> None:
    with pytest.raises(TechniqueError, match="is not n:m"):
        read_pattern(text)


def test_a_pattern_that_does_not_divide_is_said() -> None:
    with pytest.raises(TechniqueError, match="2:4 does not divide in_features 6"):
        kept(torch.ones(1, 6), 0.5, (2, 4))
