"""What a forecast counts is what a real run leaves on the disk, and what does not fit is refused before it is begun."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import api
from gossamer.errors import GoalError, RunError, TechniqueError
from gossamer.goal import parse_goal
from gossamer.measure.memory import resident_bytes
from gossamer.models.candidate import Candidate
from gossamer.plan import flow, forecast
from gossamer.plan.candidates import Steps
from gossamer.plan.forecast import SURE, Forecaster, check_forecast, check_time
from gossamer.plan.job import Job
from gossamer.plan.menu import Menu
from gossamer.plan.predict import Tables
from gossamer.plan.rates import Rates, _measure, measured_rates
from gossamer.plan.records import Forecast
from gossamer.plan.search import too_long
from gossamer.recipe import Recipe
from gossamer.run.journal import read_journal
from gossamer.tasks.base import Arrays
from gossamer.techniques.base import Technique
from gossamer.techniques.distill.distill import Distill
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.registry import recipe_of

pytestmark = pytest.mark.timeout(300)

SWEEP: tuple[Technique, ...] = (
    Gptq(bits=4, group_size=32, ignore=("classifier",)),
    Quantize(targets=("embedding",)),
)


@pytest.fixture
def rates(job: Job) -> Rates:
    return measured_rates(job)


def test_rates_are_measured_once_and_make_sense(job: Job, rates: Rates) -> None:
    assert measured_rates(job) == rates
    assert [entry["kind"] for entry in job.run.journal() if entry["event"] == "finished"].count("rates") == 1
    assert 1e8 < rates.macs_per_second < 1e14
    assert 0 < rates.open_seconds < 60
    assert 0 < rates.pass_seconds < 1
    assert rates.base_bytes == pytest.approx(resident_bytes(), rel=0.5)
    hidden, classes, longest = 64, 3, max(batch.inputs["input_ids"].size for batch in job.evaluation)
    assert rates.block_bytes == pytest.approx(4 * hidden)  # of one token between two blocks, float32
    assert rates.output_bytes >= 4 * classes / longest


def test_a_pass_that_was_disturbed_does_not_decide(job: Job, rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, plain = itertools.count(), Job.computed

    def computed(self: Job, candidate: Candidate, inputs: Sequence[Arrays]) -> Iterator[Arrays]:
        if next(passes) % 4:  # most of each batch's
            time.sleep(0.3)
        return plain(self, candidate, inputs)

    monkeypatch.setattr(Job, "computed", computed)
    found = _measure(job, job.run.folder)
    assert next(passes) == 12
    assert found.pass_seconds * max(batch.inputs["input_ids"].size for batch in job.evaluation) < 0.15
    assert found.pass_seconds < 20 * rates.pass_seconds


def test_a_sweep_has_its_stages_and_costs_more_with_more_rows(job: Job, rates: Rates) -> None:
    found = Forecaster(job, rates).of(SWEEP, covered=True)
    assert [stage.name for stage in found.stages] == [
        "open", "original", "observe", "solve", "pass on", "round", "compare", "write", "prove", "publish",
    ]  # fmt: skip
    assert found.memory_bytes == max(stage.memory_bytes for stage in found.stages)
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages), abs=0.1)
    assert len(found.coverage) == len(job.model.layers)
    assert found.refusal == ""
    fewer = Forecaster(replace(job, calibration=job.calibration[:8]), rates).of(SWEEP)
    seconds = {stage.name: stage.seconds for stage in found.stages}
    for stage in fewer.stages:
        assert stage.seconds <= seconds[stage.name]
    assert fewer.disk_bytes < found.disk_bytes
    plain = Forecaster(job, rates).of((Quantize(),))
    assert not {"observe", "solve", "pass on"} & {stage.name for stage in plain.stages}
    assert plain.memory_bytes <= found.memory_bytes


@pytest.mark.slow
def test_the_run_folder_holds_about_what_was_forecast(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any], job: Job, rates: Rates
) -> None:
    out = tmp_path / "build"
    expected = Forecaster(job, rates, where=out).of(SWEEP)
    result = api.apply(recipe_of(SWEEP), tiny / "model", **ask(tiny, runtime="torch", out=out))
    held = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    # json that describes steps is not counted, nor the samples that are gone again
    assert 0.7 * expected.disk_bytes < held < 1.3 * expected.disk_bytes + 200_000
    found = result.tried[0].forecast
    assert found is not None
    assert found.disk_bytes == pytest.approx(expected.disk_bytes, rel=0.01)
    again = api.apply(recipe_of(SWEEP), tiny / "model", **ask(tiny, runtime="torch", out=out)).tried[0].forecast
    assert again is not None
    assert again.disk_bytes < 0.4 * found.disk_bytes  # what is there need not be made
    assert not {"original", "observe", "solve"} & {stage.name for stage in again.stages}
    assert again.seconds < found.seconds


def started(out: Path) -> set[str]:
    """Return the kinds of steps that a run has begun."""
    return {entry["kind"] for entry in read_journal(out / "journal.jsonl") if entry["event"] == "started"}


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let the disk have so many bytes free, as forecasts see it."""
    usage = forecast.shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: usage)


