"""The technique `gguf`: formats by layer, what stands in for them, importance that pays, what the planner offers."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.gguf_blocks import FORMATS, decode
from gossamer.models.quantized import QuantSpec
from gossamer.plan.candidates import recipes, rounds_twice
from gossamer.plan.proof import refused_by
from gossamer.recipe import Recipe, Step
from gossamer.run.workspace import Run
from gossamer.runtimes import get_runtime
from gossamer.techniques.base import SearchSpace
from gossamer.techniques.quantize import gguf
from gossamer.techniques.quantize.gguf import GgufBlocks
from gossamer.techniques.quantize.gguf_solve import solve
from gossamer.techniques.registry import resolve

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
TASK, opened, distance_from = TINY["TASK"], TINY["opened"], TINY["distance_from"]
DOWN = "model.layers.0.mlp.down_proj.weight"


def llama(intermediate_size: int = 96) -> nn.Module:
    """A tiny language model whose channels are not excited alike, as those of trained ones are not."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=intermediate_size, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.rand(256) ** 4 * 8)
            elif parameter.ndim > 1:
                parameter.mul_(2)
    return network


def specs(step: GgufBlocks, network: nn.Module) -> dict[str, str]:
    return {decision.parameter: decision.weight.format for decision in step.resolve(opened(network)[1])}


def test_formats_are_chosen_by_layer_and_stand_in_for_each_other() -> None:
    found = specs(GgufBlocks(format="q4_k", format_of=[["q6_k", ["v", "down"]], ["q8_0", ["model.layers.1"]]]), llama())
    assert found.pop(DOWN) == "q8_0"  # rows of 96: q8_0 for q6_k
    assert found.pop("model.layers.0.self_attn.v_proj.weight") == "q6_k"
    assert {found.pop(name) for name in list(found) if ".1." in name} == {"q8_0"}
    assert set(found.values()) == {"q4_k"}
    assert len(found) == 5
    assert specs(GgufBlocks(format="q4_k"), llama())[DOWN] == "q5_0"
    assert specs(GgufBlocks(format="q5_k"), llama())[DOWN] == "q5_1"


def test_memory_holds_what_the_bytes_say() -> None:
    candidate, model, context = opened(llama())
    original = {name: values.clone() for name, values in candidate.module.named_parameters()}
    step = GgufBlocks(format="q4_k")
    decisions = {decision.parameter: decision for decision in step.resolve(model)}
    candidate = step.apply(candidate, model, context)
    assert candidate.quantized.keys() == decisions.keys()
    for name, codes in candidate.quantized.items():
        form = codes.spec.block_format
        assert form is not None
        assert codes.spec == decisions[name].weight == QuantSpec.of_block(form)
        assert codes.codes.shape == (len(original[name]), form.row_bytes(original[name].shape[1]))
        values = candidate.module.get_parameter(name).detach()
        assert torch.equal(values, decode(codes.codes, form))
        assert 0 < (values - original[name]).norm() < 0.15 * original[name].norm()


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q5_k"])
def test_importance_brings_the_model_nearer(name: str) -> None:
    network = llama(256)
    with_rows, without = (
        step.apply(*opened(network)) for step in (GgufBlocks(format=name), GgufBlocks(format=name, importance=False))
    )
    assert distance_from(network, with_rows) < 0.9 * distance_from(network, without)


def test_without_importance_no_rows_are_needed() -> None:
    network = llama()
    step = GgufBlocks(format="q8_0", importance=False, targets=("linear", "embedding"))
    candidate = step.apply(*opened(network, rows=1))
    table = candidate.quantized["model.embed_tokens.weight"]
    weight = network.get_parameter("model.embed_tokens.weight").detach()
    assert torch.equal(table.codes, solve(weight, FORMATS["Q8_0"]))
    assert (step.rows_needed(), GgufBlocks().rows_needed()) == (0, 8)
    with pytest.raises(TechniqueError, match="needs 8 calibration samples, 3 were given"):
        GgufBlocks().apply(*opened(network, rows=3))


def test_what_no_block_holds_is_refused() -> None:
    with pytest.raises(TechniqueError, match=r"hold 32 neighbouring weights .*\.down_proj has rows of 80") as found:
        GgufBlocks().resolve(opened(llama(80))[1])
    assert "ignore" in found.value.hint
    assert DOWN not in specs(GgufBlocks(ignore=("down",)), llama(80))
    steps = (Step(technique="gguf", settings={}), Step(technique="tune_scales", settings={}))
    with pytest.raises(RecipeError, match="cannot be combined"):
        resolve(Recipe(steps=steps))
    candidate, model, context = opened(llama())
    candidate = GgufBlocks(importance=False).apply(candidate, model, context)
    with pytest.raises(TechniqueError, match="rounded by an earlier step"):
        GgufBlocks().apply(candidate, model, context)


def test_a_killed_run_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = llama()
    whole = GgufBlocks().apply(*opened(network)).quantized

    class Killed(Exception):
        pass

    calls: list[str] = []

    def dies(*arguments: Any) -> Any:
        calls.append("")
        if len(calls) > 18:
            raise Killed
        return solve(*arguments)

    monkeypatch.setattr(gguf, "solve", dies)
    with pytest.raises(Killed), Run(tmp_path / "run", {}) as run:
        GgufBlocks().apply(*opened(network, run=run))
    first = len(calls)
    calls.clear()
    monkeypatch.setattr(gguf, "solve", lambda *arguments: (calls.append(""), solve(*arguments))[1])
    with Run(tmp_path / "run", {}) as run:
        found = GgufBlocks().apply(*opened(network, run=run)).quantized
    assert first == 19
    assert len(calls) == 14  # of the second block only, with what it is compared with
    assert found.keys() == whole.keys()
    for name, codes in whole.items():
        assert torch.equal(found[name].codes, codes.codes)


def offered(model: Any, rows: int) -> list[Any]:
    found = recipes(SearchSpace(model, get_runtime("gguf"), TASK, rows))
    return [run for run in found if isinstance(run[0], GgufBlocks)]


def test_the_planner_offers_formats_where_there_are_blocks() -> None:
    model = opened(llama())[1]
    steps = offered(model, 64)
    names = {run[0].label() for run in steps}
    assert {"gguf q4_0", "gguf q4_k", "gguf q4_k/q6_k", "gguf q5_k", "gguf q6_k", "gguf q8_0"} <= names
    assert any(len(run) == 2 and run[1].label() == "gguf q6_k embeddings" for run in steps)
    assert all(run[0].importance for run in steps)
    for run in steps:
        assert not rounds_twice(run, model)
        assert refused_by(get_runtime("gguf"), model, run) is None
    assert "use --runtime gguf" in str(refused_by(get_runtime("torch"), model, steps[0]))
    assert not [run for run in recipes(SearchSpace(model, get_runtime("torch"), TASK, 64)) if "gguf" in run[0].name]
    few = offered(model, 8)
    assert few
    assert not any(run[0].importance for run in few)


def test_equal_formats_are_offered_once() -> None:
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    model = opened(network)[1]
    steps = [run for run in GgufBlocks.candidates(SearchSpace(model, get_runtime("gguf"), TASK, 64)) if len(run) == 1]
    grids = [tuple(str(decision.weight) for decision in run[0].resolve(model)) for run in steps]
    assert len(set(grids)) == len(grids)
