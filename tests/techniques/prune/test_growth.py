"""Which weights are gone while sparsity grows, beside slow and obvious ways to find them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gossamer.techniques.prune.growing import Growth, Masked
from gossamer.techniques.prune.growth import gone_of_layers, gone_of_pattern, grown, smallest
from gossamer.techniques.prune.masks import kept


def test_sparsity_grows_as_published() -> None:
    assert [grown(0.0, 0.875, t / 4) for t in range(5)] == pytest.approx(
        [0.875 * (1 - (1 - t / 4) ** 3) for t in range(5)]
    )
    assert grown(0.25, 0.5, -1) == 0.25  # before it begins
    assert grown(0.25, 0.5, 2) == 0.5


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.7, 0.999])
def test_the_smallest_go_and_of_equal_ones_those_with_the_smaller_tie(share: float) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200,), generator=draw).float()
    ties = torch.randint(0, 4, (200,), generator=draw).float()
    order = sorted(range(200), key=lambda i: (float(scores[i]), float(ties[i]), i))
    gone = set(order[: round(share * 1000) * 200 // 1000])
    assert {i for i, is_gone in enumerate(smallest(scores, share, ties).tolist()) if is_gone} == gone


def test_layers_together_lose_their_smallest_wherever_they_are() -> None:
    loud, quiet = torch.full((4, 6), 5.0), torch.arange(24.0).reshape(4, 6) / 24
    first, second = gone_of_layers([loud, quiet], 0.25, [loud, quiet])
    assert not first.any()
    assert torch.equal(second, quiet < 0.5)


def test_a_pattern_grows_to_the_whole_of_it() -> None:
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(1))
    whole = ~kept(scores, 0.0, (2, 4))
    before: Tensor = torch.zeros_like(whole)
    for share in (0.0, 0.1, 0.25, 0.4, 0.5):
        gone = gone_of_pattern(scores, (2, 4), share, scores)
        assert int(gone.sum()) == math.floor(share * scores.numel())
        assert bool((before <= gone).all())
        assert bool((gone <= whole).all())
        if 0 < share < 0.5:
            assert scores[gone].max() <= scores[whole & ~gone].min()
        before = gone
    assert torch.equal(before, whole)


def test_equal_scores_of_a_pattern_go_by_the_tie() -> None:
    ties = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert kept(torch.zeros(1, 4), 0.0, (2, 4), ties_OI=ties).tolist() == [[False, True, False, True]]
    assert gone_of_pattern(torch.zeros(1, 4), (1, 4), 0.75, ties).tolist() == [[True, False, True, True]]


def test_the_steps_leave_one_for_what_is_left() -> None:
    growth = Growth(0.5, None, "magnitude", "layer", start=0.1, rest=0.4)
    assert growth.steps(50) == (5, 30)
    assert growth.steps(1) == (0, 0)
    assert growth.steps(2) == (0, 1)
    assert Growth(0.5, (1, 4), "movement", "layer", 0.1, 0.4).final == 0.75


def test_gradients_stop_at_a_mask_unless_scores_look_at_them() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    for scored, expected in ((False, [[0.0, 1.0, 1.0]]), (True, [[1.0, 1.0, 1.0]])):
        trained = weight.clone().requires_grad_()
        mask = Masked(weight, scored=scored, transposed=False)
        mask.put(torch.tensor([[True, False, False]]))
        assert mask(trained).tolist() == [[0.0, -2.0, 3.0]]
        mask(trained).sum().backward()
        assert trained.grad is not None
        assert trained.grad.tolist() == expected