def test_apply_refuses_what_the_disk_cannot_hold_before_anything_is_made(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, 100_000)
    with pytest.raises(RunError, match=r"needs about .* under .*build; 100 kB are free") as caught:
        api.apply(recipe_of(SWEEP), tiny / "model", **ask(tiny, runtime="torch", out=tmp_path / "build"))
    assert "--out" in caught.value.hint
    assert started(tmp_path / "build") == {"rates"}


def test_what_memory_cannot_hold_whole_is_read_piece_by_piece(job: Job, rates: Rates) -> None:
    whole = Forecaster(job, rates).of(SWEEP)
    tight = replace(job, memory=whole.memory_bytes - 1)
    chosen, found = flow.fitting(tight, None, SWEEP)
    assert chosen.budget is not None
    assert found.streamed
    assert found.memory_bytes < whole.memory_bytes
    assert flow.fitting(replace(job, memory=1 << 40), None, SWEEP)[0].budget is None
    # a latency can only be measured of a model that is opened whole
    assert flow.fitting(tight, parse_goal("latency <= 50%"), SWEEP)[0].budget is None


def test_memory_that_holds_neither_is_refused_with_both_numbers(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any]
) -> None:
    given = ask(tiny, runtime="torch", out=tmp_path / "build", memory=resident_bytes() // 2)
    with pytest.raises(TechniqueError, match=r"needs about \d+\.\d GiB .*\d+\.\d GiB may be used") as caught:
        api.apply(recipe_of(SWEEP), tiny / "model", **given)
    assert "--memory" in caught.value.hint


@pytest.mark.parametrize(
    ("worst", "fewer_rows"), [("original", False), ("prove", False), ("observe", True), ("solve", True)]
)
def test_fewer_calibration_rows_are_advised_where_they_take_the_memory(
    job: Job, rates: Rates, worst: str, fewer_rows: bool
) -> None:
    found = Forecaster(replace(job, memory=1), rates).of(SWEEP)
    stages = [stage.model_copy(update={"memory_bytes": 2 if stage.name == worst else 1}) for stage in found.stages]
    with pytest.raises(TechniqueError, match="gptq needs about") as caught:
        check_forecast(found.model_copy(update={"stages": tuple(stages)}), "gptq")
    assert "--memory" in caught.value.hint
    assert ("calibration rows" in caught.value.hint) is fewer_rows


def test_a_gpu_has_figures_of_its_own_and_what_does_not_fit_there_is_refused(
    job: Job, rates: Rates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))
    there = replace(job, device=torch.device("cuda", 0))
    found, on_cpu = Forecaster(there, rates).of(SWEEP), Forecaster(job, rates).of(SWEEP)
    assert found.refusal == ""
    assert (found.device, on_cpu.device) == ("cuda:0", "cpu")
    assert found.device_limit == int(0.9 * (1 << 30))
    taken = {stage.name: stage.device_bytes for stage in found.stages if stage.device_bytes}
    assert taken.keys() == {"observe", "solve", "pass on"}
    assert found.device_bytes == max(taken.values())
    assert taken["pass on"] < taken["observe"]  # the same, without moments
    assert (on_cpu.device_bytes, on_cpu.device_limit) == (0, 0)
    assert on_cpu.memory_bytes == found.memory_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 27, 2 << 30))
    refused = Forecaster(there, rates).of(SWEEP)
    assert re.fullmatch(
        r"needs about 0\.[23] GiB on cuda:0 \((observe|solve)\); 0\.1 GiB may be used there", refused.refusal
    )
    with pytest.raises(TechniqueError, match=r"gptq needs about .*\nhint: .*--device cpu"):
        check_forecast(refused, "gptq")


