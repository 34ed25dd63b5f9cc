"""What `distill` follows of the original besides predictions: attention, and blocks wider than the student's."""

from __future__ import annotations

import copy
import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.run.workspace import Run
from gossamer.techniques.adapt.lora import Lora
from gossamer.techniques.base import Context
from gossamer.techniques.distill.distill import Distill
from gossamer.techniques.followed import relation_heads
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.quantize.quantize import Quantize

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
llama, opened, rows, distance_from = (TINY[name] for name in ("llama", "opened", "rows_to_learn", "distance_from"))
SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 8, "rate": 5e-4, "precision": "fp32", "labels": 0}
ALONE: dict[str, Any] = {**SHORT, "epochs": 1, "rate": 2e-3, "logits": 0, "hidden": 0}
WIDTH: dict[str, Any] = {"what": "width", "to": "75%"}
FFN: dict[str, Any] = {"what": "ffn", "to": "25%", "by": "magnitude", "refit": False}


def opt() -> OPTForCausalLM:
    """Return a tiny language model that learns its positions instead of rotating by them."""
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=32,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
    return model


def cut(network: nn.Module, settings: dict[str, Any], **more: Any) -> tuple[Candidate, Any, Context]:
    """Return a tiny model with something cut out, and 160 rows to learn from."""
    candidate, model, context = opened(network, **more)
    context = dataclasses.replace(context, training=rows, training_print="rows")
    step = Prune.model_validate(settings)
    return step.apply(candidate, model, context), step.after(model), context


@pytest.mark.parametrize("projection", ["lstsq", "learned"])
def test_a_narrower_student_follows_blocks_through_layers_that_are_not_kept(projection: str) -> None:
    candidate, model, context = cut(llama(3), WIDTH)
    before, shapes = distance_from(llama(3), candidate), _shapes(candidate)
    found = Distill.model_validate({**SHORT, "projection": projection}).apply(candidate, model, context)
    assert distance_from(llama(3), found) < 0.97 * before
    assert _shapes(found) == shapes
    assert not any("projection" in name for name, _ in found.module.named_modules())


def _shapes(candidate: Candidate) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in candidate.module.state_dict().items()}


