"""The flows behind `plan`, `optimize` and `apply`: measure the original, profile, predict, search or prove, publish."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gossamer.errors import DataError, GoalError, RunError, RuntimeUnavailable, TechniqueError
from gossamer.goal import Goal
from gossamer.judgement import Verdict
from gossamer.measure.machine import stamp
from gossamer.plan.allocation import mixed_recipes
from gossamer.plan.budget import check_fits, memory_limit, memory_of_one, whole_bytes
from gossamer.plan.candidates import Steps, name_of, recipes, rounds_twice
from gossamer.plan.forecast import Forecaster, check_forecast, check_time
from gossamer.plan.job import Job
from gossamer.plan.original import describe_original, unchanged_artifact
from gossamer.plan.predict import Tables
from gossamer.plan.prepare import Inputs, Prepared, identity, opened_job, piece_by_piece, prepare, with_runtime
from gossamer.plan.profile import profile
from gossamer.plan.proof import APPLY, apply_steps, package_versions, refused_by, steps_recipe
from gossamer.plan.proposed_cuts import SolvedCuts, cuts_solved_for
from gossamer.plan.ranking import time_budget, upper_bounds
from gossamer.plan.rates import measured_rates
from gossamer.plan.records import Forecast, Original, Prediction, Provenance, RunResult
from gossamer.plan.search import Found, Search, prove
from gossamer.plan.settled import settled
from gossamer.recipe import Recipe
from gossamer.run.atomic import publish_folder, readable_bytes, write_text
from gossamer.run.team import Team, assembled, num_processes
from gossamer.run.workspace import Onlooker, Run
from gossamer.runtimes.manifest import MANIFEST
from gossamer.tasks.base import Evaluation
from gossamer.techniques.base import SearchSpace
from gossamer.techniques.registry import resolve

RESULT = "report.json"
ARTIFACT = "artifact"
NUM_NOT_TRIED = 6  # the next most promising; `gossamer plan` lists all


def optimize_run(
    inputs: Inputs, goal: Goal, out: Path, *, fresh: bool, max_candidates: int, time_budget_seconds: float | None
) -> RunResult:
    """Return what a search for the goal found, after publishing its artifact and report.json in `out`."""
    check_alone("optimize")
    began = time.monotonic()
    prepared = prepare(inputs)
    inputs = with_runtime(inputs, prepared, None if fresh else out)
    budget = min((s for s in (time_budget(goal), time_budget_seconds) if s is not None), default=None)
    with (
        Run(out, identity(inputs, prepared, goal=str(goal)), fresh=fresh) as run,
        opened_job(inputs, prepared, run) as job,
    ):
        check_measurable(job, goal)
        deadline = math.inf if budget is None else began + budget
        forecaster = Forecaster(job, measured_rates(job))
        check_time(forecaster, deadline - time.monotonic())
        tables, reference = make_tables(job, goal)
        check_time(forecaster, deadline - time.monotonic())
        found, cuts = proposals(job, goal, tables)
        search = Search(job, goal, tables, reference, forecaster, cuts)
        result = search.run(found, max_candidates=max_candidates, deadline=deadline)
        return _published(job, inputs, prepared, "optimize", goal, tables.original, result, began)


def apply_run(inputs: Inputs, recipe: Recipe, goal: Goal | None, out: Path, *, fresh: bool) -> RunResult:
    """Return what one recipe gives, after publishing its artifact and report.json in `out`.

    Without a goal the verdict says whether the file holds and computes what the recipe says. Refuses before anything is
    built what this machine cannot hold. Processes that were started together (torchrun) share the calibrated steps, and
    all return the same result.
    """
    steps: Steps = tuple(resolve(recipe))
    with assembled() as team:
        inputs = replace(inputs, memory=memory_of_one(inputs.memory, team))
        prepared = prepare(inputs)
        if not team.leads:
            return _follow(inputs, prepared, steps, out, team)
        result = _lead(inputs, prepared, steps, goal, out, fresh, team)
        team.everywhere({"result": result.model_dump_json()})
        return result


def _follow(inputs: Inputs, prepared: Prepared, steps: Steps, out: Path, team: Team) -> RunResult:
    """Take part in what the leading process shares out, and return its result."""
    with opened_job(inputs, prepared, Onlooker(out), team) as job:
        while (told := team.everywhere()) == APPLY:
            apply_steps(job, steps)
    return RunResult.model_validate_json(told["result"])


def _lead(
    inputs: Inputs, prepared: Prepared, steps: Steps, goal: Goal | None, out: Path, fresh: bool, team: Team
) -> RunResult:
    began = time.monotonic()
    check_rows(steps, prepared)
    if inputs.data is None and goal is not None and any(part.quantity == "quality" for part in goal.constraints):
        raise DataError("the goal bounds quality, but there are no rows to measure it on", "give rows with --data")
    what = {"recipe": steps_recipe(steps), "goal": str(goal) if goal else ""}
    with (
        Run(out, identity(inputs, prepared, **what), fresh=fresh) as run,
        opened_job(inputs, prepared, run, team) as opened,
    ):
        steps = settled(opened, steps)
        check_recipe(opened, steps)
        check_measurable(opened, goal)
        check_fits(opened, steps)
        job, forecast = fitting(opened, goal, steps)
        check_forecast(forecast, name_of(steps))
        job.progress.say(f"predicted: {in_short(forecast)}")
        original, reference = describe_original(job)
        tried, _ = prove(job, goal, steps, _no_prediction(original, forecast.seconds), original, reference)
        tried = tried.model_copy(update={"forecast": forecast})
        job.progress.record("candidates", 1, tried.numbers())
        verdict = Verdict(tried.verdict or "FAIL")
        reason = tried.rejected or "; ".join(judged.why for judged in tried.judgements)
        reason = reason or "the files hold what the recipe says, and compute what was computed in memory"
        if inputs.data is None:
            reason += "; quality was not measured: no rows were given"
        found = Found((tried,), (), 0, verdict, reason)
        return _published(job, inputs, prepared, "apply", goal, original, found, began)


def check_alone(verb: str) -> None:
    """Raise RunError when several processes were started for what one does."""
    if num_processes() > 1:
        raise RunError(
            f"`{verb}` works in one process, {num_processes()} were started",
            "start it without torchrun; several processes can `apply` a recipe",
        )


def check_rows(steps: Steps, prepared: Prepared) -> None:
    """Raise DataError when a recipe needs more calibration rows than there are."""
    needed = max((step.rows_needed() for step in steps), default=0)
    if len(prepared.calibration) < needed:
        raise DataError(
            f"the recipe needs {needed} calibration rows, {len(prepared.calibration)} are there",
            "give more rows with --data",
        )


def check_recipe(job: Job, steps: Steps) -> None:
    """Raise TechniqueError or RuntimeUnavailable for a recipe that the model or its runtime cannot take."""
    if twice := rounds_twice(steps, job.model):
        raise TechniqueError(
            f"{len(twice)} parameters are rounded by two steps: {', '.join(twice[:3])}",
            "name them under `ignore` in one of the two steps",
        )
    refusal = refused_by(job.runtime, job.model, steps)
    if refusal is not None:
        raise RuntimeUnavailable(
            f"{job.runtime.name} cannot hold the recipe: {refusal}",
            "name the layer under `ignore`, or use another --runtime",
        )


def fitting(job: Job, goal: Goal | None, steps: Steps, where: Path | None = None) -> tuple[Job, Forecast]:
    """Return what a recipe will take, with the model opened whole or, where only that can be held, piece by piece."""
    found = Forecaster(job, measured_rates(job), where=where).of(steps, covered=True)
    # processes that work together have all opened the model as this one has
    if found.memory_bytes <= found.memory_limit or bounds_untimed(goal) or job.team.size > 1:
        return job, found
    smaller = piece_by_piece(job)
    if smaller is None:
        return job, found
    again = Forecaster(smaller, measured_rates(smaller), where=where).of(steps, covered=True)
    if again.memory_bytes >= found.memory_bytes:
        return job, found
    job.progress.say(f"{job.source.name} is read piece by piece: opened whole, {name_of(steps)} {found.refusal}")
    return smaller, again


def in_short(found: Forecast) -> str:
    """Write a forecast in one line."""
    return (
        f"about {round(found.seconds)} s, {found.memory_bytes / 2**30:.1f} GiB of memory, "
        f"{readable_bytes(found.disk_bytes)} on disk"
    )


def bounds_untimed(goal: Goal | None) -> list[str]:
    """Return a goal's bounds and objective on what is not measured of a model that is read piece by piece."""
    untimed = ("latency", "throughput", "memory")
    bounds = [str(part) for part in goal.constraints if part.quantity in untimed] if goal is not None else []
    if goal is not None and goal.objective is not None and goal.objective.quantity in untimed:
        bounds.append(str(goal.objective))
    return bounds


