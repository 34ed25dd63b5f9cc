"""Sizes that differ from block to block: what they mean, what is refused, and that the cut model is the masked one."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from gossamer.errors import RecipeError
from gossamer.recipe import Recipe
from gossamer.runtimes import get_runtime
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.registry import recipe_of, resolve

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
logits, opened = TINY["logits"], TINY["opened"]


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_sizes_by_place_are_read_written_and_resolved() -> None:
    _, model, _ = opened(bert())
    step = Prune(what="ffn", to={"encoder.layer.*": 32, "1": "25%"})  # type: ignore[arg-type]
    (again,) = resolve(Recipe.from_yaml(recipe_of([step]).to_yaml()))
    assert again == step
    assert hash(again) == hash(step)
    step = Prune(what="ffn", to={"bert.encoder.layer.*": 32, "1": "25%"})  # type: ignore[arg-type]
    assert [(one.block, size) for one, size in step.sizes(model).items()] == [(0, 32), (1, 16), (2, 32)]
    assert [str(decision.cut) for decision in step.resolve(model)] == [f"64 to {size} ffn" for size in (32, 16, 32)]
    some = Prune(what="heads", to={"bert.encoder.layer.2": 3})  # type: ignore[arg-type]
    assert [(one.block, size) for one, size in some.sizes(model).items()] == [(2, 3)]
    refusal = get_runtime("torch").cut_refusal(step.cuts(model)[0])
    assert refusal is not None
    assert "config.json has one number (intermediate_size)" in refusal
    assert get_runtime("onnxruntime").cut_refusal(step.cuts(model)[0]) is None


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ({"encoder.layer.9": 4}, "matches none of 3 places"),
        ({"bert.encoder.layer.0": 64}, "64 of 64 would stay"),
        ({"bert.encoder.layer.0": "0%"}, "0 of 64 would stay"),
    ],
)
def test_places_and_sizes_that_cannot_be_are_refused(to: Any, message: str) -> None:
    _, model, _ = opened(bert())
    with pytest.raises(RecipeError, match=message):
        Prune(what="ffn", to=to).resolve(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": {}}, "names no place"),
        ({"to": {"a": "much"}}, "'much' is neither a share like 50% nor a number"),
        ({"to": {"a": 1.5}}, "neither a share below 1 nor a whole number"),
        ({"to": {"a": 4}, "targets": ["a"]}, "in `to` or in `targets`, not in both"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prune(what="ffn", **settings)


def test_a_model_that_is_cut_unevenly_computes_what_the_masked_one_does() -> None:
    network, sizes = bert(), (40, 64, 8)
    candidate, model, context = opened(network)
    step = Prune(
        what="ffn", to={f"bert.encoder.layer.{n}": size for n, size in enumerate(sizes) if size < 64},  # type: ignore[arg-type]
        by="magnitude", refit=False,
    )  # fmt: skip
    smaller = step.apply(candidate, model, context)
    assert not smaller.stock
    with torch.no_grad():
        for block, size in zip(network.bert.encoder.layer, sizes, strict=True):
            weight = block.output.dense.weight
            weight[:, weight.norm(dim=0).argsort()[: 64 - size]] = 0.0
    shapes = [smaller.module.get_parameter(f"bert.encoder.layer.{n}.output.dense.weight").shape[1] for n in range(3)]
    assert shapes == list(sizes)
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(logits(smaller.module, {"input_ids": ids}), logits(network, {"input_ids": ids}))