def test_projections_that_stand_still_do_and_learned_ones_move(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {}
    for projection in ("lstsq", "learned"):
        candidate, _, context = cut(llama(3), WIDTH)
        step = Distill.model_validate({**SHORT, "projection": projection})
        lesson = step._lesson(candidate, context)
        assert lesson.projections is not None
        before = lesson.projections[0].get_parameter("weight").detach().clone()
        monkeypatch.setattr(Distill, "_lesson", lambda *_, lesson=lesson: lesson)
        step.apply(candidate, None, context)  # type: ignore[arg-type]
        monkeypatch.undo()
        moved[projection] = not torch.equal(lesson.projections[0].get_parameter("weight"), before)
    assert moved == {"lstsq": False, "learned": True}


def test_a_run_with_learned_projections_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _distilled(tmp_path / "whole")
    TINY["stop_at_step"](monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        _distilled(tmp_path / "cut")
    monkeypatch.undo()
    assert any((tmp_path / "cut" / "cache").rglob("checkpoint-*"))
    again = _distilled(tmp_path / "cut")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def _distilled(folder: Path) -> dict[str, Tensor]:
    with Run(folder, {}) as run:
        candidate, model, context = cut(llama(2), WIDTH, run=run)
        step = Distill.model_validate({**SHORT, "epochs": 1, "projection": "learned", "relations": 1})
        return step.apply(candidate, model, context).module.state_dict()


@pytest.mark.parametrize(
    "settings",
    [FFN, WIDTH, {"what": "heads", "to": "50%"}, {"what": "layers", "to": "67%"}],
    ids=lambda settings: settings["what"],
)
def test_relations_alone_come_nearer_for_students_of_any_shape(settings: dict[str, Any]) -> None:
    candidate, model, context = cut(llama(3), settings)
    step = Distill.model_validate({**ALONE, "relations": 1})
    before, after = _losses(step, candidate, model, context)
    assert after < 0.9 * before


def test_maps_alone_come_nearer() -> None:
    candidate, model, context = cut(opt(), FFN)
    before, after = _losses(Distill.model_validate({**ALONE, "attention": 1}), candidate, model, context)
    assert after < 0.9 * before


def _losses(step: Distill, candidate: Candidate, model: Any, context: Context) -> tuple[float, float]:
    """Return the loss on rows held back before and after."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        found, _ = step._trained(candidate, model, context, Path(folder))
    return found["before"], found["after"]


def test_only_the_layers_that_are_looked_at_learn_from_relations() -> None:
    candidate, model, context = cut(llama(3), FFN)
    before = {name: value.clone() for name, value in candidate.module.state_dict().items()}
    Distill.model_validate({**ALONE, "relations": 1}).apply(candidate, model, context)
    changed = {name for name, value in candidate.module.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"model.layers.2.self_attn.{name}_proj.weight" for name in "qkv"} <= changed
    assert "model.layers.2.self_attn.o_proj.weight" not in changed
    assert "model.norm.weight" not in changed


def test_thin_layers_beside_rounded_weights_learn_from_relations() -> None:
    candidate, model, context = cut(llama(2), FFN)
    step = Lora.model_validate({**ALONE, "relations": 1, "rank": 4, "targets": ["q"], "rate": 5e-3})
    found = step.apply(candidate, step.after(model), context)
    moved = [
        value
        for name, value in found.module.named_parameters()
        if "layers.1" in name and name.endswith("lora_B.weight")
    ]
    assert len(moved) == 1
    assert float(moved[0].abs().max()) > 0


def test_what_is_merged_is_judged_by_the_projections_that_were_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.train import loop

    judged, plain = [], loop.judged

    def noted(lesson: Any, *others: Any) -> Any:
        judged.append(copy.deepcopy(lesson.projections))
        return plain(lesson, *others)

    monkeypatch.setattr(loop, "judged", noted)
    candidate, model, context = cut(llama(2), WIDTH)
    rounded = Quantize.model_validate({"bits": 4})
    candidate = rounded.apply(candidate, model, context)
    step = Lora.model_validate({**SHORT, "epochs": 1, "rank": 4, "merge": True, "projection": "learned", "rate": 5e-3})
    start = step._lesson(candidate, context).projections
    step.apply(candidate, model, context)
    assert len(judged) == 2  # before a step was taken, and what is merged
    first, merged = (list(one.parameters()) for one in judged)
    assert all(torch.equal(now, before) for now, before in zip(first, start.parameters(), strict=True))
    assert not any(torch.equal(now, before) for now, before in zip(merged, start.parameters(), strict=True))
    refitted = step._lesson(candidate, context).projections
    assert not torch.equal(judged[1][0].weight, refitted[0].weight)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"relations": 1, "relation_block": 3}, r"relation_block 3 is none of the 3 blocks .* \(0 to 2\)"),
        ({"relations": 1, "relation_heads": 5}, "relation_heads 5 does not divide the 32 outputs of .* original's 32"),
        ({"attention": 1}, "none of the 3 softmaxes of a pass over 16 tokens .*\n.*`relations` instead"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(settings: dict[str, Any], said: str) -> None:
    candidate, model, context = cut(llama(3), FFN)
    with pytest.raises(TechniqueError, match=said):
        Distill.model_validate({**SHORT, **settings}).apply(candidate, model, context)


def test_maps_of_fewer_heads_are_refused() -> None:
    candidate, model, context = cut(opt(), {"what": "heads", "to": "50%"})
    with pytest.raises(TechniqueError, match=r"has 2 heads and the original's .* has 4"):
        Distill.model_validate({**SHORT, "attention": 1}).apply(candidate, model, context)


def test_queries_keys_and_values_out_of_one_layer_are_refused_by_name() -> None:
    network = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)).eval()
    candidate, model, context = cut(network, FFN)
    with pytest.raises(TechniqueError, match=r"relations could follow: .* one layer: transformer\.h\.0\.attn\.c_attn"):
        Distill.model_validate({**SHORT, "relations": 1}).apply(candidate, model, context)


def test_the_teachers_block_can_be_named() -> None:
    candidate, _, context = cut(llama(3), FFN)
    lesson = Distill.model_validate({**SHORT, "relations": 1, "relation_block": 1})._lesson(candidate, context)
    assert lesson.teacher_layers == [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert lesson.student_layers == [f"model.layers.2.self_attn.{name}_proj" for name in "qkv"]


@pytest.mark.parametrize(
    ("student", "teacher", "size", "heads"),
    [(384, 384, 32, 12), (192, 384, 32, 12), (224, 384, 32, 8), (96, 128, 64, 2), (7, 8, 2, 1)],
)
def test_relation_heads_divide_both_widths_and_are_at_most_the_teachers(
    student: int, teacher: int, size: int, heads: int
) -> None:
    assert relation_heads(student, teacher, size, None, "q") == heads


def test_heads_that_nothing_shows_have_to_be_given() -> None:
    with pytest.raises(TechniqueError, match="set relation_heads to one of 1, 2, 4, 8"):
        relation_heads(8, 16, 0, None, "q")
    assert relation_heads(8, 16, 0, 4, "q") == 4


def test_settings_that_are_not_given_leave_the_entry_as_it_was() -> None:
    """A run folder's prints are made of it."""
    assert Distill.model_validate({"epochs": 1}).entry() == {"distill": {"epochs": 1.0}}
