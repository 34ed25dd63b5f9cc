"""`gates` on tiny models: so many units stay as were asked for, training was worth it, and a killed run goes on."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import Member
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.recipe import Recipe, Step
from gossamer.run.workspace import Run
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context
from gossamer.techniques.prune.gates import Gates
from gossamer.techniques.prune.gating import (
    OPEN,
    ClosingGates,
    Gate,
    Gated,
    at_rest,
    closed_to,
    drawn,
    openness,
)
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.registry import build, resolve

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
llama, rows, Told = TINY["llama"], TINY["rows_to_learn"], TINY["Told"]
SHORT: dict[str, Any] = {"epochs": 4, "batch_size": 8, "rate": 1e-3, "precision": "fp32", "labels": 0}


def gates(**settings: Any) -> tuple[str, dict[str, Any]]:
    return "gates", {**SHORT, **settings}


def made(*entries: tuple[str, dict[str, Any]], **more: Any) -> Candidate:
    found = TINY["made"](llama(), list(entries), **more)
    assert isinstance(found, Candidate)
    return found


def distance(candidate: Candidate) -> float:
    return float(TINY["distance_from"](llama(), candidate))


def at_once(what: str, to: str) -> tuple[str, dict[str, Any]]:
    return "prune", {"what": what, "to": to, "by": "magnitude", "refit": False}


def test_gates_are_shut_as_often_as_openness_says() -> None:
    """A second opinion: the share of many draws that is not zero."""
    positions = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    uniform = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    values = drawn(positions.expand(len(uniform), -1), uniform.expand(-1, 5))
    assert (float(values.min()), float(values.max())) == (0, 1)
    torch.testing.assert_close((values > 0).float().mean(0), openness(positions), atol=0.01, rtol=0)
    assert at_rest(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gates_gradient_is_that_of_its_value(axis: int) -> None:
    """A second opinion by autograd: the loss as a function of the values themselves."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8, generator=draw))
    gate, other = Gate(2, 1), Gate(2, 1)
    gated = Gated([(gate, Member("w", axis, unit=2)), (other, Member("w", axis, unit=2, offset=4))])
    gate.value.copy_(torch.tensor([0.3, 1.0]))
    other.value.copy_(torch.tensor([0.0, 0.7]))
    inputs = torch.randn(8, generator=draw)
    loss: Callable[[Tensor], Tensor] = lambda w: ((w if axis else w.t()) @ inputs).square().sum()  # noqa: E731
    values = torch.cat([gate.value, other.value]).requires_grad_()
    columns = values.repeat_interleave(2)
    wanted = torch.autograd.grad(loss(weight.detach() * (columns if axis else columns[:, None])), values)[0]
    loss(gated(weight)).backward()
    assert weight.grad is not None
    torch.testing.assert_close(torch.cat([gradient for _, gradient in gated.felt(weight)]), wanted)
    closing = ClosingGates([(weight, gated)], [gate, other], rest=0.5, seed=0)
    before = weight.grad.clone()
    closing.before_update()
    torch.testing.assert_close(weight.grad, before * gated.along(weight))
    assert float(weight.grad.movedim(axis, 0)[4:6].abs().max()) == 0  # what is shut does not learn


def test_what_is_worth_most_stays_open_and_the_share_is_held_on_the_way() -> None:
    gate = Gate(40, 10)
    worth = torch.linspace(0, 0.02, 40)
    draw = torch.Generator().manual_seed(0)
    for step in range(400):
        share = 1 - min(1.0, step / 200) * 0.75
        gate.draw(share, draw)
        assert float(openness(gate.position).mean()) == pytest.approx(min(OPEN, share), abs=1e-3)
        gate.learn(-worth)  # a loss that falls as gates open
    assert float(((gate.value > 0.5) | (gate.value == 0)).float().mean()) > 0.85  # they have made up their minds
    gate.settle(gate.score)
    kept = gate.value.nonzero().flatten().tolist()
    assert len(kept) == 10
    assert sum(kept) / 10 > 32  # 34.5 are the best ten; all draws that stand at an end tell nothing


