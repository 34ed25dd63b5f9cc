"""Whole experts go: what is left is the class's own model with fewer of them, weight for weight."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gossamer.errors import GossamerError, RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.reduced_map import reduced_map
from gossamer.models.reduction import reduced
from gossamer.models.roles import Cut, Dimension, ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.plan.proof import refused_by
from gossamer.recipe import Step
from gossamer.runtimes import get_runtime
from gossamer.tasks import get_task
from gossamer.techniques.base import SearchSpace
from gossamer.techniques.prune.experts import expert_scores
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.registry import build

TINY = runpy.run_path(str(Path(__file__).parents[2] / "models" / "tiny_experts.py"))
OTHERS = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
FAMILIES: list[Callable[..., PreTrainedModel]] = TINY["FAMILIES"]
TASK = get_task("causal-lm")


def opened(family: Callable[..., PreTrainedModel], folder: Path) -> tuple[Candidate, ModelMap]:
    family().save_pretrained(folder)
    source = Source.open(folder)
    module = source.module(TASK)
    return Candidate(source, module), map_model(module, {"input_ids": TINY["ids"]()}, source.forward)


def experts_of(model: ModelMap) -> list[Dimension]:
    return [one for one in model.dimensions if one.kind == "experts"]


def logits(candidate: Candidate, module: torch.nn.Module | None = None) -> torch.Tensor:
    with torch.no_grad():
        found = candidate.source.forward(module or candidate.module, {"input_ids": TINY["ids"]()}, TASK.output)
    assert isinstance(found, torch.Tensor)
    return found


def by_hand(family: Callable[..., PreTrainedModel], attribute: str, kept: dict[str, list[int]]) -> PreTrainedModel:
    """Return the class's own model with the rows of stacked parameters that stay."""
    model = family()
    count = getattr(model.config, attribute)
    smaller = type(model)(type(model.config)(**{**model.config.to_dict(), attribute: len(next(iter(kept.values())))}))
    values = {}
    for name, value in model.state_dict().items():
        rows = next((rows for place, rows in kept.items() if name.startswith(place)), None)
        values[name] = value[rows] if rows is not None and len(value) == count and ".mlp." in name else value
    smaller.load_state_dict(values)
    return smaller.eval()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_what_is_left_is_the_smaller_model_of_its_class(family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    candidate, model = opened(family, tmp_path / "source")
    ones = experts_of(model)
    assert [one.name for one in ones] == [one.name for one in model.experts]
    count = ones[0].size
    (attribute,) = ones[0].attributes or ()
    assert ones[0].sizes == tuple(range(2, count)), "a router picks two of them"
    kept = {one: [number + 1, count - 1] for number, one in enumerate(ones)}
    smaller = reduced(candidate, kept)
    assert smaller.stock
    places = {one.name.rpartition(".")[0] + ".": units for one, units in kept.items()}
    expected = by_hand(family, attribute, places)
    with torch.no_grad():
        torch.testing.assert_close(logits(smaller), expected(TINY["ids"]()).logits, rtol=1e-4, atol=1e-4)
    predicted = reduced_map(model, dict.fromkeys(ones, 2))
    again = map_model(smaller.module, {"input_ids": TINY["ids"]()}, candidate.source.forward)
    assert predicted.num_parameters == again.num_parameters == sum(v.numel() for v in expected.parameters())
    assert {layer.name: layer.shape for layer in predicted.layers} == {one.name: one.shape for one in again.layers}
    assert predicted.experts == again.experts
    assert [(one.kind, one.name, one.size) for one in predicted.dimensions if one.kind != "experts"] == [
        (one.kind, one.name, one.size) for one in again.dimensions if one.kind != "experts"
    ]
    assert get_runtime("torch").cut_refusal(Cut(ones[0], 2)) is None
    assert "2" in str(get_runtime("torch").cut_refusal(Cut(ones[0], 1)))


def test_scores_are_what_experts_add_to_their_tokens(tmp_path: Path) -> None:
    candidate, model = opened(TINY["mixtral"], tmp_path)
    ones, seen = experts_of(model), []
    experts = candidate.module.get_submodule(ones[0].name)
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    found = expert_scores(candidate.module, ones[:1], lambda: iter([logits(candidate)]))
    hook.remove()
    hidden, chosen, weights = seen[0]
    for expert in range(ones[0].size):
        tokens, places = torch.where(chosen == expert)
        gate, up, down = (experts.get_submodule(f"{expert}.{name}") for name in ("w1", "w3", "w2"))
        with torch.no_grad():
            out = down(torch.nn.functional.silu(gate(hidden[tokens])) * up(hidden[tokens]))
            expected = (weights[tokens, places] * out.norm(dim=-1)).sum() / max(1, len(tokens))
        assert float(found[ones[0]][expert]) == pytest.approx(float(expected), rel=1e-4)


def test_the_step_keeps_those_that_add_most_and_stock_transformers_opens_it(tmp_path: Path) -> None:
    candidate, model = opened(TINY["olmoe"], tmp_path / "source")
    for one in experts_of(model):  # the first says nothing
        for name in ("gate_proj", "up_proj", "down_proj"):
            with torch.no_grad():
                candidate.module.get_parameter(f"{one.name}.0.{name}.weight").zero_()
    step = build(Step(technique="prune", settings={"what": "experts", "remove": 1}))
    smaller = step.apply(candidate, model, OTHERS["opened"](OTHERS["llama"]())[2])
    assert smaller.module.config.num_experts == 3  # type: ignore[union-attr]
    torch.testing.assert_close(
        smaller.module.get_parameter("model.layers.0.mlp.experts.0.gate_proj.weight"),
        candidate.module.get_parameter("model.layers.0.mlp.experts.1.gate_proj.weight"),
    )
    assert smaller.applied == [step.entry()]


def test_a_model_read_piece_by_piece_loses_the_same_and_is_read_once(tmp_path: Path) -> None:
    whole, model = opened(TINY["olmoe"], tmp_path)
    context = OTHERS["opened"](OTHERS["llama"]())[2]
    step = build(Step(technique="prune", settings={"what": "experts", "to": "50%"}))
    read: list[str] = []

    def noted(name: str) -> torch.Tensor:
        read.append(name)
        return whole.source.read(name)

    streamed = Candidate.streamed(whole.source, whole.source.skeleton(TASK), noted, 0)
    pieces = step.apply(streamed, model, context)
    router = "model.layers.1.mlp.gate.weight"
    assert read.count("model.layers.1.mlp.experts.0.gate_proj.weight") <= 2, "not once for each sample"
    torch.testing.assert_close(pieces.values(router), step.apply(whole, model, context).values(router))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"what": "experts", "to": 1}, "1 of 4 would stay"),
        ({"what": "experts", "to": "50%", "by": "obs"}, "chosen by activation, not by obs"),
        ({"what": "experts", "remove": [0]}, "only blocks can be named"),
    ],
)
def test_what_cannot_be_is_told(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, model = opened(TINY["mixtral"], tmp_path)
    with pytest.raises(GossamerError, match=said):
        build(Step(technique="prune", settings=settings)).resolve(model)


def test_a_model_without_experts_has_none_to_cut() -> None:
    _, model, _ = OTHERS["opened"](OTHERS["llama"]())
    with pytest.raises(RecipeError, match="no experts of this model can be cut"):
        build(Step(technique="prune", settings={"what": "experts", "to": "50%"})).resolve(model)


def test_blocks_with_other_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    candidate, model = opened(TINY["mixtral"], tmp_path)
    first, second = experts_of(model)
    with pytest.raises(TechniqueError, match="one number of experts for all blocks"):
        reduced(candidate, {first: [0, 1], second: [0, 1, 2]})


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_experts_that_are_left_may_all_be_rounded(runtime: str, tmp_path: Path) -> None:
    _, model = opened(TINY["qwen2_moe"], tmp_path)
    steps = [
        build(Step(technique="prune", settings={"what": "experts", "to": "75%"})),
        build(Step(technique="quantize", settings={"bits": 8, "symmetric": True})),
    ]
    assert refused_by(get_runtime(runtime), model, steps) is None


@pytest.mark.parametrize(("wanted", "offered"), [("params", {"75%", "50%"}), ("latency", set()), ("size", set())])
def test_fewer_experts_are_offered_where_parameters_are_bounded(wanted: str, offered: set[str], tmp_path: Path) -> None:
    _, model = opened(TINY["mixtral"], tmp_path)  # four experts, two of which a token asks
    space = SearchSpace(model, get_runtime("torch"), TASK, 64, frozenset((wanted,)))
    cuts = [step for steps in Prune.candidates(space) for step in steps if isinstance(step, Prune)]
    assert {step.to for step in cuts if step.what == "experts"} == offered