def check_measurable(job: Job, goal: Goal | None) -> None:
    """Raise GoalError for a bound on what is not measured of a model that is read piece by piece."""
    bounds = bounds_untimed(goal)
    if job.budget is not None and bounds:
        whole, limit = whole_bytes(job.source) / 2**30, memory_limit(job.memory) / 2**30
        raise GoalError(
            f"`{bounds[0]}` cannot be measured: {job.source.name} needs about {whole:.1f} GiB to be opened whole, "
            f"{limit:.1f} GiB may be used, so it is read piece by piece",
            f"raise --memory to {whole:.1f}GiB, or leave the bound out and measure the artifact where it fits with "
            "`gossamer bench`",
        )


def make_tables(job: Job, goal: Goal) -> tuple[Tables, Evaluation]:
    """Return the tables that predictions are made from, with no step profiled yet, and the original's scores."""
    original, reference = describe_original(job)
    assert reference is not None  # `plan` and `optimize` cannot be asked without rows
    assert original.metric is not None
    goal.check_metric(job.task.metric.name, job.task.metric.higher_is_better, original.metric.value)
    # a model that is read piece by piece is not timed, and the folder itself is what would be written
    unchanged_memory = 0 if job.budget is not None else unchanged_artifact(job)[1]["memory"]
    tables = Tables(
        model=job.model,
        runtime=job.runtime,
        original=original,
        profile=profile(job, ()),
        likelihood_metric=not job.task.metric.higher_is_better,
        unchanged_memory=unchanged_memory,
        proof_seconds=_proof_seconds(job),
        float_bytes=_float_bytes(job),
    )
    return tables, reference


