"""SparseGPT beside optimal brain surgery written out step by step, and what must hold whatever the data."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.models.quantized import QuantSpec
from gossamer.techniques.prune.masks import kept, magnitude_scores, wanda_scores
from gossamer.techniques.prune.sparsegpt import sparsegpt
from gossamer.techniques.quantize.gptq import gptq, output_error

layer = runpy.run_path(str(Path(__file__).parents[1] / "quantize" / "test_gptq.py"))["layer"]


def slow_sparsegpt(weight_OI: Tensor, second_II: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Return the weights by the paper's equations, one inverse of the free channels' moments a step, in one block."""
    weight, moments = weight_OI.double().clone(), second_II.double().clone()
    moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    inverses = [torch.linalg.inv(moments[j:, j:]) for j in range(len(moments))]  # of the channels that are free at j
    step = torch.stack([inverse[0, 0] for inverse in inverses])
    keep = torch.ones(weight.shape, dtype=torch.bool)
    if pattern is None:
        cost = (weight.square() / step).flatten()
        keep.view(-1)[cost.argsort()[: int(sparsity * cost.numel())]] = False
    for j, inverse in enumerate(inverses):
        if pattern is not None and j % pattern[1] == 0:
            ahead = slice(j, j + pattern[1])
            keep[:, ahead] = kept((weight[:, ahead].square() / step[ahead]).float(), 0.0, pattern)
        gone = torch.where(keep[:, j], 0.0, weight[:, j])
        weight[:, j:] -= (gone / inverse[0, 0])[:, None] * inverse[0]
        weight[~keep[:, j], j] = 0
    return weight


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_paper_s_recursion(pattern: tuple[int, int] | None, seed: int) -> None:
    weight_OI, second_II = layer(seed)
    found = sparsegpt(weight_OI, second_II, 0.5, pattern=pattern)
    wanted = slow_sparsegpt(weight_OI, second_II, 0.5, pattern).float()
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9])
def test_counts_are_exact_whatever_the_blocks(sparsity: float) -> None:
    weight_OI, second_II = layer(rows=5)
    for block in (7, 32, 128):
        found = sparsegpt(weight_OI, second_II, sparsity, block=block)
        assert int((found == 0).sum()) == int(sparsity * weight_OI.numel() + 1e-9)


def test_with_even_inputs_it_is_magnitude_and_changes_nothing_else() -> None:
    weight_OI, _ = layer()
    found = sparsegpt(weight_OI, 3 * torch.eye(32), 0.5)
    largest = weight_OI.abs().flatten().argsort(descending=True)[: weight_OI.numel() // 2]
    assert torch.equal(found.flatten().nonzero().flatten(), largest.sort().values)
    torch.testing.assert_close(found, torch.where(found == 0, 0.0, weight_OI))


def test_its_outputs_are_nearer_than_wanda_s_and_magnitude_s() -> None:
    for seed in range(4):
        weight_OI, second_II = layer(seed)
        wanda = weight_OI * kept(wanda_scores(weight_OI, second_II), 0.5)
        plain = weight_OI * kept(magnitude_scores(weight_OI), 0.5)
        found = output_error(weight_OI, sparsegpt(weight_OI, second_II, 0.5), second_II)
        assert found < 0.7 * output_error(weight_OI, wanda, second_II)
        assert found < 0.7 * output_error(weight_OI, plain, second_II)


def test_gptq_behind_it_leaves_the_zeros_and_beats_rounding_that_masks_afterwards() -> None:
    weight_OI, second_II = layer()
    sparse_OI = sparsegpt(weight_OI, second_II, 0.5)
    for spec in (QuantSpec(bits=4, group_size=16), QuantSpec(bits=3, symmetric=False, group_size=16)):
        found = gptq(sparse_OI, second_II, spec).dequantize()
        assert bool((found[sparse_OI == 0] == 0).all())
        masked = gptq(weight_OI, second_II, spec).dequantize() * (sparse_OI != 0)
        assert output_error(weight_OI, found, second_II) < output_error(weight_OI, masked, second_II)


def test_channels_that_nothing_excites_go() -> None:
    weight_OI, second_II = layer()
    second_II[3], second_II[:, 3] = 0, 0
    assert bool((sparsegpt(weight_OI, second_II, 0.25)[:, 3] == 0).all())


def test_wrong_input_is_explained() -> None:
    weight_OI, second_II = layer()
    with pytest.raises(TechniqueError, match="3:5 does not divide in_features 32 of up"):
        sparsegpt(weight_OI, second_II, 0.5, pattern=(3, 5), name="up")
    second_II[0, 0] = torch.nan
    with pytest.raises(TechniqueError, match="inputs of up are NaN"):
        sparsegpt(weight_OI, second_II, 0.5, name="up")