@pytest.mark.parametrize("share", [0.02, 0.5, OPEN])
@pytest.mark.parametrize("scores", [[0.0] * 7, [-50.0, 0.0, 1.0, 2.0, 3.0, 80.0, 9.0]], ids=str)
def test_places_are_closed_to_any_share(share: float, scores: list[float]) -> None:
    score = torch.tensor(scores)
    position = closed_to(score, share)
    assert float(openness(position).mean()) == pytest.approx(share, abs=1e-4)
    torch.testing.assert_close(position - position[0], score - score[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"ffn": "50%"}, {"intermediate_size": 32, "num_key_value_heads": 2}),
        pytest.param({"heads": "50%"}, {"num_attention_heads": 2, "num_key_value_heads": 1}, marks=pytest.mark.slow),
        ({"ffn": 25, "multiple": 8}, {"intermediate_size": 32}),
        ({"ffn": "50%", "heads": "50%"}, {"intermediate_size": 32, "num_attention_heads": 2}),
    ],
    ids=str,
)
def test_so_many_stay_and_training_was_better_than_none(settings: dict[str, Any], left: dict[str, int]) -> None:
    found = made(gates(**settings))
    assert {name: getattr(found.module.config, name) for name in left} == left
    cut = made(*(at_once(kind, "50%") for kind in ("ffn", "heads") if kind in settings))
    assert [p.shape for p in found.module.parameters()] == [p.shape for p in cut.module.parameters()]
    assert distance(found) < distance(cut)


def test_units_that_do_nothing_go_however_large_their_weights_are() -> None:
    network = llama()
    with torch.no_grad():
        for block in network.model.layers:
            block.mlp.up_proj.weight[::2] = 0  # these channels are always zero
            block.mlp.down_proj.weight[:, ::2] *= 3  # and read as if they were worth most
    found = TINY["made"](network, [gates(ffn="50%")])
    idle = [int((block.mlp.up_proj.weight == 0).all(1).sum()) for block in found.module.model.layers]
    assert [block.mlp.up_proj.weight.shape[0] for block in found.module.model.layers] == [32, 32]
    assert max(idle) <= 4  # all 32 by magnitude


