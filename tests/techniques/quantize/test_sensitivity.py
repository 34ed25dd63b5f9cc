"""Fisher information times output error predicts how far small changes of a layer move the predictions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gossamer.models.roles import Stack
from gossamer.models.walker import Call, Stream, Walker
from gossamer.techniques.block import token_error
from gossamer.techniques.quantize.sensitivity import block_sensitivities, last_sensitivities, sensitivities


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


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(torch.tanh(self.up(x)))
        return found


@pytest.mark.parametrize("name", ["up", "down"])
def test_inside_a_block_the_prediction_is_how_far_its_output_moves(name: str) -> None:
    torch.manual_seed(0)
    block = Residual().requires_grad_(False)
    # of one size, as behind a norm: what comes back must not hang on how large the error is
    calls = [Call((8**0.5 * nn.functional.normalize(torch.randn(1, 400, 8), dim=-1),), {}) for _ in range(10)]
    found = block_sensitivities(block, calls, {"up": block.up, "down": block.down})
    weight = getattr(block, name).weight
    shares = []
    for _ in range(20):
        kept = weight.clone()
        changed = kept + 0.02 * torch.randn(weight.shape)
        before = [call(block) for call in calls]
        weight.copy_(changed)
        moved = torch.stack([token_error(call(block), y) for call, y in zip(calls, before, strict=True)])  # type: ignore[arg-type]
        weight.copy_(kept)
        shares.append(2 * found[name].divergence(kept, changed) / float(moved.mean()))
    assert sum(shares) / len(shares) == pytest.approx(1, rel=0.15)
    assert 0.5 < min(shares) < max(shares) < 2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Residual(), Residual()]), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(x)
        return found


def test_a_share_of_the_last_hidden_states_is_worth_what_it_moves_the_predictions() -> None:
    torch.manual_seed(0)
    model = Network().requires_grad_(False)
    samples = [{"x": torch.randn(1, 500, 8)} for _ in range(6)]
    walker, stream = Walker(model, run, samples), Stream()
    stack = Stack("layers", 2, 1, "Residual")
    for index, layer in enumerate(list(model.layers)):
        stream.outputs = [call(layer) for call in walker.calls(stack, index, stream)]
    stream.finish("layers")
    found, worth = last_sensitivities(walker, stream, {"head": model.head})
    whole = sensitivities(model, run, samples, {"head": model.head})
    torch.testing.assert_close(found["head"].moments.second_II, whole["head"].moments.second_II)
    torch.testing.assert_close(found["head"].fisher_O, whole["head"].fisher_O, rtol=0.2, atol=0)
    share, kl = 1e-4, []
    for hidden in stream.finished["layers"]:
        assert isinstance(hidden, Tensor)
        noise = torch.randn_like(hidden) * (share * hidden.square().mean(-1, keepdim=True)).sqrt()
        p, q = (torch.log_softmax(model.head(part).double(), -1) for part in (hidden, hidden + noise))
        kl.append((p.exp() * (p - q)).sum(-1).mean())
    assert 0.5 * share * worth == pytest.approx(float(torch.stack(kl).mean()), rel=0.25)
