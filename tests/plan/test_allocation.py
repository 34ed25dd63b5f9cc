"""Widths are chosen by an integer programme: the best of all combinations that fit, written as a recipe."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.models.structure import map_model
from gossamer.plan.allocation import allocate, with_widths
from gossamer.recipe import Recipe
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.registry import recipe_of, resolve


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all_that_fit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = np.sort(draw.integers(1, 100, (5, 3)), axis=1)
    kl = -np.sort(-draw.random((5, 3)) * 10.0 ** draw.integers(-6, 0, (5, 1)), axis=1)
    everything = list(itertools.product(range(3), repeat=5))
    rows = np.arange(5)
    for budget in (sizes[:, 0].sum(), sizes[:, 1].sum(), sizes.sum() // 3, sizes[:, 2].sum()):
        fitting = [options for options in everything if sizes[rows, options].sum() <= budget]
        best = min(kl[rows, options].sum() for options in fitting)
        found = allocate(kl, sizes, float(budget))
        assert found is not None
        assert sizes[rows, found].sum() <= budget
        assert kl[rows, found].sum() <= best * 1.01
    assert allocate(kl, sizes, float(sizes[:, 0].sum() - 1)) is None


def test_widths_become_a_recipe_that_reads_back_as_decided() -> None:
    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = map_model(LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(8)[None]})
    base = Gptq(bits=4, group_size=32, ignore=("lm_head",))
    decisions = base.resolve(model)
    widths = [(8, 4, 4, 3, 5)[index % 5] for index in range(len(decisions))]
    mixed = with_widths(base, decisions, widths)
    (again,) = resolve(Recipe.from_yaml(recipe_of([mixed]).to_yaml()))
    assert again == mixed
    assert hash(again) == hash(mixed)
    assert [decision.weight.bits for decision in again.resolve(model) if decision.weight] == widths
    assert "mixed int3/4/5/8" in mixed.label() or "mixed int3/5/8" in mixed.label()
