"""What `plan` answers: each recipe's prediction for a goal, or one explicit recipe's, and what it takes."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gossamer.goal import Goal
from gossamer.plan.candidates import Steps, name_of
from gossamer.plan.flow import check_alone, check_measurable, check_recipe, check_rows, fitting, make_tables, proposals
from gossamer.plan.forecast import Forecaster, artifact_bytes
from gossamer.plan.gain import gain_of_twice
from gossamer.plan.gain import in_words as gain_in_words
from gossamer.plan.job import Job
from gossamer.plan.menu import Menu
from gossamer.plan.predict import Corrections
from gossamer.plan.prepare import Inputs, identity, opened_job, prepare, with_runtime
from gossamer.plan.proof import steps_recipe
from gossamer.plan.ranking import Ranked
from gossamer.plan.rates import measured_rates
from gossamer.plan.records import PlanResult, Tried
from gossamer.plan.search import too_long, unbuilt, unknown_but_for
from gossamer.plan.settled import settled
from gossamer.recipe import Recipe
from gossamer.run.workspace import Run
from gossamer.techniques.base import Technique, resolved
from gossamer.techniques.registry import resolve

NUM_COVERED = 3  # of the most promising: what becomes of each module
BUILD = Path("build")  # where the run would lie, when no folder is named


def plan_run(
    inputs: Inputs,
    goal: Goal | None,
    out: Path | None,
    *,
    recipe: Recipe | None = None,
    time_budget_seconds: float | None = None,
) -> PlanResult:
    """Return every recipe's prediction, most promising first, and what carrying it out takes; no artifact is built.

    With a `recipe` only that one: without a goal nothing is measured but how fast this machine is. With `out` the
    tables stay in that run folder, and `optimize` or `apply` with the same arguments goes on from them.
    """
    check_alone("plan")
    prepared = prepare(inputs)
    inputs = with_runtime(inputs, prepared, out)
    steps: Steps | None = tuple(resolve(recipe)) if recipe is not None else None
    what = {"goal": str(goal) if goal else ""}
    if steps is not None:
        check_rows(steps, prepared)
        what["recipe"] = steps_recipe(steps)  # type: ignore[assignment]
    left = math.inf if time_budget_seconds is None else time_budget_seconds
    with (
        _folder(out) as folder,
        Run(folder, identity(inputs, prepared, **what)) as run,
        opened_job(inputs, prepared, run) as job,
    ):
        check_measurable(job, goal)
        if steps is not None:
            steps = settled(job, steps)
            check_recipe(job, steps)
        if goal is None:
            assert steps is not None, "a plan needs a goal or a recipe"
            return _of_recipe(job, steps, out or BUILD, left)
        return _for_goal(job, goal, steps, out or BUILD, left)


def _of_recipe(job: Job, steps: Steps, where: Path, left: float) -> PlanResult:
    """Return what one recipe takes; of its prediction only the bytes are known."""
    job, found = fitting(job, None, steps, where)
    size = artifact_bytes(job, *resolved(job.model, steps))
    planned = Tried(
        name=name_of(steps),
        recipe=steps_recipe(steps),
        predicted=unknown_but_for(size).model_copy(update={"seconds": found.seconds}),
        rejected=_sentence(found.refusal or too_long(found.seconds, left)),
        forecast=found,
    )
    return PlanResult(
        goal="",
        goal_in_words=[],
        original=None,
        candidates=(planned,),
        notes=job.model.notes,
        calibration=_about_rows(job, steps),
    )


def _for_goal(job: Job, goal: Goal, steps: Steps | None, where: Path, left: float) -> PlanResult:
    """Return the recipes that are worth a try for a goal (or the one that was named), and those that cannot be held."""
    forecaster = Forecaster(job, measured_rates(job), where=where)
    tables, _ = make_tables(job, goal)
    found, cuts = ([steps], None) if steps is not None else proposals(job, goal, tables)

    def refusal(steps: Steps) -> str:
        found = forecaster.of(steps)
        return found.refusal or too_long(found.seconds, left)

    menu = Menu(job, goal, tables, found, refusal if steps is None else lambda _: "", cuts)
    ranked = menu.ranked(Corrections())
    while menu.wants_more(ranked) and menu.next_wave(ranked):
        ranked = menu.ranked(Corrections())
    planned = _with_forecasts(forecaster, ranked, left)
    left_out = [unbuilt(menu.tables, one, _sentence(why)) for one, why in menu.left_out.items()]
    return PlanResult(
        goal=str(goal),
        goal_in_words=goal.describe(),
        original=menu.tables.original,
        candidates=(*planned, *left_out),
        notes=job.model.notes,
        calibration=_about_rows(job, ranked[0].steps if ranked else ()),
    )


def _about_rows(job: Job, steps: Sequence[Technique]) -> tuple[str, ...]:
    """Return what was found about the calibration rows, and what more of them would bring to a recipe."""
    said = [f"{one.level}: {one.says}" for one in job.findings]
    gain = gain_in_words(gain_of_twice(job, steps), len(job.calibration))
    return (*said, gain) if gain else tuple(said)


def _with_forecasts(forecaster: Forecaster, ranked: Sequence[Ranked], left: float) -> list[Tried]:
    planned = []
    for number, item in enumerate(ranked):
        found = forecaster.of(item.steps, covered=number < NUM_COVERED)
        planned.append(
            Tried(
                name=name_of(item.steps),
                recipe=steps_recipe(item.steps),
                predicted=item.prediction.model_copy(update={"seconds": found.seconds}),
                rejected=_sentence(found.refusal or too_long(found.seconds, left)),
                forecast=found,
            )
        )
    return planned


def _sentence(why: str) -> str:
    return f"it {why}" if why else ""


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Yield the run folder, or a temporary one that is removed afterwards."""
    if out is not None:
        yield out
        return
    scratch = Path(tempfile.mkdtemp(prefix="gossamer-plan-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)