def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for verb in (partial(api.apply, Recipe.from_yaml("- gptq: {}", "a test")), partial(api.plan, goal="size <= 50%")):
        with pytest.raises(RunError, match=r"--device cuda: torch .* sees no GPU here"):
            verb(tiny / "model", device="cuda", **ask(tiny, out=tmp_path / "build"))
    assert not (tmp_path / "build").exists()


def test_check_forecast_says_nothing_of_what_fits(job: Job, rates: Rates) -> None:
    found = Forecaster(job, rates).of(SWEEP)
    assert found.refusal == ""
    check_forecast(found, "gptq")  # raises nothing


# ---------------------------------------------------------------- plan


@pytest.mark.slow
def test_a_recipe_is_planned_without_measuring_quality(tiny: Path, tmp_path: Path, ask: Callable[..., Any]) -> None:
    out = tmp_path / "build"
    plan = api.plan(tiny / "model", **ask(tiny, recipe=recipe_of(SWEEP), runtime="torch", out=out))
    assert plan.original is None
    (one,) = plan.candidates
    assert one.forecast is not None
    assert one.forecast.coverage
    assert one.predicted.size_bytes > 0
    assert started(out) <= {"rates", "gain"}
    assert any("calibration" in sentence for sentence in plan.calibration)
    # apply with the same arguments goes on in the same folder
    result = api.apply(recipe_of(SWEEP), tiny / "model", **ask(tiny, runtime="torch", out=out))
    assert result.verdict == "PASS"


def test_a_plan_marks_what_takes_longer_than_there_is_time(tiny: Path, ask: Callable[..., Any]) -> None:
    plan = api.plan(tiny / "model", **ask(tiny, recipe=recipe_of(SWEEP), runtime="torch", time_budget=1.0))
    assert plan.candidates[0].rejected.startswith("it is predicted to take ")
    assert plan.candidates[0].rejected.endswith("; 1 s are left")


def test_a_plan_wants_a_goal_or_a_recipe(tiny: Path, ask: Callable[..., Any]) -> None:
    with pytest.raises(GoalError, match="a goal or a recipe"):
        api.plan(tiny / "model", **ask(tiny))


# ---------------------------------------------------------------- optimize


@pytest.mark.slow
def test_optimize_leaves_out_what_does_not_fit_and_says_why(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Forecaster.of

    def of(self: Forecaster, steps: Any, **more: Any) -> Forecast:
        found = real(self, steps, **more)
        needs_rows = any(step.rows_needed() for step in steps)
        return found.model_copy(update={"refusal": "needs more than there is"}) if needs_rows else found

    monkeypatch.setattr(Forecaster, "of", of)
    given = ask(tiny, goal="quality >= 97%, size <= 40%", runtime="torch", out=tmp_path / "build")
    given["calibration_rows"] = 40  # enough for gptq to be proposed
    result = api.optimize(tiny / "model", **given, max_candidates=1)
    assert result.tried
    assert not any("gptq" in tried.name for tried in result.tried)
    assert "block" not in started(tmp_path / "build")  # nothing was spent on them


def test_a_search_without_time_for_one_candidate_says_so_before_it_begins(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any]
) -> None:
    given = ask(tiny, goal="quality >= 97%, size <= 40%", runtime="torch", out=tmp_path / "build")
    with pytest.raises(RunError, match=r"^a search .* \d+ s to measure the original, .* 0 s are left") as bad:
        api.optimize(tiny / "model", **given, time_budget=0.5)
    assert "--time" in bad.value.hint
    assert started(tmp_path / "build") == {"rates"}


