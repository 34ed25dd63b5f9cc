"""`gradual` on tiny language models: all zeros are there, training was worth it, and a killed run goes on."""

from __future__ import annotations

import dataclasses
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.errors import GossamerError, RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.recipe import Recipe, Step
from gossamer.run.workspace import Run
from gossamer.techniques.prune.gradual import Gradual
from gossamer.techniques.prune.growing import GrowingMasks, Growth, Masked
from gossamer.techniques.registry import build, resolve
from gossamer.train import watch

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
llama, rows = TINY["llama"], TINY["rows_to_learn"]
SHORT: dict[str, Any] = {
    "sparsity": 0.7, "epochs": 4, "batch_size": 8, "rate": 1e-3, "precision": "fp32", "labels": 0,
}  # fmt: skip
ONE_SHOT: tuple[str, dict[str, Any]] = ("sparsify", {"sparsity": 0.7, "by": "magnitude"})


class Told:
    """Keep what a training says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.judged: list[int] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def record(self, series: str, step: int, values: dict[str, float]) -> None:
        self.judged += [step] if "eval_loss" in values else []

    def stage(self, label: str, total: float | None = None) -> Any:
        return nullcontext(lambda units: None)


def made(*entries: tuple[str, dict[str, Any]], **more: Any) -> Candidate:
    found = TINY["made"](llama(), list(entries), **more)
    assert isinstance(found, Candidate)
    return found


def gradual(**settings: Any) -> tuple[str, dict[str, Any]]:
    return "gradual", {**SHORT, **settings}


def distance(candidate: Candidate) -> float:
    return float(TINY["distance_from"](llama(), candidate))


def layers(candidate: Candidate) -> dict[str, Tensor]:
    """Return the weights of linear layers inside blocks."""
    return {n: w for n, w in candidate.module.named_parameters() if "layers" in n and w.ndim == 2}


@pytest.mark.parametrize(
    "settings",
    [{}, {"by": "movement"}, {"within": "model"}, {"by": "movement", "within": "model"}],
    ids=str,
)
def test_all_zeros_are_there_and_training_was_worth_it(settings: dict[str, Any]) -> None:
    found, at_once = made(gradual(**settings)), made(ONE_SHOT)
    weights = layers(found)
    shares = [float((weight == 0).float().mean()) for weight in weights.values()]
    if "within" in settings:
        gone, all_of_them = (sum(f(w) for w in weights.values()) for f in (lambda w: int((w == 0).sum()), Tensor.numel))
        assert gone == int(0.7 * all_of_them + 1e-6)
        assert max(shares) - min(shares) > 0.01
    else:
        assert shares == pytest.approx([0.7] * len(shares), abs=0.002)
    assert distance(found) < 0.8 * distance(at_once)
    plain = llama().state_dict()
    assert list(found.module.state_dict()) == list(plain)
    assert torch.equal(found.module.state_dict()["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_movement_takes_other_weights_than_magnitude() -> None:
    ours, others = (layers(made(gradual(by=by))) for by in ("movement", "magnitude"))
    differ = [float(((ours[name] == 0) != (others[name] == 0)).float().mean()) for name in ours]
    assert min(differ) > 0.05


def test_scores_are_the_sum_of_gradient_times_weight() -> None:
    """A second opinion by autograd: the gradient of the loss with respect to the mask itself, summed over steps."""
    weight = torch.nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]]))
    mask = Masked(weight.detach(), scored=True, transposed=False)
    masks = GrowingMasks([(weight, mask)], Growth(0.4, None, "movement", "layer", 0.0, 0.5))
    expected = torch.zeros(1, 3)
    for inputs in (torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.3, -2.0, 4.0])):
        gate = mask.stays.float().requires_grad_()
        ((weight.detach() * gate) @ inputs - 1.0).square().sum().backward()
        assert gate.grad is not None
        expected -= gate.grad
        weight.grad = None
        (mask(weight) @ inputs - 1.0).square().sum().backward()
        masks.before_update()
        assert mask.score is not None
        torch.testing.assert_close(mask.score, expected)
        mask.put(torch.tensor([[True, False, False]]))
    assert weight.grad is not None
    assert float(weight.grad[0, 0]) == 0  # what is masked does not learn


@pytest.mark.parametrize("by", ["magnitude", "movement"])
def test_a_pattern_holds_in_every_group(by: str) -> None:
    for name, weight in layers(made(gradual(pattern="2:4", by=by))).items():
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all()), name


def test_only_what_has_all_zeros_is_judged_and_three_losses_are_said() -> None:
    told = Told()
    made(gradual(), progress=told)
    steps = 4 * 18
    assert told.judged[0] > 0.6 * steps
    assert told.judged[-2] == steps  # and once more, the best of them
    whole, at_once, after = (
        float(told.said[-1].split(word)[0].split()[-1]) for word in (" with all", " with 70%", " after")
    )
    assert "16 rows held back" in told.said[-1]
    assert whole < after < at_once
    assert whole < 1e-6  # the start is the original


def test_what_is_not_better_leaves_the_smallest_gone_and_the_others_as_they_were() -> None:
    told = Told()
    weights, plain = layers(made(gradual(rate=0.09, epochs=1), progress=told)), llama().state_dict()
    assert "the others stay as they were" in told.said[-1]
    for name, weight in weights.items():
        gone = weight == 0
        assert float(gone.float().mean()) == pytest.approx(0.7, abs=0.002)
        assert torch.equal(weight[~gone], plain[name][~gone])
        assert float(plain[name][gone].abs().max()) <= float(plain[name][~gone].abs().min())


def test_a_training_that_is_stopped_before_all_zeros_are_there_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = watch.Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        ended(self, args, state, control, **more)
        control.should_training_stop = state.global_step == 12

    monkeypatch.setattr(watch.Watch, "on_step_end", stop)
    told = Told()
    found, plain = layers(made(gradual(), progress=told)), llama().state_dict()
    assert "after 12 steps: the smallest of the start are gone" in told.said[-1]
    for name, weight in found.items():
        assert float((weight == 0).float().mean()) == pytest.approx(0.7, abs=0.002)
        assert torch.equal(weight[weight != 0], plain[name][weight != 0])


@pytest.mark.parametrize(
    ("step", "by"),  # while it grows, and behind
    [
        (20, "movement"),
        (60, "magnitude"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((20, "magnitude"), (60, "movement"))),
    ],
)
def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, step: int
) -> None:
    def run_in(folder: Path) -> dict[str, Tensor]:
        with Run(folder, {}) as run:
            return dict(made(gradual(by=by), run=run).module.state_dict())

    whole = run_in(tmp_path / "whole")
    TINY["stop_at_step"](monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut")
    monkeypatch.undo()
    assert any((tmp_path / "cut" / "cache").rglob("checkpoint-*"))
    taken = TINY["steps_taken"](monkeypatch)
    again = run_in(tmp_path / "cut")
    assert taken[0] > 10  # the steps before the last checkpoint are not repeated
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert not any((tmp_path / "cut" / "cache").rglob("checkpoint-*"))


@pytest.mark.parametrize("by", ["magnitude", "movement"])
def test_zeros_of_earlier_steps_stay_and_count(by: str) -> None:
    before = layers(made(("sparsify", {"sparsity": 0.4, "by": "magnitude"})))
    found = layers(made(("sparsify", {"sparsity": 0.4, "by": "magnitude"}), gradual(by=by)))
    for name, weight in found.items():
        assert bool((weight[before[name] == 0] == 0).all())
        assert float((weight == 0).float().mean()) == pytest.approx(0.7, abs=0.002)


@pytest.mark.parametrize(
    "behind",
    [
        ("distill", {**SHORT, "sparsity": None}),
        ("lora", {"rank": 4, "merge": True, **{k: v for k, v in SHORT.items() if k != "sparsity"}}),
        ("gptq", {"bits": 4, "group_size": 16, "samples": 8}),
    ],
    ids=lambda entry: entry[0],
)
def test_later_steps_keep_the_zeros(behind: tuple[str, dict[str, Any]]) -> None:
    name, settings = behind
    behind = (name, {key: value for key, value in settings.items() if value is not None})
    before, after = made(gradual()), made(gradual(), behind)
    for name, weight in layers(before).items():
        now = after.quantized[name].dequantize() if name in after.quantized else after.module.get_parameter(name)
        assert bool((now[weight == 0] == 0).all())
        assert not torch.equal(now, weight)


def test_qat_keeps_the_zeros() -> None:
    rounded = ("gptq", {"bits": 4, "group_size": 16, "samples": 8})
    trained = {"epochs": 1, "batch_size": 8, "rate": 2e-3, "code_rate": 0.05, "precision": "fp32", "labels": 0}
    before, after = made(gradual(), rounded), made(gradual(), rounded, ("qat", trained))
    for name, codes in before.quantized.items():
        zeros = codes.dequantize() == 0
        assert bool((after.quantized[name].dequantize()[zeros] == 0).all())


@pytest.mark.parametrize("order", [("gradual", "sparsify"), ("gradual", "prune"), ("gptq", "gradual")])
def test_orders_that_make_no_sense_are_refused(order: tuple[str, str]) -> None:
    settings = {"prune": {"what": "ffn", "to": "50%"}}
    with pytest.raises(RecipeError, match=f"{order[0]} stands before {order[1]}, but must come after it"):
        resolve(Recipe(steps=tuple(Step(technique=name, settings=settings.get(name, {})) for name in order)))
    with pytest.raises(RecipeError, match="cannot be combined"):
        resolve(Recipe.from_yaml("- rotate: {}\n- gradual: {}"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "100%"}, "gradual: sparsity = 1.0: Input should be less than 1"),
        ({"sparsity": "half"}, "gradual: sparsity = 'half'"),
        ({"pattern": "4:2"}, "is not n:m"),
        ({"start": 0.7, "rest": 0.5}, "start 0.7 and rest 0.5 are 1.2 of the steps"),
        ({"pattern": "2:4", "within": "model"}, "pattern 2:4 says what stays in each layer"),
        ({"by": "chance"}, "gradual: by = 'chance'"),
    ],
)
def test_wrong_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as found:
        build(Step(technique="gradual", settings=settings))
    assert message in found.value.message


def test_a_share_may_be_written_as_in_prune() -> None:
    assert Gradual.model_validate({"sparsity": "60%"}) == Gradual(sparsity=0.6)
    assert Gradual.model_validate({"sparsity": "60%"}).label() == "gradual 60% by magnitude"


def test_what_it_cannot_train_is_said() -> None:
    with pytest.raises(GossamerError, match="does not divide in_features"):
        made(gradual(pattern="2:7"))
    candidate, model, context = TINY["opened"](llama())
    context = dataclasses.replace(context, training=lambda: rows(20))
    with pytest.raises(TechniqueError, match="64 rows to learn from, 20 are left"):
        Gradual.model_validate(SHORT).apply(candidate, model, context)
