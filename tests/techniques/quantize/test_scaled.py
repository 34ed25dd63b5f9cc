"""`awq` and `smooth` on tiny models: nearer to the original, exact where they only scale, remembered through a kill."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.errors import RecipeError
from gossamer.recipe import Recipe, Step
from gossamer.run.workspace import Run
from gossamer.techniques.base import Technique
from gossamer.techniques.block import Block
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.quantize.scaled import Awq, Smooth
from gossamer.techniques.registry import resolve

tiny = runpy.run_path(str(Path(__file__).parent / "test_calibrated.py"))
GRID, llama, bert, opened, distance, logits = (
    tiny[name] for name in ("GRID", "llama", "bert", "opened", "distance", "logits")
)
FEW: dict[str, Any] = {**GRID, "samples": 8, "exponents": 8}


def loud(build: Any = llama) -> nn.Module:
    """Return a model whose norms write a few channels far larger than the others."""
    network: nn.Module = build()
    with torch.no_grad():
        for name, values in network.named_parameters():
            if "layernorm.weight" in name.lower():
                values[::7] *= 12
    return network


def test_scaling_and_clipping_each_bring_the_model_nearer() -> None:
    plain = distance(Quantize(**GRID), loud())
    scaled = distance(Awq(**FEW, clip="weights"), loud())
    both = distance(Awq(**FEW), loud())
    assert scaled < 0.9 * plain
    assert both < scaled


@pytest.mark.parametrize("step", [Awq(**FEW), Awq(**FEW, round="gptq")], ids=["nearest", "gptq"])
def test_a_model_with_norms_behind_the_sums_is_rounded_too(step: Awq) -> None:
    assert distance(step, bert()) < distance(Quantize(**GRID), bert())


def test_without_scaling_gptq_behind_it_is_gptq() -> None:
    candidate, model, context = opened(loud())
    found = Awq(**GRID, samples=8, round="gptq", exponents=0).apply(candidate, model, context)
    candidate, model, context = opened(loud())
    wanted = Gptq(**GRID, samples=8, refit=False, passes=0).apply(candidate, model, context)
    assert found.quantized.keys() == wanted.quantized.keys()
    assert all(torch.equal(found.quantized[name].codes, wanted.quantized[name].codes) for name in found.quantized)


def test_the_norms_of_an_awq_model_are_divided_and_no_one_else_s_weights_change() -> None:
    candidate, model, context = opened(loud())
    before = {name: values.clone() for name, values in candidate.module.named_parameters()}
    found = Awq(**FEW).apply(candidate, model, context)
    changed = {name for name, values in found.module.named_parameters() if not torch.equal(values, before[name])}
    assert "model.layers.0.input_layernorm.weight" in changed
    assert {name for name in changed if "norm" not in name} == set(found.quantized)
    assert "model.norm.weight" not in changed


def test_smoothing_alone_changes_nothing_that_the_model_computes() -> None:
    network = loud()
    candidate, model, context = opened(network)
    before = {name: values.clone() for name, values in candidate.module.named_parameters()}
    found = Smooth(alpha=0.5, samples=8).apply(candidate, model, context)
    assert not found.quantized
    changed = {name for name, values in found.module.named_parameters() if not torch.equal(values, before[name])}
    assert len([name for name in changed if "norm" in name]) == 4
    ids = {"input_ids": torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(2))}
    with torch.no_grad():
        torch.testing.assert_close(logits(found.module, ids), logits(network, ids), rtol=1e-4, atol=1e-4)


def rounded_distance(first: Technique | None) -> float:
    network = loud()
    candidate, model, context = opened(network)
    for step in (first, Quantize(activations="dynamic", ignore=("head",))):
        if step is not None:
            candidate = step.apply(candidate, model, context)
    draw = torch.Generator().manual_seed(1)
    samples = [{"input_ids": torch.randint(1, 64, (1, 16), generator=draw)} for _ in range(32)]
    with torch.no_grad(), candidate.simulated() as module:
        return sum(float((logits(module, x) - logits(network, x)).square().sum()) for x in samples)


def test_8_bit_inputs_gain_from_smoothing() -> None:
    assert rounded_distance(Smooth(samples=8)) < 0.7 * rounded_distance(None)


def test_a_shared_parameter_is_not_scaled() -> None:
    network = loud()
    first, second = network.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    candidate, model, context = opened(network)
    before = first.input_layernorm.weight.detach().clone()
    found = Smooth(alpha=0.5, samples=8).apply(candidate, model, context).module
    assert torch.equal(found.model.layers[0].input_layernorm.weight, before)
    assert not torch.equal(found.model.layers[0].post_attention_layernorm.weight, before)


def test_an_interrupted_run_ends_with_the_same_norms_and_codes(tmp_path: Path) -> None:
    class Stopping(Awq):
        def solve(self, block: Block) -> None:
            if block.name == "model.layers.1":
                raise KeyboardInterrupt
            super().solve(block)

    def applied(step: Technique, run: Run | None) -> Any:
        candidate, model, context = opened(loud())
        return step.apply(candidate, model, replace(context, run=run, identity={"of": "test"}))

    with Run(tmp_path / "run", {"verb": "test"}) as run, pytest.raises(KeyboardInterrupt):
        applied(Stopping(**FEW), run)
    solved: list[str] = []

    class Noting(Awq):
        def solve(self, block: Block) -> None:
            solved.append(block.name)
            super().solve(block)

    with Run(tmp_path / "run", {"verb": "test"}) as run:
        resumed = applied(Noting(**FEW), run)
    assert solved[0] == "model.layers.1"
    with Run(tmp_path / "run", {"verb": "test"}) as run:
        remembered = applied(Stopping(**FEW), run)
    straight = applied(Awq(**FEW), None)
    for found in (resumed, remembered):
        ours, theirs = dict(found.module.named_parameters()), dict(straight.module.named_parameters())
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert found.quantized.keys() == straight.quantized.keys()


def test_a_block_that_comes_out_worse_gets_its_norms_back() -> None:
    class Spoiling(Awq):
        def solve(self, block: Block) -> None:
            super().solve(block)
            for parameter, values in list(block.weights.items()):
                if "norm" in parameter:
                    block.set_weight(parameter, values * 3)

    network = loud()
    candidate, model, context = opened(network)
    found = Spoiling(**FEW, ignore=("head",)).apply(candidate, model, context)
    candidate, model, context = opened(network)
    plain = Quantize(**GRID, ignore=("head",)).apply(candidate, model, context)
    for name, values in plain.module.named_parameters():
        assert torch.equal(found.module.get_parameter(name), values), name


def test_smoothing_stands_before_what_rounds() -> None:
    steps = (Step(technique="smooth", settings={}), Step(technique="quantize", settings={"activations": "dynamic"}))
    assert [step.name for step in resolve(Recipe(steps=steps))] == ["smooth", "quantize"]
    with pytest.raises(RecipeError, match="must come after"):
        resolve(Recipe(steps=steps[::-1]))


def test_smoothing_needs_linear_layers_inside_blocks() -> None:
    _, model, _ = opened(llama())
    with pytest.raises(RecipeError, match="smooth matches no linear layer inside a block"):
        Smooth(targets=("head",)).resolve(model)