def test_channels_of_convolutions_go_too() -> None:
    torch.manual_seed(0)
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", image_size=32, num_labels=3
    )
    network, task = hf.ResNetForImageClassification(config).eval(), get_task("image-classification")
    draw = np.random.default_rng(0)
    pictures = [{"pixel_values": draw.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(80)]
    batches = [Batch(inputs, np.array([index])) for index, inputs in enumerate(pictures)]
    source = Source.open(network, forward=lambda module, inputs: module(**inputs).logits)
    module = source.module(task)
    model = map_model(module, {"pixel_values": torch.from_numpy(pictures[0]["pixel_values"])}, source.forward)
    context = Context(
        task=task, example=pictures[0], calibration=batches[:16], progress=Told(), training=lambda: batches
    )
    step = Gates.model_validate({"channels": "50%", **SHORT, "epochs": 1})
    found = step.apply(Candidate(source=source, module=module), model, context)  # which checks what it computes
    assert sum(values.numel() for values in found.module.parameters()) == step.after(model).num_parameters
    assert step.after(model).num_parameters < 0.3 * model.num_parameters


def test_three_losses_are_said_and_only_what_lost_its_units_is_judged() -> None:
    told = Told()
    made(gates(ffn="50%", heads="50%"), progress=told)
    whole, once, after = (
        float(told.said[-1].split(word)[0].split()[-1]) for word in (" with all", " without the", " after")
    )
    assert whole < after < once
    assert whole < 1e-6  # the start is the original
    assert f"after {4 * 18} steps" in told.said[-1]


def test_places_may_be_cut_to_sizes_of_their_own() -> None:
    sizes = {"model.layers.0.*": 16, "model.layers.1.*": "75%"}
    found = made(gates(ffn=sizes))
    weights = dict(found.module.named_parameters())
    assert [weights[f"model.layers.{block}.mlp.down_proj.weight"].shape[1] for block in (0, 1)] == [16, 48]
    assert Gates.model_validate({"ffn": sizes}).entry() == {"gates": {"ffn": sizes}}


def test_what_is_not_better_is_the_start_without_its_smallest_units() -> None:
    told = Told()
    found = made(gates(ffn="50%", rate=0.09, epochs=1), progress=told)
    assert "the smallest units of the start are gone" in told.said[-1]
    cut = made(at_once("ffn", "50%"))
    for (name, ours), theirs in zip(found.module.named_parameters(), cut.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize(
    "step", [pytest.param(20, id="while gates close"), pytest.param(60, id="behind", marks=pytest.mark.slow)]
)
def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def run_in(folder: Path) -> dict[str, Tensor]:
        with Run(folder, {}) as run:
            return dict(made(gates(ffn="50%", heads="50%"), run=run).module.state_dict())

    whole = run_in(tmp_path / "whole")
    TINY["stop_at_step"](monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut")
    monkeypatch.undo()
    taken = TINY["steps_taken"](monkeypatch)
    again = run_in(tmp_path / "cut")
    assert taken[0] > 10  # the steps before the last checkpoint are not repeated
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_goal_is_not_carried_out_before_its_sizes_are_found() -> None:
    step = Gates.model_validate({"latency": "50%", "epochs": 2.0})
    assert step.label() == "gates until latency 50%"
    candidate, model, context = TINY["opened"](llama())
    for use in (lambda: step.resolve(model), lambda: step.apply(candidate, model, context)):
        with pytest.raises(RecipeError, match="the sizes of `gates until latency 50%` are found out by measuring"):
            use()
    cuts = [Prune.model_validate({"what": "heads", "to": 1}), Prune.model_validate({"what": "ffn", "to": {"a": 40}})]
    (found,) = step.with_sizes(cuts)
    assert found == Gates.model_validate({"heads": 1, "ffn": {"a": 40}, "epochs": 2.0})


@pytest.mark.parametrize("order", [("distill", "gates"), ("gates", "prune"), ("gptq", "gates"), ("lora", "gates")])
def test_orders_that_make_no_sense_are_refused(order: tuple[str, str]) -> None:
    settings: dict[str, Any] = {"prune": {"what": "ffn", "to": "50%"}, "gates": {"ffn": "50%"}}
    with pytest.raises(RecipeError, match=f"{order[0]} stands before {order[1]}, but must come after it"):
        resolve(Recipe(steps=tuple(Step(technique=name, settings=settings.get(name, {})) for name in order)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "say what stays (heads, ffn, channels), or one goal"),
        ({"latency": "50%", "ffn": "50%"}, "or one goal: latency or params"),
        ({"latency": "50%", "params": "50%"}, "or one goal: latency or params"),
        ({"latency": "150%"}, "'150%' is no share between 0% and 100%"),
        ({"ffn": "half"}, "'half' is neither a share like 50% nor a number"),
        ({"ffn": "50%", "rest": 1.0}, "gates: rest = 1.0"),
    ],
)
def test_wrong_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as found:
        build(Step(technique="gates", settings=settings))
    assert message in found.value.message


def test_what_cannot_be_cut_or_trained_is_said() -> None:
    with pytest.raises(RecipeError, match="64 of 64 would stay"):
        made(gates(ffn="100%"))
    with pytest.raises(RecipeError, match="no channels of this model can be cut"):
        made(gates(channels="50%"))
    candidate, model, context = TINY["opened"](llama())
    with pytest.raises(TechniqueError, match="64 rows to learn from, 0 are left"):
        Gates.model_validate({"ffn": "50%", **SHORT}).apply(candidate, model, context)
