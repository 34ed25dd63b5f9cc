"""Every module is either touched, with what the recipe says, or left for a reason that is true of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.plan.coverage import NOT_CALLED, OTHER_EXPERTS, ROUTER, coverage
from gossamer.plan.job import Job
from gossamer.plan.records import Covered
from gossamer.runtimes import get_runtime
from gossamer.techniques.base import Technique
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.quantize import Quantize

IN: dict[str, Any] = {"stack": "b", "block": 0}
LAYERS = (
    LayerInfo(name="embed", kind="embedding", role="embedding", shape=(100, 64), num_parameters=6400),
    LayerInfo(name="b.0.up", kind="linear", role="up", shape=(96, 64), num_parameters=6144, macs=9, **IN),
    LayerInfo(name="b.0.down", kind="linear", role="down", shape=(64, 96), num_parameters=6144, macs=9, **IN),
    LayerInfo(name="b.0.spare", kind="linear", role="linear", shape=(64, 64), num_parameters=4096, **IN),
    LayerInfo(name="scale", kind="other", role="other", shape=(7,), num_parameters=7),
    LayerInfo(name="norm", kind="norm", role="norm", shape=(64,), num_parameters=64),
    LayerInfo("head", "linear", "head", shape=(100, 64), num_parameters=0, macs=9, tied_to="embed.weight"),
)  # fmt: skip
MODEL = ModelMap(layers=LAYERS, stacks=(), num_parameters=22855, num_bytes=91420, macs=27)


def rows(*steps: Technique, runtime: str = "torch", model: ModelMap = MODEL) -> dict[str, Covered]:
    found = coverage(steps, model, get_runtime(runtime))
    assert [row.module for row in found] == [layer.name for layer in model.layers]  # each once, in order
    return {row.module: row for row in found}


def test_what_is_done_is_what_the_recipe_says() -> None:
    found = rows(
        Gptq(bits=4, group_size=32, ignore=("b.0.spare",)), Quantize(targets=("embedding",)), Cast(dtype="bf16")
    )
    assert found["b.0.up"].done == "gptq int4 asymmetric group 32, cast bf16"
    assert found["embed"].done == "quantize int8 symmetric per channel, cast bf16"
    assert found["head"].done == "shares embed.weight: quantize int8 symmetric per channel, cast bf16"
    assert found["norm"].done == "cast bf16"
    assert not any(row.why for row in found.values())


@pytest.mark.parametrize(
    ("step", "module", "why"),
    [
        (Gptq(group_size=32, ignore=("b.0.up",)), "b.0.up", "named under `ignore` of gptq"),
        (Gptq(group_size=64, ignore=("down",)), "b.0.down",
         "named under `ignore` of gptq: group_size 64 does not divide its 96 inputs"),
        (Quantize(targets=("up",)), "b.0.down", "no step's `targets` match it (role down)"),
        (Quantize(bits=4, group_size=64, targets=("up",)), "b.0.down", "group_size 64 does not divide its 96 inputs"),
        (Quantize(targets=("up",)), "norm", "a norm is one number a channel: nothing to gain below 16 bits"),
        (Quantize(targets=("up",)), "scale", "no linear layer, convolution or embedding: no technique here rounds it"),
        (Quantize(targets=("up",)), "b.0.spare", NOT_CALLED),
        (Quantize(targets=("linear",)), "head", "shares embed.weight"),
    ],
)  # fmt: skip
def test_why_a_module_is_left(step: Technique, module: str, why: str) -> None:
    found = rows(step)[module]
    assert (found.done, found.why) == ("", why)


def test_what_the_runtime_cannot_hold_is_said_in_its_words() -> None:
    conv = LayerInfo(name="conv", kind="conv", role="convolution", shape=(8, 3, 3, 3), num_parameters=216, macs=9)
    model = replace(MODEL, layers=(*LAYERS, conv))
    refusal = get_runtime("torch").refusal("convolution", conv.shape, Quantize().resolve(MODEL)[0].weight, None)
    assert refusal is not None
    assert rows(Quantize(targets=("linear",)), model=model)["conv"].why == f"torch cannot hold it: {refusal}"


def test_a_layer_that_no_sample_reaches_is_rounded_and_said_so() -> None:
    found = rows(Gptq(group_size=32))["b.0.spare"]
    assert found.done == "gptq int4 asymmetric group 32"
    assert found.why.startswith(NOT_CALLED)


def test_each_expert_is_told_and_routers_are_left() -> None:
    holder = "b.0.experts"
    experts = [
        LayerInfo(f"{holder}.{i}.up", "linear", "expert_up", (96, 64), 6144, macs=9 * i, experts=holder, **IN)
        for i in range(2)
    ]
    kinds = ("linear", "other")
    routers = [LayerInfo(f"b.{i}.gate", kind, "router", (2, 64), 128, **IN) for i, kind in enumerate(kinds)]
    model = replace(MODEL, layers=(*LAYERS, *experts, *routers))
    found = rows(Gptq(group_size=32, symmetric=True), model=model)
    assert [found[layer.name].done for layer in experts] == ["gptq int4 symmetric group 32"] * 2
    assert [found[layer.name].why for layer in experts] == [OTHER_EXPERTS, ""]
    assert [(found[layer.name].done, found[layer.name].why) for layer in routers] == [("", ROUTER)] * 2


def test_a_real_model_is_covered_parameter_by_parameter(job: Job) -> None:
    steps = (Quantize(activations="dynamic", ignore=("classifier",)), Quantize(targets=("embedding",)))
    found = coverage(steps, job.model, job.runtime)
    assert sum(row.num_parameters for row in found) == job.model.num_parameters
    decided = {decision.parameter for step in steps for decision in step.resolve(job.model)}
    assert {f"{row.module}.weight" for row in found if row.done} == decided
    assert all(row.done or row.why for row in found)
