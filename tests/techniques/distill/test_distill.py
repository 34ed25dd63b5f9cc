"""`distill` on tiny language models: it comes nearer to the original, keeps what it must, and goes on when killed."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import DataError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.run.team import Team
from gossamer.run.workspace import Run
from gossamer.runtimes import get_runtime
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, SearchSpace
from gossamer.techniques.distill.distill import Distill
from gossamer.techniques.followed import paired
from gossamer.techniques.prune.prune import Prune

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
logits, opened = TINY["logits"], TINY["opened"]
rows, llama, stop_at_step = TINY["rows_to_learn"], TINY["llama"], TINY["stop_at_step"]
SHORT: dict[str, Any] = {"epochs": 4, "batch_size": 8, "rate": 5e-4, "precision": "fp32", "labels": 0}


def pruned(**more: Any) -> tuple[Candidate, Any, Context]:
    """Return a tiny model with half of its channels, and 160 rows to learn from."""
    candidate, model, context = opened(llama(3), **more)
    context = dataclasses.replace(context, training=rows, training_print="rows")
    step = Prune.model_validate({"what": "ffn", "to": "25%", "by": "magnitude", "refit": False})
    return step.apply(candidate, model, context), step.after(model), context


def distance(candidate: Candidate) -> float:
    return float(TINY["distance_from"](llama(3), candidate))


def test_what_pruning_lost_comes_back() -> None:
    candidate, model, context = pruned()
    before = distance(candidate)
    found = Distill.model_validate(SHORT).apply(candidate, model, context)
    assert distance(found) < 0.8 * before
    assert found.applied[-1] == {"distill": Distill.model_validate(SHORT).entry()["distill"]}
    assert not any(parameter.requires_grad for parameter in found.module.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("settings", [{"hidden": 0}, {"logits": 0}, {"divergence": "js"}], ids=str)
def test_every_objective_alone_learns(settings: dict[str, Any]) -> None:
    candidate, model, context = pruned()
    before = distance(candidate)
    assert distance(Distill.model_validate({**SHORT, **settings}).apply(candidate, model, context)) < before


def test_embeddings_and_the_head_tied_to_them_stay() -> None:
    candidate, model, context = pruned()
    before = candidate.module.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    Distill.model_validate(SHORT).apply(candidate, model, context)
    assert torch.equal(candidate.module.get_input_embeddings().weight, before)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("tokens_cut", "asked", "learn"), [(True, None, True), (False, True, True), (True, False, False)]
)
def test_embeddings_learn_where_tokens_were_cut_and_where_it_is_asked_for(
    tokens_cut: bool, asked: bool | None, learn: bool
) -> None:
    candidate, model, context = pruned()
    if tokens_cut:
        candidate.applied.insert(0, {"vocabulary": {"to": "50%"}})
    before = candidate.module.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    Distill.model_validate({**SHORT, "embeddings": asked}).apply(candidate, model, context)
    assert torch.equal(candidate.module.get_input_embeddings().weight, before) != learn  # type: ignore[operator]


def test_weights_that_are_zero_stay_zero() -> None:
    candidate, model, context = pruned()
    weight = candidate.module.get_parameter("model.layers.1.self_attn.q_proj.weight")
    zeros = torch.rand(weight.shape) < 0.5
    with torch.no_grad():
        weight[zeros] = 0
    Distill.model_validate(SHORT).apply(candidate, model, context)
    assert torch.equal(weight == 0, zeros)


def test_a_rate_that_diverges_leaves_the_candidate_as_it_was() -> None:
    candidate, model, context = pruned()
    before = {name: value.clone() for name, value in candidate.module.state_dict().items()}
    said: list[str] = []
    context = dataclasses.replace(context, progress=_Said(said))
    Distill.model_validate({**SHORT, "rate": 0.09, "epochs": 3}).apply(candidate, model, context)
    after = candidate.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "stay as they were" in said[-1]


class _Said:
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def say(self, message: str) -> None:
        self.said.append(message)

    def record(self, series: str, step: int, values: Any) -> None:
        pass

    def stage(self, label: str, total: float | None = None) -> Any:
        from contextlib import nullcontext

        return nullcontext(lambda units: None)


def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _distilled(tmp_path / "whole")
    stopped = stop_at_step(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        _distilled(tmp_path / "cut")
    monkeypatch.undo()
    assert stopped
    assert any((tmp_path / "cut" / "cache").rglob("checkpoint-*"))
    again = _distilled(tmp_path / "cut")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert not any((tmp_path / "cut" / "cache").rglob("checkpoint-*"))


def _distilled(folder: Path) -> dict[str, Tensor]:
    with Run(folder, {}) as run:
        candidate, model, context = pruned(run=run)
        return Distill.model_validate(SHORT).apply(candidate, model, context).module.state_dict()


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _distilled(tmp_path / "whole")
    stop_at_step(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        _distilled(tmp_path / "cut")
    monkeypatch.undo()
    (checkpoint,) = sorted((tmp_path / "cut" / "cache").rglob("checkpoint-*"))[-1:]
    half = checkpoint.with_name("checkpoint-9999")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half of a file")
    again = _distilled(tmp_path / "cut")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_rows_without_labels_teach_by_the_original_alone() -> None:
    candidate, model, context = pruned()
    said: list[str] = []

    class Unlabelled(type(context.task)):  # type: ignore[misc]
        def loss(self, outputs: Any, batch: Batch) -> Tensor:
            raise DataError("the rows have no labels to compare with", "say which column holds them")

    context = dataclasses.replace(context, progress=_Said(said), task=Unlabelled())
    before = distance(candidate)
    found = Distill.model_validate({**SHORT, "labels": 0.5}).apply(candidate, model, context)
    assert distance(found) < before
    assert said[0] == "distill: the rows have no labels to compare with: the original alone is followed"
    with pytest.raises(DataError, match="no labels"):
        Distill.model_validate({**SHORT, "labels": 1, "logits": 0, "hidden": 0}).apply(candidate, model, context)


def test_a_step_that_processes_cannot_share_is_refused() -> None:
    candidate, model, context = pruned()
    context = dataclasses.replace(context, team=Team(rank=0, size=3, local_size=3))
    with pytest.raises(TechniqueError, match="a step of 8 rows cannot be shared evenly by 3 processes"):
        Distill.model_validate(SHORT).apply(candidate, model, context)


def test_blocks_of_a_shorter_student_follow_evenly_spread_ones() -> None:
    ours, theirs = ([nn.Identity() for _ in range(count)] for count in (4, 6))
    pairs = paired({"layers": ours}, {"layers": theirs})
    assert [theirs.index(block) for _, block in pairs] == [0, 2, 3, 5]


def test_few_rows_are_refused_with_both_numbers() -> None:
    candidate, model, context = pruned()
    context = dataclasses.replace(context, training=lambda: rows(20))
    with pytest.raises(TechniqueError, match="64 rows to learn from, 20 are left"):
        Distill.model_validate(SHORT).apply(candidate, model, context)


def test_a_rounded_candidate_is_refused() -> None:
    from gossamer.techniques.quantize.quantize import Quantize

    candidate, model, context = pruned()
    candidate = Quantize.model_validate({"bits": 8}).apply(candidate, model, context)
    with pytest.raises(TechniqueError, match="were rounded before"):
        Distill.model_validate(SHORT).apply(candidate, model, context)


def test_without_any_weight_nothing_is_learned() -> None:
    candidate, model, context = pruned()
    with pytest.raises(TechniqueError, match="nothing is learned"):
        Distill.model_validate({"logits": 0, "hidden": 0, "labels": 0}).apply(candidate, model, context)


def test_labels_alone_teach_the_rows_own_tokens() -> None:
    candidate, model, context = pruned()
    settings = {**SHORT, "logits": 0, "hidden": 0, "labels": 1.0, "epochs": 12}

    def loss(module: nn.Module) -> float:
        found = []
        for row in rows(20):
            inputs = {"input_ids": torch.from_numpy(row.inputs["input_ids"])}
            with torch.no_grad():
                found.append(float(context.task.loss({"logits": logits(module, inputs)}, row)))
        return sum(found) / len(found)

    context = dataclasses.replace(context, training=lambda: rows(20) * 8)  # what is held back is learned too
    before = loss(candidate.module)
    assert loss(Distill.model_validate(settings).apply(candidate, model, context).module) < before - 0.1


ALONE = {**SHORT, "hidden": 0}  # predictions alone are followed


def test_a_teacher_that_ran_once_teaches_what_it_teaches_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, passes = {}, {}
    for teacher in ("beside", "cached"):
        candidate, model, context = pruned()
        original = type(candidate.source).original
        counted: list[int] = []

        def counting(self: Any, task: Any, original: Any = original, counted: list[int] = counted) -> Any:
            module = original(self, task)
            module.register_forward_pre_hook(lambda *_: counted.append(1))
            return module

        with monkeypatch.context() as patch, Run(tmp_path / teacher, {"verb": "test"}) as run:
            patch.setattr(type(candidate.source), "original", counting)
            context = dataclasses.replace(context, run=run, identity={"model": "tiny"})
            found[teacher] = Distill.model_validate({**ALONE, "teacher": teacher}).apply(candidate, model, context)
        passes[teacher] = len(counted)
    assert passes["cached"] < passes["beside"] / 4, passes
    for name, values in found["cached"].module.named_parameters():
        torch.testing.assert_close(values, found["beside"].module.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_what_a_teacher_said_serves_other_trainings_of_the_run(tmp_path: Path) -> None:
    for rate in (5e-4, 1e-4):
        with Run(tmp_path / "run", {"verb": "test"}) as run:
            candidate, model, context = pruned(run=run, identity={"model": "tiny"})
            Distill.model_validate({**ALONE, "rate": rate, "epochs": 1}).apply(candidate, model, context)
            events = [entry["event"] for entry in run.journal() if entry.get("kind") == "teacher"]
    assert events == ["started", "finished", "reused"]


def test_layers_of_a_teacher_are_not_kept() -> None:
    candidate, model, context = pruned()
    with pytest.raises(TechniqueError, match="hidden look at the original's layers"):
        Distill.model_validate({**SHORT, "teacher": "cached"}).apply(candidate, model, context)


def test_a_student_learns_from_what_it_writes_and_goes_on_the_same_when_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SHORT, "epochs": 2, "on_policy": 0.5, "new_tokens": 4}
    ends = []
    for name, killed in (("whole", False), ("killed", True)):
        if killed:
            with monkeypatch.context() as patch, Run(tmp_path / name, {"verb": "test"}) as run:
                reached = stop_at_step(patch, 20)
                candidate, model, context = pruned(run=run, identity={"model": "tiny"})
                with pytest.raises(KeyboardInterrupt):
                    Distill.model_validate(settings).apply(candidate, model, context)
                assert reached
        with Run(tmp_path / name, {"verb": "test"}) as run:
            candidate, model, context = pruned(run=run, identity={"model": "tiny"})
            before = distance(candidate)
            Distill.model_validate(settings).apply(candidate, model, context)
        assert distance(candidate) < before
        ends.append({name: values.detach().clone() for name, values in candidate.module.named_parameters()})
    assert all(torch.equal(values, ends[1][name]) for name, values in ends[0].items())


@pytest.mark.parametrize(
    ("settings", "said"), [({"hidden": 0, "teacher": "cached"}, "teacher: cached"), ({"sharding": "fsdp"}, "fsdp")]
)
def test_whole_models_judge_what_is_written(settings: dict[str, Any], said: str) -> None:
    candidate, model, context = pruned()
    with pytest.raises(TechniqueError, match=said):
        Distill.model_validate({**SHORT, "on_policy": 0.5, **settings}).apply(candidate, model, context)


def test_rows_that_are_read_otherwise_have_a_teacher_run_anew(tmp_path: Path) -> None:
    with Run(tmp_path / "run", {"verb": "test"}) as run:
        for shift in (0, 1):  # as behind `vocabulary`: the same texts, other tokens
            candidate, model, context = pruned(run=run, identity={"model": "tiny"})
            read = [Batch({"input_ids": (row.inputs["input_ids"] + shift) % 64}, row.samples) for row in rows()]
            context = dataclasses.replace(context, training=lambda read=read: read)
            Distill.model_validate({**ALONE, "epochs": 1 + shift}).apply(candidate, model, context)
        events = [entry["event"] for entry in run.journal() if entry.get("kind") == "teacher"]
    assert events == ["started", "finished"] * 2


def test_a_classifier_of_which_little_is_left_learns_anew() -> None:
    _, model, _ = opened(llama(3))
    space = SearchSpace(model, get_runtime("torch"), get_task("text-classification"), 32, training_rows=4000)
    half, deep = Prune(what="ffn", to="50%"), (Prune(what="layers", remove=2), Prune(what="ffn", to="25%"))
    anew, usual = Distill.repairs(deep, space)
    assert isinstance(anew, Distill)
    assert (anew.epochs, anew.hidden, anew.batch_size, anew.rows) == (6, 0, 32, Distill().rows)
    assert anew.rate == 1e-3  # of 32 channels
    assert usual == Distill()
    many = Distill.repairs(deep, dataclasses.replace(space, training_rows=100_000))[0]
    assert isinstance(many, Distill)
    assert (many.rows, many.batch_size) == (65_536, 64)
    assert Distill.repairs((half,), space) == (usual,)
    assert Distill.repairs(deep, dataclasses.replace(space, training_rows=300)) == (usual,)
    assert Distill.repairs(deep, dataclasses.replace(space, task=get_task("causal-lm"))) == (usual,)
    assert Distill.repairs((*deep, Distill()), space) == ()
