"""Weights that come when they are needed: the same outputs, never more in memory than the budget and what runs."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.models.example import made_up_example
from gossamer.models.lazy import LazyWeights, load_buffers, without_values
from gossamer.models.roles import ModelMap
from gossamer.models.structure import map_model

FAMILIES = runpy.run_path(str(Path(__file__).parent / "test_structure.py"))["FAMILIES"]


def emptied(family: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Return a model of random weights, the same without values, and its parameters by name."""
    torch.manual_seed(0)
    whole = family().eval()
    empty = without_values(family)
    state = whole.state_dict()
    load_buffers(empty, state.__getitem__, state)
    return whole, empty, {name: values.detach() for name, values in whole.named_parameters()}


def _followed(model: ModelMap) -> ModelMap:
    """Return a map without what is only looked for in models that are opened whole, and what is said of that."""
    return replace(
        model,
        dimensions=tuple(one for one in model.dimensions if one.kind not in ("width", "channels")),
        notes=tuple(note for note in model.notes if "width" not in note and "channels" not in note),
    )


@pytest.mark.parametrize("family", list(FAMILIES), ids=lambda family: family.__name__)
def test_a_model_without_values_computes_the_same(family: Callable[[], nn.Module]) -> None:
    whole, empty, values = emptied(family)
    example = made_up_example(whole)
    assert example is not None
    weights = LazyWeights(empty, values.__getitem__, budget=0)
    with torch.no_grad():
        torch.testing.assert_close(empty(**example).logits, whole(**example).logits, rtol=0, atol=0)
    assert weights.loaded_bytes == 0
    assert all(parameter.is_meta for parameter in empty.parameters())
    streamed, opened = map_model(empty, example, held=weights.held), map_model(whole, example)
    assert _followed(streamed) == _followed(opened)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.shared = nn.Linear(4, 4, bias=False)
        self.shared.weight = self.first.weight

    def tie_weights(self) -> None:
        self.shared.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.shared(self.second(self.first(x)))
        return found


def two(budget: int) -> tuple[Two, LazyWeights, dict[str, Tensor], list[str]]:
    module = without_values(Two)
    assert isinstance(module, Two)
    values = {"first.weight": torch.eye(4), "second.weight": 2 * torch.eye(4)}
    asked: list[str] = []

    def value(name: str) -> Tensor:
        asked.append(name)
        return values[name]

    return module, LazyWeights(module, value, budget), values, asked


def test_what_was_used_longest_ago_goes_first_and_shared_weights_come_once() -> None:
    module, weights, _, asked = two(budget=64)
    assert torch.equal(module(torch.ones(1, 4)), 2 * torch.ones(1, 4))
    assert asked == ["first.weight", "second.weight", "first.weight"]
    assert weights.loaded_bytes == 64
    module, weights, _, asked = two(budget=128)
    module(torch.ones(1, 4))
    module(torch.ones(1, 4))
    assert asked == ["first.weight", "second.weight"]
    assert module.shared.weight is module.first.weight


def test_what_is_held_stays_and_what_changed_is_fetched_again() -> None:
    module, weights, values, asked = two(budget=0)
    with weights.held(module):
        module(torch.ones(1, 4))
        assert asked == ["first.weight", "second.weight"]
        values["second.weight"] = 3 * torch.eye(4)
        weights.refresh("second.weight")
        weights.drop()
        assert torch.equal(module(torch.ones(1, 4)), 3 * torch.ones(1, 4))
    assert weights.loaded_bytes == 0
    with weights.held_parameter("first.weight") as parameter:
        assert torch.equal(parameter, torch.eye(4))
    weights.refresh("first.weight")  # it is not there: nothing to do
    assert asked.count("first.weight") == 2


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    module, weights, _, _ = two(budget=0)
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 5))
    assert weights.loaded_bytes == 0
    assert torch.equal(module(torch.ones(1, 4)), 2 * torch.ones(1, 4))


def test_a_weight_of_another_shape_is_named() -> None:
    module, _, values, _ = two(budget=0)
    values["second.weight"] = torch.eye(5)
    with pytest.raises(
        ModelError, match=r"second\.weight has the shape \[5, 5\] in the file, the model needs \[4, 4\]"
    ):
        module(torch.ones(1, 4))
