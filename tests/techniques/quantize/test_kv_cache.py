"""The technique `kv_cache`: scales of what really goes into caches, and models that it is not for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.tasks import get_task
from gossamer.techniques.base import Context
from gossamer.techniques.quantize.kv_cache import KvCache

IDS = np.random.default_rng(0).integers(0, 50, (6, 9))


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def opened(model: PreTrainedModel, folder: Path, task: str) -> tuple[Candidate, ModelMap, Context]:
    model.save_pretrained(folder)
    source, found = Source.open(folder), get_task(task)
    batches: Any = [
        SimpleNamespace(inputs={"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}) for ids in IDS
    ]
    module = source.module(found)
    example = {name: torch.from_numpy(values) for name, values in batches[0].inputs.items()}
    context = Context(task=found, example=batches[0].inputs, calibration=batches, progress=Silent())
    return Candidate(source, module), map_model(module, example), context


@pytest.mark.parametrize("scope", ["tensor", "head"])
def test_scales_hold_the_keys_and_values_of_the_samples_that_are_used(tmp_path: Path, scope: Any) -> None:
    candidate, model, context = opened(llama(), tmp_path / "model", "causal-lm")
    step = KvCache(format="int8", scope=scope, samples=4)
    decisions = step.resolve(model)
    assert [decision.parameter for decision in decisions] == [
        f"model.layers.{index}.self_attn.{part}" for index in range(2) for part in ("k_scale", "v_scale")
    ]
    assert str(decisions[0]) == f"model.layers.0.self_attn.k_scale: int8 per {scope}"
    before = {name: values.clone() for name, values in candidate.module.named_parameters()}
    found = step.apply(candidate, model, context)
    assert found.applied == [step.entry()]
    for name, values in found.module.named_parameters():
        torch.testing.assert_close(values, before[name], rtol=0, atol=0)
    used = torch.from_numpy(IDS[[0, 1, 3, 4]])  # four of six, evenly spread
    with torch.no_grad():
        kept = candidate.module(input_ids=used, use_cache=True).cache
    for index, layer in enumerate(kept.layers):
        cache = found.caches[f"model.layers.{index}.self_attn"]
        for scale, values in ((cache.key_scale, layer.keys), (cache.value_scale, layer.values)):
            exact = values.abs().amax() if scope == "tensor" else values.abs().amax((0, 2, 3))
            torch.testing.assert_close(scale.flatten(), exact.reshape(-1) / 127, rtol=2**-7, atol=0)
            assert bool((127 * scale.flatten() >= exact - 1e-6).all())
    assert not any(module._forward_pre_hooks for module in candidate.module.modules())
    with found.simulated() as module, torch.no_grad():
        rounded = module(input_ids=used).logits
    with torch.no_grad():
        plain = candidate.module(input_ids=used).logits
    assert 1e-4 < float((rounded - plain).std() / plain.std()) < 0.1


def test_models_without_such_a_cache_are_refused(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    candidate, model, context = opened(BertForSequenceClassification(config), tmp_path / "bert", "text-classification")
    with pytest.raises(TechniqueError, match="keeps no keys and values for later tokens"):
        KvCache().apply(candidate, model, context)
    pictures = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    )
    with pytest.raises(RecipeError, match="finds no attention"):
        KvCache().resolve(map_model(pictures.eval(), {"pixel_values": torch.zeros(1, 3, 32, 32)}))


def test_too_few_samples_a_second_step_and_numbers_that_are_none(tmp_path: Path) -> None:
    candidate, model, context = opened(llama(), tmp_path / "model", "causal-lm")
    few = Context(task=context.task, example=context.example, calibration=context.calibration[:3],
                  progress=context.progress)  # fmt: skip
    with pytest.raises(TechniqueError, match="needs 4 calibration samples, 3 were given"):
        KvCache().apply(candidate, model, few)
    broken = candidate.module.get_parameter("model.layers.1.self_attn.v_proj.weight")
    kept = broken.detach().clone()
    with torch.no_grad():
        broken[0, 0] = float("inf")
    with pytest.raises(TechniqueError, match=r"keys or values of model.layers.1.self_attn are NaN or infinite"):
        KvCache().apply(candidate, model, context)
    with torch.no_grad():
        broken.copy_(kept)
    KvCache().apply(candidate, model, context)
    with pytest.raises(TechniqueError, match="has scales already"):
        KvCache().apply(candidate, model, context)


def test_it_comes_behind_what_changes_weights() -> None:
    assert {"quantize", "gptq", "tune_scales", "cast"} <= set(KvCache.needs.after)
