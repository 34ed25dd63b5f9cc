"""First-order importance against slow loops over the model's own losses, what it chooses, and what it refuses."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.errors import DataError, TechniqueError
from gossamer.tasks import get_task
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.prune.taylor import taylor_scores

PRUNE = runpy.run_path(str(Path(__file__).parent / "test_prune.py"))
llama, bert, opened, distance = (PRUNE[name] for name in ("llama", "bert", "opened", "distance"))


def classifying(network: Any, labels: bool = True) -> Any:
    """Return the network as a candidate of a task whose loss needs labels."""
    candidate, model, context = opened(network, rows=8)
    batches = [
        replace(batch, targets={"labels": np.array([number % 2])} if labels else {})
        for number, batch in enumerate(context.calibration)
    ]
    return candidate, model, replace(context, task=get_task("text-classification"), calibration=batches)


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_scores_are_those_of_slow_loops(kind: str) -> None:
    candidate, model, context = classifying(bert())
    dimensions = [one for one in model.dimensions if one.kind == kind]
    found = taylor_scores(candidate, dimensions, context.calibration, context)
    one, module = dimensions[1], candidate.module
    wanted = torch.zeros(one.size)
    for batch in context.calibration:
        module.zero_grad()
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        output = module(input_ids=torch.from_numpy(batch.inputs["input_ids"])).logits
        torch.nn.functional.cross_entropy(output, torch.from_numpy(batch.targets["labels"])).backward()
        for member in one.members:
            values = module.get_parameter(member.parameter)
            assert values.grad is not None
            moved = (values * values.grad).detach().movedim(member.axis, 0)
            for unit in range(one.size):
                wanted[unit] += moved[unit * member.unit :][: member.unit].abs().sum() / len(context.calibration)
    torch.testing.assert_close(found[one].float(), wanted, rtol=1e-4, atol=1e-6)


def test_the_module_is_left_as_it_was() -> None:
    candidate, model, context = opened(llama(), rows=8)
    flags = [parameter.requires_grad for parameter in candidate.module.parameters()]
    taylor_scores(candidate, model.dimensions, context.calibration, context)
    assert [parameter.requires_grad for parameter in candidate.module.parameters()] == flags
    assert all(parameter.grad is None for parameter in candidate.module.parameters())


def test_channels_are_chosen_better_than_by_sizes_of_weights() -> None:
    assert distance(Prune(what="ffn", to="50%", by="taylor", refit=False), llama()) < distance(
        Prune(what="ffn", to="50%", by="magnitude", refit=False), llama()
    )


def test_the_block_that_does_nothing_goes_first() -> None:
    network = llama()
    with torch.no_grad():
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            network.get_parameter(f"model.layers.2.{name}.weight").mul_(1e-4)
    last = network.get_parameter("model.layers.3.mlp.up_proj.weight").detach().clone()
    candidate, model, context = opened(network)
    smaller = Prune(what="layers", remove=1, by="taylor").apply(candidate, model, context)
    assert torch.equal(smaller.module.get_parameter("model.layers.2.mlp.up_proj.weight"), last)


def test_rows_without_labels_are_refused_where_the_loss_needs_them() -> None:
    candidate, model, context = classifying(bert(), labels=False)
    with pytest.raises(DataError, match="no labels"):
        Prune(what="ffn", to="50%", by="taylor").apply(candidate, model, context)


def test_importance_that_is_not_finite_is_an_error() -> None:
    candidate, model, context = opened(llama(), rows=8)
    candidate.module.get_parameter("model.layers.1.mlp.down_proj.weight").detach()[0, 0] = torch.nan
    with pytest.raises(TechniqueError, match="NaN or infinite"):
        Prune(what="ffn", to="50%", by="taylor").apply(candidate, model, context)
