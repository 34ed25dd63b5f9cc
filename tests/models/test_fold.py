from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from gossamer.models.fold import FoldedPair, find_pairs, fold_batch_norms, fold_factors

torch.set_num_threads(1)


def random_statistics(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, -2.0, 2.0)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.05, 4.0)
    return module.eval()


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_folded_resnet_answers_as_before(layer_type: str) -> None:
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type=layer_type, num_labels=5, image_size=32
    )
    torch.manual_seed(1)
    model = random_statistics(ResNetForImageClassification(config))
    images = torch.randn(3, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded, pairs = fold_batch_norms(model, {"pixel_values": images})
    with torch.no_grad():
        expected, found = model(pixel_values=images).logits, folded(pixel_values=images).logits
    assert len(pairs) == sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for pair in pairs:  # what is left of the norm is an addition
        factor, shift = fold_factors(folded.get_submodule(pair.norm))
        torch.testing.assert_close(factor, torch.ones_like(factor))
        torch.testing.assert_close(shift, folded.get_submodule(pair.norm).bias.double())


def test_the_factor_is_what_the_norm_does() -> None:
    norm = random_statistics(nn.Sequential(nn.BatchNorm2d(6)))[0]
    values = torch.randn(2, 6, 3, 3)
    factor, shift = fold_factors(norm)
    slow = values.double() * factor[None, :, None, None] + shift[None, :, None, None]
    torch.testing.assert_close(norm(values).double(), slow, rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """Let something else than the norm read the convolution, in the way that `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.first(x)
        if self.how == "residual":
            return self.norm(y) + y
        if self.how == "output":
            return self.norm(y), y
        if self.how == "two norms":
            return self.norm(y) + self.other(y)
        if self.how == "activation between":
            return self.norm(torch.relu(y))
        if self.how == "norm twice":
            return self.norm(self.norm(y))
        return self.norm(y)


@pytest.mark.parametrize("how", ["residual", "output", "two norms", "activation between", "norm twice"])
def test_a_convolution_that_something_else_reads_is_left_alone(how: str) -> None:
    assert find_pairs(Shared(how), {"x": torch.randn(1, 3, 8, 8)}) == []


def test_a_plain_pair_is_found_and_training_flags_are_kept() -> None:
    model = Shared("plain").train()
    assert find_pairs(model, {"x": torch.randn(1, 3, 8, 8)}) == [FoldedPair("first", "norm")]
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("eps", [1e-5, 0.5, 2.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_bias_groups_and_any_epsilon(eps: float, groups: int) -> None:
    model = random_statistics(nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups), nn.BatchNorm2d(6, eps=eps)))
    images = torch.randn(2, 3, 8, 8)
    folded, pairs = fold_batch_norms(model, {"input": images})
    assert len(pairs) == 1
    torch.testing.assert_close(folded(images), model(images), rtol=1e-5, atol=1e-5)
