"""Which recipes there are to choose from."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gossamer.plan.candidates import name_of, recipes
from gossamer.plan.job import Job
from gossamer.runtimes import get_runtime
from gossamer.techniques.base import SearchSpace
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.registry import recipe_of, resolve


@pytest.fixture
def space(job: Job) -> SearchSpace:
    return SearchSpace(model=job.model, runtime=get_runtime("onnxruntime"), task=job.task, calibration_rows=24)


def test_every_technique_alone_and_one_of_each_together(space: SearchSpace) -> None:
    found = recipes(space)
    alone = {name: list(kind.candidates(space)) for name, kind in (("quantize", Quantize), ("cast", Cast))}
    together = [steps + cast for steps in alone["quantize"] for cast in alone["cast"]]
    assert set(found) == {*alone["quantize"], *alone["cast"], *together}
    assert len(found) == len(set(found))
    assert found == recipes(space)  # a stable order: a killed run finds the same


def test_every_recipe_is_in_an_order_that_its_steps_allow(space: SearchSpace) -> None:
    for steps in recipes(space):
        assert resolve(recipe_of(steps)) == list(steps)
        names = [step.name for step in steps]
        assert all(pair != ("cast", "quantize") for pair in pairwise(names))


def test_names_tell_recipes_apart(space: SearchSpace) -> None:
    found = recipes(space)
    names = [name_of(steps) for steps in found]
    assert len(set(names)) == len(found)
    assert name_of((Quantize(activations="dynamic"), Cast())) == "int8 dynamic + cast bf16"


def test_widths_that_a_runtime_stores_as_wider_ones_are_not_proposed(job: Job) -> None:
    def widths(runtime: str) -> set[tuple[str, int]]:
        space = SearchSpace(model=job.model, runtime=get_runtime(runtime), task=job.task, calibration_rows=64)
        steps = [step for found in (*Quantize.candidates(space), *Gptq.candidates(space)) for step in found]
        assert all(isinstance(step, Quantize | Gptq) for step in steps)
        return {(step.name, step.bits) for step in steps if step.group_size}  # type: ignore[attr-defined]

    assert {("quantize", 3), ("gptq", 3), ("quantize", 2)} <= widths("torch")
    graph = widths("onnxruntime")  # 3 bits take 4 there
    assert {("quantize", 4), ("quantize", 2), ("gptq", 4)} <= graph
    assert not {("quantize", 3), ("gptq", 3)} & graph
    assert {bits for _, bits in widths("openvino")} == {4}  # 2 bits as well
