"""Fisher information times output error predicts how far small changes of a layer move the predictions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gossamer.techniques.quantize.sensitivity import sensitivities


class Speaker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.unused = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.body(x)))
        return found


def run(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = module(**inputs)
    return found


def divergence(model: Speaker, samples: list[dict[str, Tensor]], name: str, changed: Tensor) -> float:
    """Return the true KL divergence per prediction with a changed weight in place."""
    layer = getattr(model, name)
    with torch.no_grad():
        before = [torch.log_softmax(run(model, sample).double(), -1) for sample in samples]
        kept = layer.weight.clone()
        layer.weight.copy_(changed)
        after = [torch.log_softmax(run(model, sample).double(), -1) for sample in samples]
        layer.weight.copy_(kept)
    kl = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after, strict=True)]
    return float(torch.stack(kl).mean())


@pytest.mark.parametrize("name", ["body", "head"])
def test_the_prediction_is_the_divergence_of_a_small_change(name: str) -> None:
    torch.manual_seed(0)
    model = Speaker()
    samples = [{"x": torch.randn(1, 400, 8)} for _ in range(10)]
    found = sensitivities(model, run, samples, {"body": model.body, "head": model.head, "unused": model.unused})
    assert found.keys() == {"body", "head"}  # no sample reaches the third
    weight = getattr(model, name).weight.detach()
    for row in range(weight.shape[0]):  # one output at a time: between outputs the information is taken as diagonal
        changed = weight.clone()
        changed[row] += 0.02 * torch.randn(weight.shape[1])
        predicted = found[name].divergence(weight, changed)
        assert predicted == pytest.approx(divergence(model, samples, name, changed), rel=0.25)
    assert found[name].divergence(weight, weight) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_seed_draws_the_same_answers() -> None:
    torch.manual_seed(0)
    model, samples = Speaker(), [{"x": torch.randn(1, 20, 8)}]
    once, again, other = (sensitivities(model, run, samples, {"body": model.body}, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(once["body"].fisher_O, again["body"].fisher_O)
    assert not torch.equal(once["body"].fisher_O, other["body"].fisher_O)
    torch.testing.assert_close(once["body"].moments.second_II, other["body"].moments.second_II)
