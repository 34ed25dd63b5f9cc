"""`prune: {what: channels}` on tiny convolutional networks: every structure, every choice, and what is exported."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.errors import RecipeError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.runtimes import get_runtime
from gossamer.runtimes.base import ExportRequest
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, SearchSpace
from gossamer.techniques.prune.prune import Prune

TINY = runpy.run_path(str(Path(__file__).parents[2] / "models" / "tiny_convolutions.py"))
NETWORKS, built, forward, pictures = TINY["NETWORKS"], TINY["built"], TINY["forward"], TINY["pictures"]
TASK = get_task("image-classification")


def opened(network: nn.Module, rows: int = 32) -> tuple[Candidate, ModelMap, Context]:
    """Return a copy of a network as a candidate with its map and calibration batches."""
    draw = np.random.default_rng(0)
    batches = [
        Batch({"pixel_values": draw.standard_normal((1, 3, 8, 8), np.float32)}, np.array([index]))
        for index in range(rows)
    ]
    source = Source.open(network, forward=forward)
    candidate = Candidate(source=source, module=source.module(TASK))
    context = Context(task=TASK, example=batches[0].inputs, calibration=batches, progress=Silent())
    return candidate, map_model(candidate.module, pictures(), forward), context


def distance(step: Prune, network: nn.Module) -> float:
    """Return the squared distance of the outputs to the original's, on other pictures than the step was given."""
    candidate, model, context = opened(network)
    changed = step.apply(candidate, model, context).module
    with torch.no_grad():
        given = pictures(64)
        return float((forward(changed, given) - forward(network, given)).square().sum())


@pytest.mark.parametrize("by", ["obs", "fisher", "activation", "magnitude"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_every_structure_is_cut_by_every_choice(network: Callable[[], nn.Module], by: Any) -> None:
    candidate, model, context = opened(built(network))
    step = Prune(what="channels", to="67%", by=by)
    after = step.after(model)
    smaller = step.apply(candidate, model, context)  # it checks that the cut network computes what the masked one did
    assert sum(values.numel() for values in smaller.module.parameters()) == after.num_parameters < model.num_parameters
    again = map_model(smaller.module, pictures(), forward)
    assert [layer.macs for layer in again.layers] == [layer.macs for layer in after.layers]


@pytest.mark.parametrize("network", [TINY["Residual"], TINY["Joined"], TINY["Separable"]])
def test_what_stays_makes_up_for_what_goes(network: Callable[[], nn.Module]) -> None:
    blind = distance(Prune(what="channels", to="67%", by="magnitude", refit=False), built(network))
    assert distance(Prune(what="channels", to="67%", by="magnitude"), built(network)) < blind
    assert distance(Prune(what="channels", to="67%"), built(network)) < blind


def test_a_copy_of_a_channel_goes_at_no_cost() -> None:
    network = built(TINY["Plain"])
    with torch.no_grad():
        for layer in network.one[:2]:  # type: ignore[index]
            for values in (*layer.parameters(), *(b for b in layer.buffers() if b.dim())):
                values[4:] = values[:4]
    assert distance(Prune(what="channels", to="50%", targets=("one",), damping=1e-6), network) < 1e-5
    blind = Prune(what="channels", to="50%", targets=("one",), by="magnitude", refit=False)
    assert distance(blind, network) > 1e-3


@pytest.mark.parametrize("network", [TINY["Residual"], TINY["Separable"], TINY["Joined"]])
def test_the_exported_file_has_the_smaller_shapes(network: Callable[[], nn.Module], tmp_path: Path) -> None:
    candidate, model, context = opened(built(network))
    smaller = Prune(what="channels", to="50%", by="magnitude").apply(candidate, model, context)
    example = {name: values.numpy() for name, values in pictures().items()}
    runtime = get_runtime("onnxruntime")
    request = ExportRequest(
        task=TASK, example=example, axes={"pixel_values": {0: "batch"}}, outputs=("logits",), cache=tmp_path.parent
    )
    runtime.write(smaller, tmp_path, request)
    stored = {one.name: tuple(one.shape) for one in runtime.stored_tensors(tmp_path)}
    for name, values in smaller.module.named_parameters():
        if name.endswith(".weight") and values.dim() == 4:
            assert tuple(values.shape) in stored.values(), name
    found = next(iter(runtime.open(tmp_path, threads=1).run(example).values()))
    with torch.no_grad():
        np.testing.assert_allclose(found, forward(smaller.module, pictures()).numpy(), rtol=1e-4, atol=1e-5)


def test_targets_and_bad_sizes_are_refused_with_the_numbers() -> None:
    _, model, _ = opened(built(TINY["Plain"]))
    assert [str(one.cut) for one in Prune(what="channels", to=4, targets=("two",)).resolve(model)] == [
        "12 to 4 channels"
    ]
    with pytest.raises(RecipeError, match=r"channels of one\.0: 0 of 8 would stay"):
        Prune(what="channels", to="0%").resolve(model)
    with pytest.raises(RecipeError, match="'three' matches none of 2 places"):
        Prune(what="channels", to="50%", targets=("three",)).resolve(model)
    _, without, _ = opened(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval())
    with pytest.raises(RecipeError, match="no channels of this model can be cut"):
        Prune(what="channels", to="50%").resolve(without)


def test_the_planner_is_offered_channels_where_less_work_is_asked_for() -> None:
    _, model, _ = opened(built(TINY["Joined"]))

    def proposed(*wanted: str) -> list[Any]:
        space = SearchSpace(model, get_runtime("onnxruntime"), TASK, 64, frozenset(wanted))
        return [step.to for steps in Prune.candidates(space) for step in steps if step.what == "channels"]  # type: ignore[attr-defined]

    assert proposed("latency") == ["75%", "62%", "50%"]
    assert not proposed("size")
