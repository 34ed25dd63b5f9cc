"""Layers that lead narrower blocks to the teacher's width, against numpy's least squares."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.tasks.base import Batch
from gossamer.train.objectives import Hidden, Seen
from gossamer.train.projections import ENOUGH, Moments, channel_axis, fitted


def test_the_fit_is_that_of_least_squares() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(200, 5) + 3, torch.randn(200, 7)
    moments = Moments.empty(5, 7)
    moments.add(ours[:90], theirs[:90])
    moments.add(ours[90:], theirs[90:])
    with_ones = np.concatenate([ours.numpy(), np.ones((200, 1))], 1)
    wanted = np.linalg.lstsq(with_ones, theirs.numpy(), rcond=None)[0]
    layer = moments.solved(damping=0)
    assert np.allclose(layer.weight.detach().numpy(), wanted[:5].T, atol=1e-5)
    assert np.allclose(layer.bias.detach().numpy(), wanted[5], atol=1e-5)


def test_a_linear_map_is_found_again_and_followed_to_nothing() -> None:
    torch.manual_seed(0)
    lead = torch.nn.Linear(4, 6)

    def passes() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        for _ in range(30):
            same, narrow = torch.randn(1, 9, 6), torch.randn(1, 9, 4)
            with torch.no_grad():
                yield [same, narrow], [2 * same, lead(narrow)]

    layers, axes = fitted(passes(), trained=False)
    assert layers is not None
    assert axes == (None, 2)
    assert not any(part.requires_grad for part in layers.parameters())
    ours, theirs = next(passes())
    rows = [Batch({"input_ids": np.ones((1, 9), dtype=np.int64)}, np.array([0]))]
    shares = Hidden(layers, axes)(Seen(torch.zeros(1, 2), None, ours, theirs, rows))
    assert float(shares) == pytest.approx((0.25 + 0) / 2, abs=1e-4)


def test_images_are_led_along_their_channels() -> None:
    torch.manual_seed(0)
    lead = torch.randn(6, 4)
    narrow = torch.randn(1, 4, 20, 20)
    layers, axes = fitted(iter([([narrow], [torch.einsum("dc,bchw->bdhw", lead, narrow)])]), trained=True)
    assert layers is not None
    assert axes == (1,)
    assert torch.allclose(layers[0].weight, lead, atol=1e-2)
    assert all(part.requires_grad for part in layers.parameters())


def test_alike_widths_take_one_pass_and_no_layer() -> None:
    passes = iter([([torch.ones(1, 3, 4)], [torch.ones(1, 3, 4)])] * 5)
    assert fitted(passes, trained=False) == (None, (None,))
    assert len(list(passes)) == 4


def test_a_fit_ends_where_it_has_seen_enough() -> None:
    rows = 2 * ENOUGH
    passes = iter([([torch.randn(1, 2, 4)], [torch.randn(1, 2, 6)]) for _ in range(2 * rows)])
    fitted(passes, trained=False)
    assert len(list(passes)) == rows


@pytest.mark.parametrize(("ours", "theirs"), [((1, 5, 4), (1, 6, 5)), ((1, 5, 4), (1, 20)), ((1, 4), (2, 4))])
def test_shapes_that_no_map_of_channels_joins_are_refused(ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    with pytest.raises(TechniqueError, match=r"\[.*\] where the original's gives"):
        channel_axis(torch.zeros(ours), torch.zeros(theirs))
