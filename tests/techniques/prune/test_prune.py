"""`prune` on tiny models: nearer to the original than blind cutting, what it refuses, and resumed to the same bytes."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from gossamer.errors import RecipeError, RuntimeUnavailable, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.structure import map_model
from gossamer.plan.candidates import recipes
from gossamer.recipe import Recipe, Step
from gossamer.run.workspace import Run
from gossamer.runtimes import get_runtime
from gossamer.tasks import get_task
from gossamer.techniques.base import SearchSpace, resolved
from gossamer.techniques.prune import masking
from gossamer.techniques.prune.blocks import skipped
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.prune.same import cut_out
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.registry import resolve

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32, "initializer_range": 0.2, "attn_implementation": "eager",
}  # fmt: skip
TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
TASK, logits, opened = TINY["TASK"], TINY["logits"], TINY["opened"]


def llama() -> nn.Module:
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).eval()
    with torch.no_grad():  # channels that do much and channels that do little, in no order of size
        for block in network.model.layers:
            block.mlp.up_proj.weight.mul_(torch.rand(64, 1).square() * 3)
            block.mlp.down_proj.weight.mul_(torch.rand(1, 64) + 0.5)
    return network


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def distance(step: Prune, network: nn.Module) -> float:
    """Return the squared distance of the logits to the original's, on other samples than the step was given."""
    candidate, model, context = opened(network)
    changed = step.apply(candidate, model, context).module
    draw = torch.Generator().manual_seed(1)
    samples = [{"input_ids": torch.randint(1, 64, (1, 16), generator=draw)} for _ in range(32)]
    with torch.no_grad():
        return sum(float((logits(changed, x) - logits(network, x)).square().sum()) for x in samples)


@pytest.mark.parametrize("network", [llama, bert], ids=lambda build: build.__name__)
@pytest.mark.parametrize("what", ["ffn", "heads"])
def test_what_stays_makes_up_for_what_goes(network: Any, what: Any) -> None:
    blind = distance(Prune(what=what, to="50%", by="magnitude", refit=False), network())
    assert distance(Prune(what=what, to="50%", by="magnitude"), network()) < blind
    assert distance(Prune(what=what, to="50%"), network()) < blind


@pytest.mark.parametrize("by", ["fisher", "activation"])
def test_scores_of_samples_choose_better_than_sizes_of_weights(by: Any) -> None:
    assert distance(Prune(what="ffn", to="50%", by=by, refit=False), llama()) < distance(
        Prune(what="ffn", to="50%", by="magnitude", refit=False), llama()
    )


@pytest.mark.parametrize("by", ["influence", "divergence"])
def test_the_block_that_does_nothing_goes_first(by: Any) -> None:
    network = llama()
    with torch.no_grad():
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            network.get_parameter(f"model.layers.2.{name}.weight").mul_(1e-4)
    candidate, model, context = opened(network)
    last = network.get_parameter("model.layers.3.mlp.up_proj.weight").detach().clone()
    smaller = Prune(what="layers", remove=1, by=by).apply(candidate, model, context)
    assert torch.equal(smaller.module.get_parameter("model.layers.2.mlp.up_proj.weight"), last)
    assert smaller.module.config.num_hidden_layers == 3  # type: ignore[union-attr]
    assert distance(Prune(what="layers", remove=1, by=by), network) < distance(
        Prune(what="layers", remove=(0,)), network
    )


def test_a_skipped_block_hands_on_what_it_is_given() -> None:
    block = nn.Linear(3, 3)
    given = torch.randn(2, 3)
    with skipped(block):
        assert torch.equal(block(given), given)
    assert not torch.equal(block(given), given)


@pytest.mark.parametrize("network", [llama, bert], ids=lambda build: build.__name__)
def test_blocks_that_are_named_go_from_the_map_of_what_was_cut_unevenly_too(network: Any) -> None:
    candidate, model, context = opened(network())
    sizes = {"0": 16, "1": 24, "3": 48}
    steps = [
        Prune.model_validate({"what": "ffn", "to": sizes}),
        Prune.model_validate({"what": "layers", "remove": [0, 2]}),
    ]
    after = resolved(model, steps)[1]
    for step in steps:
        candidate, model = step.apply(candidate, model, context), step.after(model)
    assert model == after
    shapes = {name: tuple(values.shape) for name, values in candidate.module.named_parameters()}
    assert {f"{one.name}.weight": one.shape for one in after.layers if not one.tied_to} == {
        name: shape for name, shape in shapes.items() if name.endswith(".weight")
    }
    assert after.num_parameters == sum(values.numel() for values in candidate.module.parameters())
    assert [one.size for one in after.dimensions if one.kind == "ffn"] == [24, 48]
    for one in after.dimensions:
        assert all(shapes[member.parameter][member.axis] >= one.size * member.unit for member in one.members)