def test_what_every_search_takes_is_counted_without_what_is_finished(
    job: Job, rates: Rates, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecaster = Forecaster(job, rates)
    everything = forecaster.of(()).seconds
    check_time(forecaster, everything)
    check_time(forecaster, SURE * everything)  # predictions miss
    with pytest.raises(RunError, match="to measure the original"):
        check_time(forecaster, SURE * everything - 1)
    monkeypatch.setattr(job.run, "journal", lambda: [{"event": "finished", "kind": "original"}])
    left = forecaster.of(()).seconds
    assert left < everything
    with pytest.raises(RunError, match=rf"^a search .* at least {left:.0f} s: {left:.0f} s to write"):
        check_time(forecaster, SURE * left - 1)


@pytest.mark.slow
def test_a_search_that_spent_its_time_begins_nothing_and_names_the_time(
    tiny: Path, tmp_path: Path, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "check_time", lambda *_: None)  # as if the time had gone into looking
    given = ask(tiny, goal="quality >= 97%, size <= 40%", runtime="torch", out=tmp_path / "build")
    result = api.optimize(tiny / "model", **given, time_budget=0.5)
    assert (result.verdict, result.tried, result.artifact) == ("FAIL", (), None)
    assert "is predicted to take" in result.reason
    assert "0 s are left" in result.reason
    assert all(one.rejected for one in result.not_tried)
    assert api.report(tmp_path / "build").exists()


def test_the_menu_asks_before_it_profiles(job: Job, tables: Tables) -> None:
    recipes: list[Steps] = [(Quantize(),), (Quantize(bits=7),)]
    real, goal = replace(tables, model=job.model), parse_goal("quality >= 1%")
    menu = Menu(job, goal, real, recipes, lambda _: "is too much")
    assert not menu.next_wave()
    assert menu.left_out == dict.fromkeys(recipes, "is too much")
    assert menu.open == []


def test_too_long() -> None:
    assert too_long(10.0, 10.0) == ""
    assert too_long(61.4, 60.0) == "is predicted to take 61 s; 60 s are left"
    assert too_long(5.0, -3.0) == "is predicted to take 5 s; 0 s are left"


def test_a_step_that_trains_has_a_stage_of_its_own(job: Job, rates: Rates) -> None:
    learning = replace(job, rows=replace(job.rows, others=job.rows.calibration * 10))
    forecaster = Forecaster(learning, rates)
    seconds = {stage.name: stage.seconds for stage in forecaster.of((Distill(epochs=2),)).stages}
    assert "train" in seconds
    assert "round" not in seconds
    longer = {stage.name: stage.seconds for stage in forecaster.of((Distill(epochs=4),)).stages}
    assert longer["train"] == pytest.approx(2 * seconds["train"], abs=0.02)  # rounded
    behind = (Prune(what="layers", remove=1), Distill(epochs=4))
    shorter = {stage.name: stage.seconds for stage in forecaster.of(behind).stages}
    assert shorter["train"] < 0.95 * longer["train"]


def test_training_what_little_is_left_takes_less(job: Job) -> None:
    cut = Prune(what="layers", remove=1)
    left = cut.after(job.model).macs / job.model.macs
    passes = Distill(epochs=2).model_passes(100, left)
    assert left < 0.7
    assert passes == pytest.approx(100 * 2 * (1 + 3 * left))  # the original passes all of it
    assert Distill(epochs=2, hidden=0).model_passes(100, left) == pytest.approx(100 * (1 + 2 * 3 * left))  # once
