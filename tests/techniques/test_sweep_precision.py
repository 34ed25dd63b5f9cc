"""Passes in bfloat16: chosen where they stay near, never where they do not, and the same after a kill."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.run.workspace import Run
from gossamer.techniques import sweep_precision
from gossamer.techniques.base import Context
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.moments import Moments
from gossamer.techniques.sweep_precision import allowed_drift, computing, full_precision

Told: Callable[[], Any] = runpy.run_path(str(Path(__file__).parent / "tiny_candidates.py"))["Told"]
SWEEPS = runpy.run_path(str(Path(__file__).parent / "test_blockwise.py"))
opened: Callable[..., tuple[Candidate, ModelMap, Context]] = SWEEPS["opened"]
same: Callable[[Candidate, Candidate], bool] = SWEEPS["same"]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor multiply bfloat16 numbers (every processor can, some slowly)."""
    monkeypatch.setattr(sweep_precision, "multiplies_bf16", lambda: True)


def swept(step: Gptq, run: Run | None = None) -> tuple[Candidate, list[str]]:
    candidate, model, context = opened(run)
    told = Told()
    step.apply(candidate, model, replace(context, progress=told))
    return candidate, [line for line in told.said if "passes in" in line]


def test_products_are_rounded_and_sums_are_not() -> None:
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    values = torch.randn(4, 64, generator=draw)
    seen = Moments.empty(64)
    layer.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0]))
    with torch.no_grad(), computing("bfloat16"):
        found = full_precision((layer(values), None, values))
    assert isinstance(found, tuple)
    assert found[0].dtype == found[2].dtype == torch.float32
    wanted = (values.bfloat16().double() @ layer.weight.bfloat16().double().t()).float()
    torch.testing.assert_close(found[0], wanted, rtol=2**-8, atol=1e-6)
    assert not torch.equal(found[0], values @ layer.weight.t())
    torch.testing.assert_close(seen.second_II, values.t() @ values / 4)  # what is observed was not rounded
    with computing("float32"):
        assert (values @ values.t()).dtype == torch.float32
    assert allowed_drift(1e-2) == pytest.approx(1e-4)


@pytest.mark.usefixtures("native")
def test_bfloat16_is_taken_where_rounding_is_far_coarser_and_refused_where_it_is_not() -> None:
    coarse, near = swept(Gptq(bits=3, group_size=16, targets=("q", "k", "v", "o", "up", "gate", "down")))
    assert len(near) == 4
    assert all("passes in bfloat16" in line for line in near)
    _, said = swept(Gptq(bits=8, group_size=16, targets=("q", "k", "v", "o", "up", "gate", "down")))
    assert all("passes in float32" in line for line in said)
    exact, said = swept(Gptq(bits=3, group_size=16, targets=("q", "k", "v", "o", "up", "gate", "down"),
                             calibration_dtype="float32"))  # fmt: skip
    assert all("passes in float32" in line for line in said)
    assert not same(coarse, exact)
    assert errors(near) == pytest.approx(errors(said), rel=0.1)  # codes differ here and there, what they cost does not


def errors(said: list[str]) -> list[float]:
    return [float(line.split(": error ")[1].split()[0]) for line in said]


def test_without_native_products_everything_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_precision, "multiplies_bf16", lambda: False)
    _, said = swept(Gptq(bits=3, group_size=16))
    assert all("passes in float32" in line for line in said)
    _, said = swept(Gptq(bits=8, group_size=16, calibration_dtype="bfloat16"))  # as told
    assert all("passes in bfloat16" in line for line in said)


@pytest.mark.usefixtures("native")
def test_what_was_chosen_is_remembered(tmp_path: Path) -> None:
    class Stopping(Gptq):
        def solve(self, block: Any) -> None:
            if block.name == "model.layers.2":
                raise KeyboardInterrupt
            super().solve(block)

        def entry(self) -> dict[str, Any]:
            return Gptq(bits=3, group_size=16).entry()

    straight, _ = swept(Gptq(bits=3, group_size=16))
    with Run(tmp_path, {"verb": "test"}) as run, pytest.raises(KeyboardInterrupt):
        swept(Stopping(bits=3, group_size=16), run)
    with Run(tmp_path, {"verb": "test"}) as run:
        candidate, said = swept(Gptq(bits=3, group_size=16), run)
    assert len(said) == 2
    assert same(candidate, straight)


@pytest.mark.usefixtures("native")
def test_a_block_that_cannot_be_computed_in_bfloat16_is_not() -> None:
    candidate, model, context = opened()

    def scatters(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        # as code does that makes room in one dtype and fills it with another
        return torch.zeros_like(output).float().index_add_(0, torch.tensor([0]), output)

    for layer in candidate.module.model.layers:  # type: ignore[union-attr]
        layer.mlp.down_proj.register_forward_hook(scatters)
    told = Told()
    with pytest.raises(RuntimeError), torch.no_grad(), computing("bfloat16"):
        candidate.module(torch.ones(1, 3, dtype=torch.long))
    step = Gptq(bits=3, group_size=16, targets=("q", "k", "v", "o", "up", "gate", "down"))
    step.apply(candidate, model, replace(context, progress=told))
    assert sum("passes in float32" in line for line in told.said) == 4


def test_outputs_without_a_residual_sum_are_handed_on_in_float32() -> None:
    assert isinstance(widened := full_precision(torch.ones(2, dtype=torch.bfloat16)), Tensor)
    assert widened.dtype == torch.float32