def _float_bytes(job: Job) -> dict[str, int]:
    """Return the bytes of a value of each weight that the runtime leaves as the user's folder holds it."""
    stored = {layer.name: job.source.stored_dtype(f"{layer.name}.weight") for layer in job.model.layers}
    narrow = (torch.float16, torch.bfloat16)
    return {f"{name}.weight": 2 for name, dtype in stored.items() if dtype in narrow and job.runtime.keeps_16_bits}


def proposals(job: Job, goal: Goal, tables: Tables) -> tuple[list[Steps], SolvedCuts]:
    """Return the recipes that there are to choose from for this goal, and what solves cuts where none of them does."""
    bounds = upper_bounds(goal, tables.original)
    space = replace(_space(job, goal), bounds=bounds)

    def held(steps: Steps) -> bool:  # what a technique proposes fits layer by layer; experts are held together
        return not job.model.experts or refused_by(job.runtime, job.model, steps) is None

    others = recipes(space, lambda step: not cuts_solved_for(step))
    cuts = SolvedCuts(job, goal, tables, space, others, partial(recipes, space), held)
    found = [*cuts.without, *mixed_recipes(job, goal, tables, space)]
    return list(filter(held, found)), cuts


def _space(job: Job, goal: Goal) -> SearchSpace:
    """Return what techniques look at when they propose something for a goal."""
    wanted: set[str] = {part.quantity for part in goal.constraints}
    if goal.objective is not None:
        wanted.add(goal.objective.quantity)
    return SearchSpace(job.model, job.runtime, job.task, len(job.calibration), frozenset(wanted))


def _proof_seconds(job: Job) -> float:
    """Return what it took to write, score and time the original: a candidate takes about as long."""
    kinds = ("original", "unchanged", "unchanged-timed")
    finished = {entry["kind"]: entry for entry in job.run.journal() if entry["event"] == "finished"}
    return float(sum(finished[kind].get("seconds", 0.0) for kind in kinds if kind in finished))


def _no_prediction(original: Original, seconds: float = 0.0) -> Prediction:
    """Return the prediction of a recipe that was not profiled: the original's own figures, and the time."""
    return Prediction(
        quality_share=1.0,
        kl=0.0,
        size_bytes=original.size_bytes,
        latency_seconds=original.latency.p50,
        latency_share=1.0,
        memory_bytes=original.memory_bytes,
        seconds=seconds,
    )


def _published(
    job: Job,
    inputs: Inputs,
    prepared: Prepared,
    kind: Literal["optimize", "apply"],
    goal: Goal | None,
    original: Original,
    found: Found,
    began: float,
) -> RunResult:
    """Put the chosen artifact and report.json in place, and return the result."""
    out = job.run.folder
    artifact = None
    if found.chosen is not None:
        artifact = out / ARTIFACT
        publish_folder(out / found.tried[found.chosen].folder, artifact, marker=MANIFEST)
    result = RunResult(
        kind=kind,
        goal=str(goal) if goal else "",
        goal_in_words=goal.describe() if goal else [],
        verdict=found.verdict.value,
        reason=found.reason,
        metric_name=job.task.metric.name,
        original=original,
        tried=found.tried,
        not_tried=found.not_tried[:NUM_NOT_TRIED],
        chosen=found.chosen,
        artifact=str(artifact) if artifact else None,
        load_snippet=job.runtime.load_snippet(job.task) + (job.runtime.load_more(artifact) if artifact else ""),
        notes=job.runtime.notes(artifact, job.model) if artifact else (),
        provenance=_provenance(job, inputs, prepared),
        rows={"calibration": len(prepared.calibration), "evaluation": len(prepared.evaluation)},
        seconds=round(time.monotonic() - began, 3),
    )
    write_text(out / RESULT, result.model_dump_json(indent=1) + "\n")
    job.run.record("finished-run", verdict=found.verdict.value, reason=found.reason)
    return result


def _provenance(job: Job, inputs: Inputs, prepared: Prepared) -> Provenance:
    return Provenance(
        model=prepared.source.name,
        model_fingerprint=prepared.prints["model"],
        data=prepared.names["data"],
        data_fingerprint=prepared.prints["data"],
        evaluation=prepared.names["evaluation"],
        evaluation_fingerprint=prepared.prints["evaluation"],
        task=inputs.task,
        task_settings=dict(inputs.task_settings),
        runtime=job.runtime.name,
        seed=inputs.seed,
        versions=package_versions(),
        machine=_plain(stamp().model_dump(mode="json")),
        command=" ".join(sys.argv),
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in values.items()}
