"""Low-rank compensation: optimal in the outputs, whatever root of the moments is taken; refuses what has no meaning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.techniques.quantize.gptq import output_error
from gossamer.techniques.quantize.low_rank import low_rank


def case(outputs: int = 12, inputs: int = 20) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    inputs_tI = torch.randn(200, inputs, generator=draw) * torch.logspace(-1, 1, inputs)
    return torch.randn(outputs, inputs, generator=draw), inputs_tI.t() @ inputs_tI / 200


def test_the_product_is_the_best_of_its_rank_in_the_outputs() -> None:
    error_OI, second_II = case()
    values, vectors = torch.linalg.eigh(second_II.double())
    root_II = vectors @ values.sqrt().diag() @ vectors.t()  # EoRA's square root instead of a Cholesky factor
    sizes = torch.linalg.svdvals(error_OI.double() @ root_II)
    for rank in (1, 4, 11):
        up_OR, down_RI = low_rank(error_OI, second_II, rank, damping=1e-9)
        assert up_OR.shape == (12, rank)
        assert down_RI.shape == (rank, 20)
        left = output_error(error_OI, up_OR @ down_RI, second_II)
        assert left == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-4)  # Eckart and Young


def test_it_beats_a_decomposition_that_does_not_look_at_inputs() -> None:
    error_OI, second_II = case()
    up_OK, size_K, down_KI = torch.linalg.svd(error_OI, full_matrices=False)
    blind = up_OK[:, :4] * size_K[:4] @ down_KI[:4]
    up_OR, down_RI = low_rank(error_OI, second_II, 4)
    assert output_error(error_OI, up_OR @ down_RI, second_II) < 0.8 * output_error(error_OI, blind, second_II)


def test_full_rank_leaves_nothing_and_dead_inputs_do_no_harm() -> None:
    error_OI, second_II = case()
    second_II[3] = second_II[:, 3] = 0
    up_OR, down_RI = low_rank(error_OI, second_II, 12)
    torch.testing.assert_close(up_OR @ down_RI, error_OI, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 13])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(TechniqueError, match=f"rank {rank} .* 12 x 20"):
        low_rank(*case(), rank)


def test_moments_that_are_not_finite_are_refused() -> None:
    error_OI, second_II = case()
    second_II[0, 0] = torch.inf
    with pytest.raises(TechniqueError, match="NaN or infinite"):
        low_rank(error_OI, second_II, 2)
