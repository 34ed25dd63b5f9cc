"""The verbs, as functions: the whole story on one page.

inspect   what a model is and what can be done to it
plan      what each recipe is predicted to reach
optimize  from a goal to a proven artifact
apply     one explicit recipe to a proven artifact
evaluate  an artifact's quality with its interval
bench     an artifact's latency, throughput and memory, alone or in turns with another
compare   two artifacts on the same rows, in pairs
report    the page that shows what a run found
doctor    what this machine can do
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.errors import GoalError
from gossamer.goal import parse_goal
from gossamer.measure.machine import Doctor
from gossamer.measure.machine import doctor as examine_machine
from gossamer.models.inspect import ModelCard, describe
from gossamer.models.source import Forward, Source
from gossamer.plan import flow, opened, planned
from gossamer.plan.opened import BenchResult, CompareResult, EvalResult
from gossamer.plan.prepare import Inputs, Rows
from gossamer.plan.records import PlanResult, RunResult
from gossamer.recipe import Recipe, load
from gossamer.report.card import render_card
from gossamer.report.html import write_report
from gossamer.run.atomic import write_text
from gossamer.run.progress import Progress, Silent
from gossamer.run.team import started_rank
from gossamer.run.tracking import tracked
from gossamer.runtimes.manifest import CARD

Model = str | Path | nn.Module


def inspect(model: Model, *, trust_remote_code: bool = False) -> ModelCard:
    """Describe a model: modules by role, parameters, bytes, multiply-accumulates, blocks, what can be done to it.

    Raises ModelError when it cannot be opened.

    >>> print(inspect("./my-bert").num_parameters)  # doctest: +SKIP
    """
    return describe(Source.open(model, trust_remote_code=trust_remote_code))


def plan(
    model: Model,
    *,
    task: str,
    data: Rows,
    goal: str | None = None,
    recipe: Recipe | str | Path | None = None,
    evaluation: Rows | None = None,
    runtime: str | None = None,
    out: str | Path | None = None,
    task_settings: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory: int | None = None,
    device: str = "auto",
    calibration_rows: int = 128,
    evaluation_rows: int | None = None,
    forward: Forward | None = None,
    trust_remote_code: bool = False,
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> PlanResult:
    """Predict what every recipe brings (size, latency, quality) and takes, most promising first. Builds no artifact.

    The first three also say what becomes of each module; all say memory by stage, disk and time. With a `recipe` that
    one is planned; without a goal nothing is measured for it but how fast this machine is. What is measured (the
    original, a table of layer times, the effect of each step on calibration rows) stays in `out` when that is given,
    and `optimize` goes on from there. `time_budget` (seconds) marks what would take longer.

    >>> plan("./my-bert", task="text-classification", data="train.jsonl", goal="size <= 30%")  # doctest: +SKIP
    """
    if goal is None and recipe is None:
        raise GoalError("a plan needs a goal or a recipe", 'for example goal="quality >= 99%, size <= 30%"')
    parsed = parse_goal(goal) if goal else None
    steps = recipe if isinstance(recipe, Recipe) or recipe is None else load(recipe)
    inputs = Inputs(
        model=model,
        task=task,
        data=data,
        evaluation=evaluation,
        runtime=runtime,
        task_settings=task_settings or {},
        columns=columns or {},
        seed=seed,
        threads=threads,
        memory=memory,
        device=device,
        calibration_rows=calibration_rows,
        evaluation_rows=evaluation_rows,
        forward=forward,
        trust_remote_code=trust_remote_code,
        progress=progress or Silent(),
    )
    folder = Path(out) if out is not None else None
    return planned.plan_run(inputs, parsed, folder, recipe=steps, time_budget_seconds=time_budget)


def optimize(
    model: Model,
    *,
    task: str,
    data: Rows,
    goal: str,
    evaluation: Rows | None = None,
    runtime: str | None = None,
    out: str | Path = "build",
    fresh: bool = False,
    max_candidates: int = 8,
    task_settings: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory: int | None = None,
    device: str = "auto",
    calibration_rows: int = 128,
    evaluation_rows: int | None = None,
    forward: Forward | None = None,
    trust_remote_code: bool = False,
    time_budget: float | None = None,
    track: Sequence[str] = (),
    progress: Progress | None = None,
) -> RunResult:
    """Make a model smaller and faster until the goal is proven, and publish the artifact in `out`/artifact.

    `goal` reads like "quality >= 99%, size <= 30%, latency p95 <= 40ms, minimize size" (docs/guides/goals.md). Rows of
    `evaluation` (or a held-out half of `data`) decide; `data` calibrates. Without a `runtime` it is ONNX Runtime, or
    torch for a model that must be read piece by piece. The same call goes on where a killed one
    stopped; `fresh` starts again. `time_budget` (seconds) ends the search. `track` names trackers (tensorboard, wandb,
    mlflow) that are told of losses, candidates and the report. Raises our errors for everything that the user can mend.

    >>> result = optimize("./my-bert", task="text-classification", data="train.jsonl", evaluation="test.jsonl",
    ...                   goal="quality >= 99%, size <= 30%")  # doctest: +SKIP
    >>> result.verdict  # doctest: +SKIP
    'PASS'
    """
    parsed = parse_goal(goal)
    inputs = Inputs(
        model=model,
        task=task,
        data=data,
        evaluation=evaluation,
        runtime=runtime,
        task_settings=task_settings or {},
        columns=columns or {},
        seed=seed,
        threads=threads,
        memory=memory,
        device=device,
        calibration_rows=calibration_rows,
        evaluation_rows=evaluation_rows,
        forward=forward,
        trust_remote_code=trust_remote_code,
        progress=progress or Silent(),
    )

    def run(inputs: Inputs) -> RunResult:
        return flow.optimize_run(
            inputs, parsed, Path(out), fresh=fresh, max_candidates=max_candidates, time_budget_seconds=time_budget
        )

    return _tracked(run, inputs, track, Path(out), goal=goal)


def apply(
    recipe: Recipe | str | Path,
    model: Model,
    *,
    out: str | Path,
    task: str | None = None,
    data: Rows | None = None,
    evaluation: Rows | None = None,
    goal: str | None = None,
    runtime: str = "torch",
    fresh: bool = False,
    task_settings: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory: int | None = None,
    device: str = "auto",
    calibration_rows: int = 128,
    evaluation_rows: int | None = None,
    forward: Forward | None = None,
    trust_remote_code: bool = False,
    track: Sequence[str] = (),
    progress: Progress | None = None,
) -> RunResult:
    """Carry out one recipe (a Recipe, or the path of its YAML), prove the artifact, and publish it in `out`/artifact.

    Without a goal the verdict says whether the files hold and compute what the recipe says. Without `data` that is all
    that is proven: quality needs rows. Raises RecipeError for a recipe that does not fit the model.

    >>> apply("int4.yaml", "./llama", data="corpus.jsonl", out="build")  # doctest: +SKIP
    """
    steps = recipe if isinstance(recipe, Recipe) else load(recipe)
    parsed = parse_goal(goal) if goal else None
    source = Source.open(model, forward=forward, trust_remote_code=trust_remote_code)
    inputs = Inputs(
        model=model,
        task=task or opened.guessed_task(source),
        data=data,
        evaluation=evaluation,
        runtime=runtime,
        task_settings=task_settings or {},
        columns=columns or {},
        seed=seed,
        threads=threads,
        memory=memory,
        device=device,
        calibration_rows=calibration_rows,
        evaluation_rows=evaluation_rows,
        forward=forward,
        trust_remote_code=trust_remote_code,
        progress=progress or Silent(),
    )

    def run(inputs: Inputs) -> RunResult:
        return flow.apply_run(inputs, steps, parsed, Path(out), fresh=fresh)

    return _tracked(run, inputs, track, Path(out), goal=goal or "", recipe=str(steps))


def evaluate(
    artifact: str | Path,
    *,
    data: Rows,
    task: str | None = None,
    runtime: str | None = None,
    task_settings: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    evaluation_rows: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalResult:
    """Score an artifact, opened in its own runtime in a fresh process, on labelled rows.

    >>> evaluate("build/artifact", data="test.jsonl").metric.low  # doctest: +SKIP
    """
    found = opened.open_artifact(
        artifact, task=task, runtime=runtime, task_settings=task_settings, trust_remote_code=trust_remote_code
    )
    return opened.evaluate_artifact(
        found, data, columns or {}, evaluation_rows, opened.default_threads(threads), progress or Silent()
    )


def bench(
    artifact: str | Path,
    *,
    against: str | Path | None = None,
    task: str | None = None,
    runtime: str | None = None,
    tokens: int = 128,
    seconds: float = 10.0,
    task_settings: Mapping[str, Any] | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BenchResult:
    """Time an artifact in a process of its own, alone or in turns with another, for `seconds` each.

    >>> bench("build/artifact", against="./my-bert").ratio  # doctest: +SKIP
    """
    first = opened.open_artifact(
        artifact, task=task, runtime=runtime, task_settings=task_settings, trust_remote_code=trust_remote_code
    )
    second = None
    if against is not None:
        second = opened.open_artifact(against, task=task, trust_remote_code=trust_remote_code)
    return opened.bench_artifact(
        first,
        second,
        tokens=tokens,
        seconds=seconds,
        threads=opened.default_threads(threads),
        progress=progress or Silent(),
    )


def compare(
    a: str | Path,
    b: str | Path,
    *,
    data: Rows,
    goal: str = "quality >= 99%",
    task: str | None = None,
    task_settings: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    evaluation_rows: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CompareResult:
    """Compare A with B on the same rows, in pairs, and judge the goal with B as the original.

    >>> compare("build/artifact", "./my-bert", data="test.jsonl").verdict  # doctest: +SKIP
    """
    parsed = parse_goal(goal)
    first, second = (
        opened.open_artifact(folder, task=task, task_settings=task_settings, trust_remote_code=trust_remote_code)
        for folder in (a, b)
    )
    return opened.compare_artifacts(
        first,
        second,
        data=data,
        columns=columns or {},
        num_rows=evaluation_rows,
        goal=parsed,
        threads=opened.default_threads(threads),
        seed=seed,
        progress=progress or Silent(),
    )


def report(run: str | Path) -> Path:
    """Write RUN/report.html from RUN/report.json; return its path. Raises RunError when no run has finished there."""
    return write_report(Path(run))


def _tracked(
    run: Callable[[Inputs], RunResult], inputs: Inputs, names: Sequence[str], out: Path, **asked: str
) -> RunResult:
    """Return what a run finds, with its card, and tell the named trackers what was asked, and the report."""
    if not names:
        return _with_card(run(inputs))
    with tracked(names, out, inputs.progress) as told:
        shown = {"model": inputs.model if isinstance(inputs.model, str | Path) else type(inputs.model).__name__}
        plain = {name: getattr(inputs, name) for name in ("task", "runtime", "seed", "calibration_rows")}
        told.settings({**asked, **{name: str(value) for name, value in (shown | plain).items()}})
        result = _with_card(run(replace(inputs, progress=told)))
        for page in (report(out), out / flow.RESULT):
            told.file(page)
    return result


def _with_card(result: RunResult) -> RunResult:
    """Put the model card into the artifact's folder: it tells what was measured, so the manifest does not cover it."""
    if result.artifact is not None and started_rank() == 0:
        write_text(Path(result.artifact) / CARD, render_card(result))
    return result


def doctor() -> Doctor:
    """Say what this machine can do: cores, instruction sets, memory, runtimes, extras, and what would add the rest."""
    return examine_machine()
