"""A model with experts from recipe to proof: whole and piece by piece, its report, and what is refused beforehand."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gossamer.errors import RuntimeUnavailable
from gossamer.goal import parse_goal
from gossamer.models.experts import take_apart
from gossamer.models.structure import map_model
from gossamer.plan import budget
from gossamer.plan.comparison import compare_tensors
from gossamer.plan.flow import apply_run, make_tables, proposals
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.plan.profile import profile
from gossamer.plan.proof import apply_steps
from gossamer.report.html import write_report
from gossamer.run.workspace import Run
from gossamer.runtimes import get_runtime
from gossamer.runtimes.base import StoredTensor
from gossamer.techniques.base import SearchSpace, Technique
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.registry import recipe_of

TINY = runpy.run_path(str(Path(__file__).parents[1] / "models" / "tiny_experts.py"))
TEXTS = ["the grid holds every weight of a group", "a code is the nearest one on the grid", "what was proven is served"]
ROWS = [{"text": f"{number}: {text}, and {text} again"} for number in range(12) for text in TEXTS]
STEPS = (Gptq(bits=4, group_size=16, symmetric=True), Quantize(targets=("embedding",)))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = TINY["saved"](TINY["mixtral"](), tmp_path_factory.mktemp("mixtral"))
    return folder


def inputs_of(speaker: Path, runtime: str = "torch") -> Inputs:
    return Inputs(model=speaker, task="causal-lm", data=ROWS, runtime=runtime, task_settings={"context": 48},
                  threads=1, calibration_rows=16)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)  # four processes are started, one after another
def test_experts_are_rounded_proven_and_reported_whole_and_piece_by_piece(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(speaker)
    (tmp_path / "whole").mkdir()
    with Run(tmp_path / "run", {"verb": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        assert job.budget is None
        candidate, _ = apply_steps(job, STEPS)
        job.runtime.write(candidate, tmp_path / "whole", job.request())
    monkeypatch.setattr(budget, "WHOLE_COPIES", 1e9)
    monkeypatch.setattr(budget, "LEAST_BUDGET", 0)
    monkeypatch.setattr(budget, "SHARE_OF_WEIGHTS", 0.0)
    found = apply_run(inputs, recipe_of(STEPS), parse_goal("size <= 60%"), tmp_path / "pieces", fresh=False)
    assert found.verdict == "PASS", found.reason
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / "artifact" / name).read_bytes()
    measured, forecast = found.tried[0].measured, found.tried[0].forecast
    assert measured is not None
    assert forecast is not None
    covered = {row.module: row for row in forecast.coverage}
    assert sum("expert_" in row.role and row.done == "gptq int4 symmetric group 16" for row in covered.values()) == 24
    assert covered["model.layers.1.mlp.gate"].done == ""
    expected = next(part.bytes for part in forecast.disk if part.what == "the artifact")
    beside = sum(path.stat().st_size for path in speaker.iterdir() if path.suffix != ".safetensors")
    held = sum(row.bytes for row in measured.tensors)
    assert held < expected <= held + beside
    assert measured.equivalence.passed
    assert measured.equivalence.change > 1e-3
    expert = next(row for row in measured.tensors if row.parameter == "model.layers.0.mlp.experts.2.w1.weight")
    assert (expert.found, expert.agrees, expert.role) == ("int4 symmetric group 16", True, "expert_gate")
    assert [one.name for one in found.tried[0].experts] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    tokens = {sum(one.tokens) for one in found.tried[0].experts}
    assert len(tokens) == 1  # two for each token, whichever block
    assert tokens.pop() > 0
    report = json.loads((tmp_path / "pieces" / "report.json").read_text())
    assert report["tried"][0]["experts"][0]["tokens"] == list(found.tried[0].experts[0].tokens)
    assert "Did each expert see enough?" in write_report(tmp_path / "pieces").read_text()


def test_fewer_experts_are_proposed_for_a_bound_on_parameters(speaker: Path, tmp_path: Path) -> None:
    long = [{"text": " and ".join(f"{number}: {text}" for text in TEXTS * 2)} for number in range(40)]
    inputs = replace(inputs_of(speaker), data=long, calibration_rows=40)
    goal, prepared = parse_goal("params <= 80%, quality >= 50%"), prepare(inputs)
    assert len(prepared.calibration) < 32, "as many as cuts are chosen by are there as windows, not as rows"
    with Run(tmp_path / "run", {"verb": "test"}) as run, opened_job(inputs, prepared, run) as job:
        assert len(job.calibration) == 40
        found, _ = proposals(job, goal, make_tables(job, goal)[0])
        cuts = {step.label() for steps in found for step in steps if isinstance(step, Prune)}
        assert {"prune experts to 75% by activation", "prune experts to 50% by activation"} <= cuts


def test_what_cannot_hold_experts_is_refused_before_anything_is_measured(speaker: Path, tmp_path: Path) -> None:
    inputs = inputs_of(speaker, "torchscript")
    with (
        pytest.raises(RuntimeUnavailable, match=r"torchscript cannot hold .*4 experts"),
        Run(tmp_path / "torchscript", {"verb": "test"}) as run,
        opened_job(inputs, prepare(inputs), run),
    ):
        pass
    two_grids = (Gptq(bits=4, group_size=16, symmetric=True, bits_of=((3, ("expert_down",)),)),)
    with pytest.raises(RuntimeUnavailable, match="one grid, the recipe has 2"):
        apply_run(inputs_of(speaker), recipe_of(two_grids), None, tmp_path / "two", fresh=False)
    with pytest.raises(RuntimeUnavailable, match="zero points"):
        apply_run(inputs_of(speaker), recipe_of((Gptq(group_size=16),)), None, tmp_path / "zeros", fresh=False)
    assert not any((tmp_path / "two").glob("steps/*"))


def test_the_planner_proposes_grids_that_experts_can_have(speaker: Path, tmp_path: Path) -> None:
    inputs = inputs_of(speaker)
    with Run(tmp_path / "run", {"verb": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        space = SearchSpace(job.model, get_runtime("torch"), job.task, calibration_rows=64)
        proposed: list[tuple[Technique, ...]] = [*Quantize.candidates(space), *Gptq.candidates(space)]
        decisions = [d for steps in proposed for step in steps for d in step.resolve(job.model)]
        of_experts = [d.weight for d in decisions if d.layer.role.startswith("expert_") and d.weight is not None]
        assert {spec.bits for spec in of_experts} >= {8, 4}
        assert all(spec.symmetric for spec in of_experts)


def test_a_layer_in_a_stack_of_floats_counts_its_part_of_the_bytes() -> None:
    network = TINY["mixtral"]()
    take_apart(network)
    job: Any = SimpleNamespace(model=map_model(network, {"input_ids": TINY["ids"]()}))
    stacks = [
        StoredTensor(f"model.layers.{i}.mlp.experts.{name}", "bfloat16", 16, None, True, shape, 2 * 4 * rows * 32)
        for i in range(2)
        for name, shape, rows in (("gate_up_proj", (4, 96, 32), 96), ("down_proj", (4, 32, 48), 48))
    ]
    rows = {row.parameter: row for row in compare_tensors(job.model, [], stacks)}
    for name, shape in (("w1", (48, 32)), ("w3", (48, 32)), ("w2", (32, 48))):
        row = rows[f"model.layers.1.mlp.experts.3.{name}.weight"]
        assert (row.found, row.bytes, row.shape, row.agrees) == ("bfloat16", 2 * 48 * 32, shape, True)
    assert sum(row.bytes for row in rows.values()) == sum(stack.bytes for stack in stacks)


def test_effects_are_measured_on_a_spread_of_the_calibration_rows(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(speaker)
    with Run(tmp_path / "run", {"verb": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        monkeypatch.setattr(type(job.task), "profile_samples", 3)
        assert len(job.profiled) == 3 < len(job.calibration)
        step = Quantize(bits=4, group_size=16)
        effect = profile(job, [step]).effects[step]
        assert 0 < effect.kl < 10
