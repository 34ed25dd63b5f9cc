"""`sparsify` on tiny models: nearer than cutting by size, kept by what rounds afterwards, explained when wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.errors import GossamerError, RecipeError
from gossamer.recipe import Recipe, Step
from gossamer.techniques.prune.sparsify import Sparsify
from gossamer.techniques.quantize.calibrated import Gptq, LearnedRounding
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.registry import build, resolve

tiny = runpy.run_path(str(Path(__file__).parents[1] / "quantize" / "test_calibrated.py"))
GRID, llama, bert, opened, distance = (tiny[name] for name in ("GRID", "llama", "bert", "opened", "distance"))


@pytest.mark.parametrize("network", [llama, bert])
def test_what_makes_up_for_the_cut_ends_nearest(network: Any) -> None:
    found = {by: distance(Sparsify(by=by, samples=8), network()) for by in ("sparsegpt", "wanda", "magnitude")}
    assert found["sparsegpt"] < found["wanda"]
    assert found["sparsegpt"] < found["magnitude"]


@pytest.mark.parametrize("by", ["sparsegpt", "wanda", "magnitude"])
def test_every_linear_layer_of_the_blocks_has_the_pattern(by: Any) -> None:
    candidate, model, context = opened(llama())
    step = Sparsify(pattern="2:4", by=by, samples=8)
    found = step.apply(candidate, model, context)
    decided = [decision.parameter for decision in step.resolve(model)]
    assert decided
    assert not any("lm_head" in name for name in decided)
    for name in decided:
        groups = found.values(name).reshape(-1, 4)
        assert bool(((groups != 0).sum(1) == 2).all()), name


@pytest.mark.parametrize(
    "behind",
    [
        Quantize(**GRID),
        Gptq(**GRID, samples=8),
        LearnedRounding(**GRID, samples=8, steps=4, batch_size=2),
    ],
    ids=["quantize", "gptq", "learned_rounding"],
)
def test_zeros_outlive_rounding(behind: Any) -> None:
    candidate, model, context = opened(llama())
    found = Sparsify(samples=8).apply(candidate, model, context)
    zeros = {d.parameter: found.values(d.parameter) == 0 for d in behind.resolve(model) if d.layer.stack is not None}
    found = behind.apply(found, model, context)
    assert zeros
    for name, gone in zeros.items():
        assert float(gone.float().mean()) == pytest.approx(0.5, abs=0.01)
        assert bool((found.quantized[name].dequantize()[gone] == 0).all()), name


def test_orders_that_make_no_sense_are_refused() -> None:
    def recipe(*names: str) -> Recipe:
        return Recipe(steps=tuple(Step(technique=name, settings={}) for name in names))

    with pytest.raises(RecipeError, match="gptq stands before sparsify, but must come after it"):
        resolve(recipe("gptq", "sparsify"))
    with pytest.raises(RecipeError, match="sparsify stands before rotate, but must come after it"):
        resolve(recipe("sparsify", "rotate"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsify: sparsity = 1.0"),
        ({"sparsity": 0.0}, "sparsify: sparsity = 0.0"),
        ({"pattern": "4:2"}, "is not n:m"),
        ({"by": "chance"}, "sparsify: by = 'chance'"),
    ],
)
def test_wrong_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match="sparsify") as found:
        build(Step(technique="sparsify", settings=settings))
    assert message in found.value.message


def test_a_pattern_that_no_layer_can_have_is_refused_beforehand() -> None:
    _, model, _ = opened(llama())
    with pytest.raises(GossamerError, match="does not divide in_features"):
        Sparsify(pattern="2:7").resolve(model)


def test_a_small_share_of_a_small_layer_is_no_error() -> None:
    candidate, model, context = opened(llama())
    found = Sparsify(sparsity=1e-6, by="magnitude", samples=8).apply(candidate, model, context)
    assert torch.isfinite(found.values(Sparsify().resolve(model)[0].parameter)).all()