def test_a_block_that_cannot_go_is_known_by_its_new_number() -> None:
    _, model, _ = opened(llama())
    dimensions = [replace(one, held=(2,)) if one.kind == "layers" else one for one in model.dimensions]
    after = Prune(what="layers", remove=(0,)).after(replace(model, dimensions=tuple(dimensions)))
    assert [one.held for one in after.dimensions if one.kind == "layers"] == [(1,)]
    with pytest.raises(RecipeError, match=r"block 1 of model\.layers holds what the others read"):
        Prune(what="layers", remove=(1,)).sizes(after)


def test_a_recipe_goes_on_with_the_smaller_model() -> None:
    candidate, model, context = opened(llama())
    steps = resolve(
        Recipe(
            steps=(
                Step(technique="prune", settings={"what": "layers", "remove": 2}),
                Step(technique="prune", settings={"what": "ffn", "to": 32}),
                Step(technique="prune", settings={"what": "heads", "to": "50%"}),
                Step(technique="gptq", settings={"bits": 8, "group_size": 16, "targets": ["down", "q"]}),
            )
        )
    )
    decisions, after = resolved(model, steps)
    for step in steps:
        candidate = step.apply(candidate, model, context)
        model = step.after(model)
    assert model == after
    assert [str(one.cut) for one in decisions if one.cut][:2] == ["4 to 2 layers", "64 to 32 ffn"]
    config = candidate.module.config
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 32)  # type: ignore[union-attr]
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)  # type: ignore[union-attr]
    assert {name: tuple(codes.codes.shape) for name, codes in candidate.quantized.items()} == {
        f"{one.layer.name}.weight": one.layer.shape for one in decisions if one.weight
    }
    assert candidate.applied == [step.entry() for step in steps]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": "ffn"}, "say either `to` .* or `remove`"),
        ({"what": "ffn", "to": "50%", "remove": 3}, "say either `to` .* or `remove`"),
        ({"what": "ffn", "to": "half"}, "'half' is neither a share"),
        ({"what": "ffn", "to": "50%", "by": "influence"}, "chosen by obs, fisher, taylor, .*, not by influence"),
        ({"what": "layers", "remove": 1, "by": "obs"}, "chosen by influence, divergence, taylor, not by obs"),
        ({"what": "heads", "remove": [0]}, "only blocks can be named"),
        ({"what": "ffn", "to": "nan%"}, "'nan%' is neither a share"),
        ({"what": "ffn", "to": float("nan")}, "nan is not a finite number"),
        ({"what": "ffn", "to": 10.5}, "10.5 is neither a share below 1 nor a whole number"),
        ({"what": "ffn", "to": "0%"}, "0 of 64 would stay"),
        ({"what": "ffn", "to": "100%"}, "64 of 64 would stay"),
        ({"what": "heads", "remove": 2}, "0 of 2 would stay"),
        ({"what": "layers", "remove": 4}, "0 of 4 would stay"),
        ({"what": "layers", "remove": [7]}, "has no block 7: it has 4, from 0"),
        ({"what": "ffn", "to": "50%", "targets": ["encoder"]}, "'encoder' matches none of 4 places"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_with_the_numbers(settings: dict[str, Any], message: str) -> None:
    _, model, _ = opened(llama())

    def asked() -> None:
        for step in resolve(Recipe(steps=(Step(technique="prune", settings=settings),))):
            step.resolve(model)

    with pytest.raises(RecipeError, match=message):
        asked()


def test_a_model_without_such_units_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = map_model(network, {"x": torch.ones(1, 4)}, lambda module, inputs: module(inputs["x"]))
    with pytest.raises(RecipeError, match="no heads of this model can be cut"):
        Prune(what="heads", remove=1).resolve(model)


def test_importance_that_is_not_finite_is_an_error() -> None:
    network = llama()
    candidate, model, context = opened(network)
    candidate.module.get_parameter("model.layers.1.mlp.down_proj.weight").detach()[0, 0] = torch.nan
    with pytest.raises(TechniqueError, match="NaN or infinite"):
        Prune(what="ffn", to="50%", by="magnitude", refit=False).apply(candidate, model, context)


def test_rounding_before_cutting_is_refused() -> None:
    with pytest.raises(RecipeError, match="gptq stands before prune, but must come after it"):
        resolve(
            Recipe(
                steps=(
                    Step(technique="gptq", settings={}),
                    Step(technique="prune", settings={"what": "ffn", "to": "50%"}),
                )
            )
        )
    candidate, model, context = opened(llama())
    rounded = Gptq(bits=8, group_size=16).apply(candidate, model, context)
    with pytest.raises(TechniqueError, match="rounded before this step"):
        Prune(what="ffn", to="50%").apply(rounded, model, context)


def test_a_killed_sweep_goes_on_and_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Prune(what="ffn", to="50%")
    candidate, model, context = opened(llama())
    wanted = step.apply(candidate, model, context).module.state_dict()
    solve = masking.Masking.solve
    solved: list[str] = []

    def dies(self: Any, block: Any) -> None:
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(block.name)
        solve(self, block)

    def run() -> Iterator[Run]:
        with Run(tmp_path / "run", {"model": "x"}) as run:
            yield run

    monkeypatch.setattr(masking.Masking, "solve", dies)
    for each in run():
        candidate, model, context = opened(llama(), run=each, identity={"model": "x"})
        with pytest.raises(KeyboardInterrupt):
            step.apply(candidate, model, context)
    monkeypatch.setattr(masking.Masking, "solve", lambda self, block: solved.append(block.name) or solve(self, block))
    for each in run():
        candidate, model, context = opened(llama(), run=each, identity={"model": "x"})
        found = step.apply(candidate, model, context).module.state_dict()
    assert len(solved) == len(set(solved)) == 4  # no block twice
    assert all(torch.equal(found[name], values) for name, values in wanted.items())


def test_units_in_another_order_than_was_thought_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, model, context = opened(llama())
    reduced = cut_out.__globals__["reduced"]

    def shuffled(candidate: Candidate, kept: Any) -> Candidate:
        smaller: Candidate = reduced(candidate, kept)
        weight = smaller.module.get_parameter("model.layers.0.mlp.up_proj.weight").detach()
        weight.copy_(weight.flip(0))
        return smaller

    monkeypatch.setitem(cut_out.__globals__, "reduced", shuffled)
    with pytest.raises(TechniqueError, match="in another order than was thought"):
        Prune(what="ffn", to="50%").apply(candidate, model, context)


def proposed(network: nn.Module, runtime: str, *wanted: str, rows: int = 64) -> list[list[tuple[str, Any]]]:
    _, model, _ = opened(network)
    space = SearchSpace(model, get_runtime(runtime), TASK, rows, frozenset(wanted))
    return [[(step.what, step.to) for step in steps if isinstance(step, Prune)] for steps in Prune.candidates(space)]


def test_the_planner_is_offered_cuts_where_less_work_is_asked_for() -> None:
    assert not proposed(llama(), "torch", "size", "quality")
    assert not proposed(llama(), "torch", "latency", rows=16)  # too few to choose by
    found = proposed(llama(), "torch", "latency", "size")
    assert [("heads", "50%")] in found
    assert [("heads", "50%"), ("ffn", "75%")] in found
    assert [("layers", "50%"), ("ffn", "25%")] in found
    assert [("heads", "67%")] not in found  # of two groups of heads that is one, as 50% is


def test_cuts_that_no_config_says_are_offered_to_runtimes_that_hold_a_graph() -> None:
    assert not any(kind == "heads" for steps in proposed(bert(), "torch", "latency") for kind, _ in steps)
    assert any(kind == "heads" for steps in proposed(bert(), "onnxruntime", "latency") for kind, _ in steps)


def test_cuts_go_before_rounding_and_only_where_groups_still_divide_rows() -> None:
    _, model, _ = opened(bert())
    space = SearchSpace(model, get_runtime("onnxruntime"), get_task("text-classification"), 64, frozenset(("latency",)))
    found = recipes(space)
    mixed = [steps for steps in found if {"prune", "gptq"} <= {step.name for step in steps}]
    assert mixed
    for steps in mixed:
        names = [step.name for step in steps]
        assert names.index("gptq") > max(index for index, name in enumerate(names) if name == "prune")
        for decision in resolved(model, steps)[0]:
            if decision.weight is not None and decision.weight.group_size:
                assert decision.layer.shape[1] % decision.weight.group_size == 0


def test_where_the_config_has_one_number_all_blocks_are_cut_or_none(tmp_path: Path) -> None:
    candidate, model, context = opened(llama())
    step = Prune(what="ffn", to="50%", targets=("model.layers.0",), by="magnitude", refit=False)
    (decision,) = step.resolve(model)
    assert decision.cut is not None
    refusal = get_runtime("torch").cut_refusal(decision.cut)
    assert refusal is not None
    assert "one number (intermediate_size)" in refusal
    assert get_runtime("gguf").cut_refusal(decision.cut) == refusal
    assert get_runtime("onnxruntime").cut_refusal(decision.cut) is None
    smaller = step.apply(candidate, model, context)  # in memory it is possible
    assert not smaller.stock
    with pytest.raises(RuntimeUnavailable, match="does not say the shapes"):
        get_runtime("torch").check_stock(smaller)
