"""Try the most promising recipe, measure its artifact, learn from the difference, until the goal is met or cannot be.

What can be known without measuring (bytes, parameters) rules recipes out first; the rest
are profiled in waves, gentlest first, so that 2 bits cost no time where 8 will do. The search ends at the first PASS.
With an objective that is the first in its order among those that are likely to pass, and those follow that are
predicted to pass and to be better, until one does not. It ends too when nothing left can pass, when the time is spent,
or after `max_candidates`. A recipe that this machine cannot hold, or that is predicted to
take longer than is left, is not begun: it is left out with the reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.errors import ArtifactError, MeasureError, RecipeError, RuntimeUnavailable, TechniqueError
from gossamer.goal import Goal
from gossamer.judgement import Judgement, Verdict, binding, overall, violation
from gossamer.measure.statistics import needed_samples
from gossamer.plan.candidates import Steps, name_of
from gossamer.plan.forecast import Forecaster
from gossamer.plan.job import Job
from gossamer.plan.menu import Menu
from gossamer.plan.predict import Corrections, Tables, cut_key, format_key, predict, predicted_bytes
from gossamer.plan.proof import build_artifact, check_artifact, measure, refused_by, score_artifact, steps_recipe
from gossamer.plan.proposed_cuts import SolvedCuts
from gossamer.plan.ranking import HOPELESS, Ranked, can_improve, is_better, judge_measured, reached
from gossamer.plan.records import ExpertTokens, Judged, Original, Prediction, Tried
from gossamer.tasks.base import Evaluation
from gossamer.techniques.base import resolved

TIMES = ("latency", "throughput")
LOOKING = 0.3  # of the time that there is for a search: what may go into looking at recipes before one is tried


@dataclass(frozen=True)
class Found:
    """Hold what a search came to: everything tried, what was left, the index of the best, the verdict and why."""

    tried: tuple[Tried, ...]
    not_tried: tuple[Tried, ...]
    chosen: int | None
    verdict: Verdict
    reason: str


class Search:
    """Try recipes one after another; every finished step is in the run, so a killed search goes on."""

    def __init__(
        self,
        job: Job,
        goal: Goal,
        tables: Tables,
        reference: Evaluation,
        forecaster: Forecaster | None = None,
        cuts: SolvedCuts | None = None,
    ) -> None:
        self.job = job
        self.forecaster = forecaster
        self.cuts = cuts
        self.deadline = self.tried_by = math.inf
        self.passed: Steps | None = None  # the last that did
        self.cut_short = False  # more would have been looked at, had there been time
        self.goal = goal
        self.tables = tables
        self.original = tables.original
        self.reference = reference
        self.corrections = Corrections()
        self.seen: list[tuple[Steps, float | None, float, float]] = []  # recipe; shares of latency, quality; bytes
        self.tried: list[Tried] = []
        self.judgements: list[list[Judgement]] = []

    def run(self, recipes: Sequence[Steps], *, max_candidates: int, deadline: float = math.inf) -> Found:
        """Return what was found. `deadline` is a time.monotonic() value that no recipe is begun to pass."""
        self.deadline = deadline
        self._look_for_a_while()
        menu = Menu(self.job, self.goal, self.tables, recipes, self._refusal, self.cuts)
        stop = "no recipe is left"
        while ranked := self._looked_at(menu):
            best = ranked[0]
            if self.tried and best.promise < HOPELESS:
                stop = "no recipe that is left is predicted to meet the goal"
                break
            if len(self.tried) >= max_candidates:
                stop = f"{max_candidates} candidates were tried"
                break
            if self.tried and time.monotonic() > deadline:
                stop = "the time is spent"
                break
            menu.take(best.steps)
            if not menu.possible(best.steps):
                self.job.progress.say(f"{name_of(best.steps)} is left out: it {menu.left_out[best.steps]}")
                continue
            self._try(best)
            if self.tried[-1].verdict == Verdict.PASS:
                if not can_improve(self.goal):
                    break
                self.passed = best.steps
                menu.passed(best.steps)
                self._look_for_a_while()
                continue
            if self.passed is not None:
                break
            if not self.tried[-1].rejected:
                if short_in_quality_alone(self.judgements[-1]):
                    menu.fell_short(best.steps)
                if self.cuts is not None:
                    menu.add(self.cuts.again(best.steps, self.corrections))
        not_tried = [self._as_untried(item) for item in menu.ranked(self.corrections)]
        left_out = [unbuilt(self.tables, steps, f"it {why}") for steps, why in menu.left_out.items()]
        if left_out and not self.tried:
            stop = f"{len(left_out)} recipes cannot be carried out here: {left_out[0].name} {left_out[0].rejected[3:]}"
        return self._conclude(stop, [*not_tried, *left_out])

    def _look_for_a_while(self) -> None:
        """Set the time by which one of the recipes that were looked at by then is tried."""
        now = time.monotonic()
        self.tried_by = now + LOOKING * max(0.0, self.deadline - now)

    def _looked_at(self, menu: Menu) -> list[Ranked]:
        """Return what is worth a try, most promising first, after looking at as many waves as are wanted."""
        ranked = self._worth_a_try(menu)
        while self._wants_more(menu, ranked) and menu.next_wave(ranked):
            self._learn_again(menu.tables)
            ranked = self._worth_a_try(menu)
        return ranked

    def _worth_a_try(self, menu: Menu) -> list[Ranked]:
        """Return the recipes on the menu; once one has passed, those that are predicted to pass and to be better."""
        ranked = menu.ranked(self.corrections)
        if self.passed is None:
            return ranked
        known = predict(menu.tables, self.passed, self.corrections)
        return [item for item in ranked if item.promise >= 0 and is_better(self.goal, item.prediction, known)]

    def _wants_more(self, menu: Menu, ranked: Sequence[Ranked]) -> bool:
        """Say whether more is looked at; once something has passed, only where looking was cut short by the time."""
        hurried = time.monotonic() > self.tried_by
        if self.passed is not None and (hurried or not self.cut_short):
            return False
        more = menu.wants_more(ranked, hurried)
        self.cut_short = hurried and not more and menu.wants_more(ranked)
        return more

    def _learn_again(self, tables: Tables) -> None:
        """Take in what was measured once more, where tables have come to know how long blocks take."""
        if tables.blocks == self.tables.blocks:
            return
        self.tables, self.corrections = tables, Corrections()
        for steps, ratio, share, size in self.seen:
            self._learn(steps, predict(tables, steps, self.corrections), ratio, share, size)

    def _learn(self, steps: Steps, predicted: Prediction, ratio: float | None, share: float, size: float) -> None:
        key = format_key(resolved(self.tables.model, steps)[0])
        self.corrections.learn(key, predicted, ratio, share, cut_key(steps), size)

    def _refusal(self, steps: Steps) -> str:
        """Return why a recipe cannot be carried out now: memory, disk, or the time that is left."""
        if self.forecaster is None:
            return ""
        try:
            found = self.forecaster.of(steps)
        except (RecipeError, TechniqueError):  # building it says so, as ever
            return ""
        return found.refusal or too_long(found.seconds, self.deadline - time.monotonic())

    def _try(self, item: Ranked) -> None:
        """Build, check, measure and judge one recipe; a refusal is recorded, never swallowed."""
        began = time.monotonic()
        self.job.progress.say(f"trying {name_of(item.steps)}")
        judgements: list[Judgement] = []
        tried = self._as_untried(item)
        try:
            refusal = refused_by(self.job.runtime, self.job.model, item.steps)
            if refusal is not None:
                raise RuntimeUnavailable(f"{self.job.runtime.name} cannot hold it: {refusal}")
            tried, judgements = prove(self.job, self.goal, item.steps, item.prediction, self.original, self.reference)
            if tried.measured is not None and not tried.rejected:
                figures = tried.measured.figures
                timed, share = figures.get("latency p50 ratio"), figures["quality"].value
                seen = (timed.value if timed is not None else None), share, figures["size"].value
                self.seen.append((item.steps, *seen))
                self._learn(item.steps, item.prediction, *seen)
        except (ArtifactError, MeasureError, RuntimeUnavailable, TechniqueError) as error:
            tried = tried.model_copy(update={"rejected": error.message})
        tried = tried.model_copy(update={"seconds": round(time.monotonic() - began, 3)})
        self.job.progress.say(_line(tried))
        self.job.run.record("tried", name=tried.name, verdict=tried.verdict, rejected=tried.rejected)
        self.tried.append(tried)
        self.judgements.append(judgements)
        self.job.progress.record("candidates", len(self.tried), tried.numbers())

    def _as_untried(self, item: Ranked) -> Tried:
        return Tried(name=name_of(item.steps), recipe=steps_recipe(item.steps), predicted=item.prediction)

    def _conclude(self, stop: str, not_tried: list[Tried]) -> Found:
        sound = [index for index, tried in enumerate(self.tried) if tried.measured is not None and not tried.rejected]
        passed = [index for index in sound if self.tried[index].verdict == Verdict.PASS]
        if passed:
            chosen = min(reversed(passed), key=lambda index: reached(self.goal, self.tried[index]))
            reason = f"{self.tried[chosen].name} meets every bound"
            return Found(tuple(self.tried), tuple(not_tried), chosen, Verdict.PASS, reason)
        if not sound:
            why = "; ".join(tried.rejected for tried in self.tried[:3])
            why = why or (stop if not_tried else "no technique proposes anything for this model")
            return Found(tuple(self.tried), tuple(not_tried), None, Verdict.FAIL, f"no candidate could be built: {why}")
        chosen = min(sound, key=lambda index: self.tried[index].violation)
        judgements = self.judgements[chosen]
        verdict = overall(judgements)
        worst = binding(judgements)
        why = next(judgement.why for judgement in judgements if judgement.constraint == worst)
        reason = f"{stop}; `{worst}` stands in the way of the nearest, {self.tried[chosen].name}: {why}"
        if verdict is Verdict.UNDECIDED:
            reason += self._what_would_decide(chosen)
        return Found(tuple(self.tried), tuple(not_tried), chosen, verdict, reason)

    def _what_would_decide(self, chosen: int) -> str:
        """Return how many more held-out samples would decide a quality bound, as half a sentence."""
        for judgement in self.judgements[chosen]:
            constraint = judgement.constraint
            if constraint.quantity == "quality" and judgement.verdict is Verdict.UNDECIDED and constraint.relative:
                folder = self.job.run.folder / "steps" / self.tried[chosen].folder.split("/")[1]
                scores = score_artifact(self.job, folder, self.reference).scores
                needed = needed_samples(scores, self.reference.scores, self.job.task.metric, judgement.bound)
                if needed is not None:
                    return f"; about {needed} more samples needed"
                return "; more samples are not expected to help"
        return ""


def short_in_quality_alone(judgements: Sequence[Judgement]) -> bool:
    """Say whether quality is what a recipe lacks: a bound on it is not met for certain, and no other is missed.

    One on times may be undecided: the recipe with a repair is timed anew, and takes as long.
    """
    short = [one for one in judgements if one.verdict is not Verdict.PASS]
    others = [one for one in short if one.constraint.quantity != "quality"]
    times = (one.verdict is Verdict.UNDECIDED and one.constraint.quantity in TIMES for one in others)
    return len(others) < len(short) and all(times)


def undecided_by_time_alone(judgements: Sequence[Judgement]) -> bool:
    """Say whether every bound is met but those on times, of which one is undecided and none is missed."""
    left = [one for one in judgements if one.verdict is not Verdict.PASS]
    return bool(left) and all(one.verdict is Verdict.UNDECIDED and one.constraint.quantity in TIMES for one in left)


def too_long(seconds: float, left: float) -> str:
    """Return that a recipe is predicted to take longer than is left, as the end of a sentence; empty when it is not."""
    if seconds <= left:
        return ""
    return f"is predicted to take {round(seconds)} s; {max(0, round(left))} s are left"


def unbuilt(tables: Tables, steps: Steps, why: str) -> Tried:
    """Return the record of a recipe that was not begun: its bytes are known, what was not profiled is not."""
    decisions, after = resolved(tables.model, steps)
    if tables.profile.knows(steps):
        prediction = predict(tables, steps)
    else:
        prediction = unknown_but_for(predicted_bytes(tables, decisions, after))
    return Tried(name=name_of(steps), recipe=steps_recipe(steps), predicted=prediction, rejected=why)


def unknown_but_for(size: int) -> Prediction:
    """Return a prediction of bytes alone."""
    nan = math.nan
    return Prediction(
        quality_share=nan, kl=nan, size_bytes=size, latency_seconds=nan, latency_share=nan, memory_bytes=0, seconds=nan
    )


def prove(
    job: Job, goal: Goal | None, steps: Steps, prediction: Prediction, original: Original, reference: Evaluation | None
) -> tuple[Tried, list[Judgement]]:
    """Return one recipe built, checked, measured and judged. An artifact that computes something else is rejected."""
    built = build_artifact(job, steps)
    equivalence, tensors = check_artifact(job, built, steps)
    after = resolved(job.model, steps)[1]
    measured = measure(job, built.folder, equivalence, tensors, reference, after)
    judgements = judge_measured(goal, measured, original) if goal is not None else []
    if goal is not None and undecided_by_time_alone(judgements):
        measured = measure(job, built.folder, equivalence, tensors, reference, after, longer=True)
        judgements = judge_measured(goal, measured, original)
    tried = Tried(
        name=name_of(steps),
        recipe=steps_recipe(steps),
        predicted=prediction,
        measured=measured,
        judgements=tuple(as_record(judgement) for judgement in judgements),
        verdict=overall(judgements).value if judgements else "PASS",
        violation=violation(judgements),
        folder=f"steps/{built.folder.name}/artifact",
        experts=tuple(ExpertTokens.model_validate(found) for found in built.value["experts"]),
        fallbacks=tuple(built.value["fallbacks"]),
    )
    wrong = [row.parameter for row in tensors if not row.agrees]
    if wrong:
        return replace_verdict(
            tried, f"the file does not hold what the recipe says of {', '.join(wrong[:3])}"
        ), judgements
    if not equivalence.passed:
        return replace_verdict(
            tried,
            f"re-opened in {job.runtime.name}, its outputs differ from the in-memory model's by "
            f"{equivalence.relative_error:.2%}; {equivalence.allowed:.2%} is allowed",
        ), judgements
    return tried, judgements


def replace_verdict(tried: Tried, rejected: str) -> Tried:
    """Return the record as a failed one, with the reason."""
    return tried.model_copy(update={"rejected": rejected, "verdict": "FAIL"})


def as_record(judgement: Judgement) -> Judged:
    """Return a judgement in the words and numbers that a person reads."""
    return Judged(
        constraint=str(judgement.constraint),
        verdict=judgement.verdict.value,
        value=judgement.value,
        low=judgement.low,
        high=judgement.high,
        bound=judgement.bound,
        margin=judgement.margin,
        why=judgement.why,
    )


def _line(tried: Tried) -> str:
    """Return one line about a tried candidate."""
    if tried.rejected:
        return f"{tried.name}: rejected: {tried.rejected}"
    reasons = "; ".join(judged.why for judged in tried.judgements)
    return f"{tried.name}: {tried.verdict}: {reasons}"
