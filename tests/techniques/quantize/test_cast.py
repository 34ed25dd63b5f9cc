from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.runtimes import get_runtime
from gossamer.tasks import get_task
from gossamer.techniques.base import Context, SearchSpace
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.quantize import Quantize

TASK = get_task("text-classification")


class Tied(nn.Module):
    """An embedding, a linear layer, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.inner = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(input_ids))))


def opened() -> tuple[Candidate, ModelMap, Context]:
    torch.manual_seed(0)
    source = Source.open(Tied().eval(), forward=lambda module, inputs: module(**inputs))
    ids = np.arange(6).reshape(1, 6)
    candidate = Candidate(source=source, module=source.module(TASK))
    model = map_model(candidate.module, {"input_ids": torch.from_numpy(ids)}, source.forward)
    return candidate, model, Context(task=TASK, example={"input_ids": ids}, calibration=[], progress=Silent())


@pytest.mark.parametrize(("name", "mantissa_bits"), [("bf16", 7), ("fp16", 10)])
def test_every_value_is_the_nearest_of_its_format(name: str, mantissa_bits: int) -> None:
    candidate, model, context = opened()
    before = {key: values.detach().clone() for key, values in candidate.module.named_parameters()}
    candidate = Cast(dtype=name).apply(candidate, model, context)  # type: ignore[arg-type]
    assert candidate.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert candidate.applied == [Cast(dtype=name).entry()]  # type: ignore[arg-type]
    for key, values in candidate.module.named_parameters():
        assert values.dtype == torch.float32
        exact = before[key].double().numpy()
        step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - mantissa_bits)  # the spacing of the format at each value
        nearest = np.round(exact / step) * step  # half to even, as IEEE 754 says
        np.testing.assert_array_equal(values.detach().double().numpy(), nearest)
        assert not np.array_equal(nearest, exact)


def test_a_tied_weight_is_decided_once() -> None:
    _, model, _ = opened()
    decisions = Cast().resolve(model)
    assert [decision.parameter for decision in decisions] == ["embed.weight", "inner.weight"]
    assert {decision.dtype for decision in decisions} == {"bf16"}
    assert str(decisions[0]) == "embed.weight: bf16"


def test_codes_stay_as_they_are() -> None:
    candidate, model, context = opened()
    candidate = Quantize(bits=4, group_size=8).apply(candidate, model, context)
    values = candidate.module.get_parameter("inner.weight").clone()
    candidate = Cast(dtype="bf16").apply(candidate, model, context)
    assert torch.equal(candidate.module.get_parameter("inner.weight"), values)
    bias = candidate.module.get_parameter("inner.bias")
    assert torch.equal(bias, bias.bfloat16().float())
    assert candidate.applied == [{"quantize": {"bits": 4, "group_size": 8}}, {"cast": {}}]


def test_a_value_that_would_become_infinite_is_refused() -> None:
    candidate, model, context = opened()
    with torch.no_grad():
        candidate.module.get_parameter("inner.bias")[:2] = torch.tensor([70_000.0, -1e20])
    with pytest.raises(TechniqueError) as caught:
        Cast(dtype="fp16").apply(candidate, model, context)
    assert "2 values of inner.bias overflow fp16: the largest is 1e+20, the format ends at 6.55e+04" in str(
        caught.value
    )
    assert "bf16" in caught.value.hint
    candidate, model, context = opened()
    with torch.no_grad():
        candidate.module.get_parameter("inner.bias")[:2] = torch.tensor([70_000.0, -1e20])
    Cast(dtype="bf16").apply(candidate, model, context)  # has float32's range


def test_both_formats_are_proposed_alone() -> None:
    _, model, _ = opened()
    space = SearchSpace(model=model, runtime=get_runtime("torch"), task=TASK, calibration_rows=0)
    assert [[step.entry() for step in steps] for steps in Cast.candidates(space)] == [
        [{"cast": {}}], [{"cast": {"dtype": "fp16"}}]
    ]  # fmt: skip
    assert [step.label() for steps in Cast.candidates(space) for step in steps] == ["cast bf16", "cast fp16"]
