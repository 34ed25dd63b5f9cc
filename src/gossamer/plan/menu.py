"""The recipes that may be tried, and which of them are looked at: in waves, gentlest first, and with repairs.

Where the fewest bytes are the aim, the first wave is spread over all sizes, and the others look at what is smaller than
the smallest that is likely to do.

A recipe that falls short in quality alone is looked at again with each repair that a technique has for it
(`Technique.repairs`): after it was tried, or beforehand where it is not likely to pass and is with the repair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from gossamer.goal import Goal
from gossamer.plan.candidates import Steps, repaired
from gossamer.plan.frontier import fewest_bytes, spread_first
from gossamer.plan.job import Job
from gossamer.plan.predict import Corrections, Tables, predicted_bytes, predicted_latency
from gossamer.plan.profile import profile
from gossamer.plan.proposed_cuts import TIMED, SolvedCuts, allowed_seconds
from gossamer.plan.ranking import COUNTED, HOPELESS, LIKELY, USUAL_MISS, Ranked, in_order, original_values, rank
from gossamer.techniques.base import SearchSpace, resolved

WAVE = 12  # recipes that are profiled together
DOUBTFUL, DOUBTFUL_WAVES = -0.5, 4  # a promise below which so many waves are looked at before anything is tried
HARSH = 0.35  # of the unchanged model's time: less than rounding alone usually leaves
FAR_OVER = 1 - HOPELESS * USUAL_MISS["latency"]  # times the seconds that a goal allows
STREAMED_WAVE = 2  # of a model that is read piece by piece: each takes a pass over all of it


class Menu:
    """Hold the recipes that may be tried: those that fit what can be counted, profiled wave by wave, gentlest first.

    `refusal` says of a recipe why it cannot be carried out (memory, disk, time), empty where it can; it is asked before
    anything is spent on it, and `left_out` keeps the answers.
    """

    def __init__(
        self,
        job: Job,
        goal: Goal,
        tables: Tables,
        recipes: Sequence[Steps],
        refusal: Callable[[Steps], str] = lambda _: "",
        cuts: SolvedCuts | None = None,
    ) -> None:
        self.job = job
        self.goal = goal
        self.tables = tables
        self.refusal = refusal
        self.cuts = cuts
        self.left_out: dict[Steps, str] = {}
        sized = sorted(recipes, key=lambda steps: -self._bytes(steps))
        fitting = [steps for steps in sized if self._fits(steps)]
        self._nearest = sized[-WAVE:]  # what there is where nothing fits: the smallest
        self.waiting = fitting or ([] if cuts is not None else self._nearest)  # cuts may make something fit
        self.fewest_bytes = fewest_bytes(goal)
        self._below = math.inf  # bytes of what has passed, where the fewest are the aim
        if self.fewest_bytes:
            self.waiting = spread_first(job.model, self.waiting, self._bytes, self._wave)
        self.open: list[Steps] = []
        self.last: list[Steps] = []  # of the open: those that the last wave was for
        self.slow: list[Steps] = []  # set aside: predicted to take far longer than asked
        self.waves = 0
        self.short: list[Steps] = []  # tried, and short in quality alone
        self.repaired: dict[Steps, list[Steps]] = {}  # recipe -> it with each repair that there is
        self.taken: set[Steps] = set()

    def next_wave(self, ranked: Sequence[Ranked] = ()) -> bool:
        """Profile the next recipes; return False when none is waiting that is worth a look beside those in `ranked`.

        Where a second wave is asked for, or the goal asks for less time than rounding leaves, what leaves the shapes
        alone is not likely to do: recipes that cut come next; those that make the whole model narrower when there are
        no others. What is far too slow is looked at where there is nothing else.
        """
        if self.cuts is not None and (self.waves or not self.waiting or self._seconds_left < HARSH):
            self.tables, more = self.cuts.more(self.tables)
            self.waiting[:0] = sorted(filter(self._fits, more), key=lambda steps: -self._bytes(steps))
            if not self.waiting and not self.waves:
                self.waiting = self._nearest
        likely = [item for item in ranked if item.promise >= LIKELY] if self.fewest_bytes else []
        below = min((self._bytes(item.steps) for item in likely), default=self._below)
        wave = self._taken_from_waiting(below)
        if not wave and below == math.inf and self.cuts is not None:
            self.waiting = sorted(filter(self._fits, self.cuts.narrower()), key=lambda steps: -self._bytes(steps))
            wave = self._taken_from_waiting(below)
        if not wave and not self.open and not self.taken:
            wave = list(filter(self.possible, sorted(self.slow, key=self._seconds)[:WAVE]))
        if not wave:
            return False
        self._profile(wave)
        self.waves += 1
        now_known = [steps for steps in self.waiting if self.tables.profile.knows(steps)]
        self.waiting = [steps for steps in self.waiting if not self.tables.profile.knows(steps)]
        self.open += [*wave, *now_known]
        self.last = [steps for steps in [*wave, *now_known] if self._bytes(steps) < below]
        return True

    @property
    def _wave(self) -> int:
        return WAVE if self.job.budget is None else STREAMED_WAVE

    def _taken_from_waiting(self, below: float) -> list[Steps]:
        """Return the first recipes of fewer bytes that can be carried out now, as many as are profiled together."""
        wave: list[Steps] = []
        for steps in list(self.waiting):
            if len(wave) >= self._wave:
                break
            if self._bytes(steps) >= below:
                continue
            self.waiting.remove(steps)
            if self.tables.blocks and self._seconds(steps) > FAR_OVER * self._allowed:
                self.slow.append(steps)
            elif self.possible(steps):
                wave.append(steps)
        return wave

    def add(self, recipes: Sequence[Steps]) -> None:
        """Put recipes on the menu that measuring has made worth a look; those that are on it or were taken stay so."""
        known = {*self.open, *self.waiting, *self.taken, *self.left_out}
        new = [steps for steps in recipes if steps not in known and self._fits(steps) and self.possible(steps)]
        if new:
            self._profile(new)
            self.open += new

    def _profile(self, recipes: Sequence[Steps]) -> None:
        parts = [step for steps in recipes for step in steps]
        self.tables = replace(self.tables, profile=profile(self.job, parts, self.tables.profile))

    def possible(self, steps: Steps) -> bool:
        """Say whether a recipe can be carried out now; one that cannot is left out from here on."""
        if why := self.refusal(steps):
            self.left_out[steps] = why
        return not why

    def ranked(self, corrections: Corrections) -> list[Ranked]:
        """Return the profiled recipes that were not taken yet, most promising first."""
        ranked = rank(self.goal, self.tables, self.open, corrections)
        wanted = [*self.short, *(item.steps for item in ranked if self._wants_repair(item))]
        repaired = dict.fromkeys(twin for steps in wanted for twin in self._repaired(steps) if twin not in self.taken)
        of_short = {twin for steps in self.short for twin in self._repaired(steps)}
        twins = [
            item
            for item in rank(self.goal, self.tables, list(repaired), corrections)
            if item.promise >= LIKELY or item.steps in of_short
        ]
        return in_order(self.goal, [*ranked, *twins]) if twins else ranked

    def take(self, steps: Steps) -> None:
        """Take a recipe off the menu."""
        self.taken.add(steps)
        if steps in self.open:
            self.open.remove(steps)

    def passed(self, steps: Steps) -> None:
        """Note that a recipe met every bound: where the fewest bytes are the aim, only smaller ones are looked at."""
        if self.fewest_bytes:
            self._below = self._bytes(steps)

    def fell_short(self, steps: Steps) -> None:
        """Note that a recipe was tried and met every bound but that on quality: its repairs are worth a try."""
        self.short.append(steps)

    def _wants_repair(self, item: Ranked) -> bool:
        """Say whether an untried recipe is looked at with repairs too: where it is not likely, or quality is all."""
        objective = self.goal.objective
        if objective is not None and objective.quantity == "quality":
            return item.promise >= LIKELY
        bounded = any(constraint.quantity == "quality" for constraint in self.goal.constraints)
        return bounded and item.promise < LIKELY

    def _repaired(self, steps: Steps) -> list[Steps]:
        if self.job.budget is not None:
            return []  # repairs need the model whole
        if steps not in self.repaired:
            rows = len(self.job.calibration)
            space = SearchSpace(
                self.job.model,
                self.job.runtime,
                self.job.task,
                calibration_rows=rows,
                training_rows=len(self.job.rows.others),
            )
            self.repaired[steps] = repaired(steps, space, lambda found: not self.refusal(found))
        return self.repaired[steps]

    def wants_more(self, ranked: Sequence[Ranked], hurried: bool = False) -> bool:
        """Say whether harsher recipes are wanted: nothing open is worth a try, or the objective rewards harshness.

        Looking at a wave takes as long as one or two tries, so a few are looked at before one is tried that is
        predicted to miss. With an objective of fewer bytes the waves go on as long as the last one still brought a
        likely recipe. `hurried`: what is not hopeless is tried.
        """
        patient = self.waves < DOUBTFUL_WAVES and not hurried
        if all(item.promise < (DOUBTFUL if patient else HOPELESS) for item in ranked):
            return True
        if hurried:
            return False
        likely = [item for item in ranked if item.promise >= LIKELY]
        last = set(self.last)
        last |= {twin for steps in last for twin in self.repaired.get(steps, [])}
        rewards = self.goal.objective is not None and self.goal.objective.quantity in ("size", "memory", "latency")
        return rewards and any(item.steps in last for item in likely)

    @property
    def _allowed(self) -> float:
        """Return the seconds that the goal leaves a request."""
        bounds = (bound for bound in self.goal.constraints if bound.quantity in TIMED)
        return min((allowed_seconds(bound, self.tables) for bound in bounds), default=math.inf)

    @property
    def _seconds_left(self) -> float:
        """Return what the goal leaves of the time that the unchanged model takes in the runtime."""
        unchanged = self.tables.original.same_runtime_latency or self.tables.original.latency
        return self._allowed / unchanged.p50

    def _seconds(self, steps: Steps) -> float:
        return predicted_latency(self.tables, *resolved(self.job.model, steps))

    def _bytes(self, steps: Steps) -> int:
        return predicted_bytes(self.tables, *resolved(self.job.model, steps))

    def _fits(self, steps: Steps) -> bool:
        """Say whether a recipe meets the bounds on what can be counted."""
        after = resolved(self.job.model, steps)[1]
        values = {"size": float(self._bytes(steps)), "params": float(after.num_parameters), "flops": 2.0 * after.macs}
        originals = original_values(self.tables.original)
        for constraint in self.goal.constraints:
            if constraint.quantity in COUNTED:
                value = values[constraint.quantity]
                share = value / originals[constraint.quantity] if constraint.relative else value
                if share > constraint.bound:
                    return False
        return True
