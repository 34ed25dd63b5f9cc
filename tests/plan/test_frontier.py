"""Where the fewest bytes are the aim: which recipes are looked at first, and in what order the others follow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from gossamer.goal import parse_goal
from gossamer.plan.candidates import Steps, recipes
from gossamer.plan.frontier import ALIKE, coarseness, fewest_bytes, spread_first
from gossamer.plan.job import Job
from gossamer.plan.menu import Menu
from gossamer.plan.predict import Tables
from gossamer.plan.profile import Effect, Profile
from gossamer.plan.ranking import LIKELY, Ranked
from gossamer.techniques.base import SearchSpace, resolved
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.cast import Cast
from gossamer.techniques.quantize.quantize import Quantize

SIZES = {8: 139, 4: 93, 3: 90, 2: 73}


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ("quality >= 90%, minimize size", True),
        ("quality >= 90%, size <= 30%, time <= 1h, minimize size", True),
        ("quality >= 90%, size <= 30%", False),
        ("quality >= 90%, latency <= 50%, minimize size", False),
        ("quality >= 90%, minimize latency", False),
    ],
)
def test_goals_that_ask_for_the_fewest_bytes(goal: str, expected: bool) -> None:
    assert fewest_bytes(parse_goal(goal)) is expected


def test_fewer_bits_longer_groups_rounded_inputs_and_cuts_are_coarser(job: Job) -> None:
    gentle: list[Steps] = [
        (),
        (Cast(),),
        (Quantize(),),
        (Quantize(activations="dynamic"),),
        (Quantize(bits=4, group_size=16),),
        (Quantize(bits=4),),
        (Quantize(bits=2, group_size=16),),
        (Prune(what="ffn", to="50%"),),
    ]
    found = [coarseness(job.model, steps) for steps in gentle]
    assert found[0] == 0
    assert all(one < other for one, other in pairwise(found)), found
    assert coarseness(job.model, (Quantize(), Quantize(targets=("embedding",)))) > found[2]


def test_what_is_in_front_is_spread_over_the_sizes_and_none_is_coarser_than_a_smaller_one(job: Job) -> None:
    space = SearchSpace(model=job.model, runtime=job.runtime, task=job.task, calibration_rows=64)
    every = recipes(space, lambda step: step.family == "quantize")

    def size(steps: Steps) -> int:
        decided, after = resolved(job.model, steps)
        widths = {one.parameter: one.weight.bits for one in decided if one.weight is not None}
        return sum(widths.get(f"{layer.name}.weight", 32) * layer.num_parameters // 8 for layer in after.layers)

    found = spread_first(job.model, every, size, 4)
    assert len(found) == len(every)
    assert set(found) == set(every)
    first, rest = found[:4], found[4:]
    assert all(size(other) < ALIKE * size(one) for one, other in pairwise(first))
    assert all(coarseness(job.model, one) < coarseness(job.model, other) for one, other in pairwise(first))
    for one in first:  # nothing that is as small or smaller is gentler
        smaller = [steps for steps in every if size(steps) <= size(one)]
        assert coarseness(job.model, one) == min(coarseness(job.model, steps) for steps in smaller)
    assert [size(one) for one in rest] == sorted((size(one) for one in rest), reverse=True)
    assert all(not step.rows_needed() for steps in first for step in steps)  # measured without a sweep


def menu_of(job: Job, tables: Tables, monkeypatch: pytest.MonkeyPatch, quality: dict[int, float]) -> Menu:
    """Return a menu of four widths, each alone and by a sweep, whose quality when it is measured is as given."""
    every: list[Steps] = [
        (kind(bits=bits, group_size=16),)  # type: ignore[call-arg]
        for bits in quality
        for kind in (Quantize, Gptq)
    ]
    profile: Any = Profile(shapes={}, effects={}, seconds={})
    original = tables.original.model_copy(update={"size_bytes": 200_000, "same_runtime_bytes": 200_000})
    real = replace(tables, model=job.model, profile=profile, original=original)

    def measured(self: Menu, recipes: list[Steps]) -> None:
        effects = dict(self.tables.profile.effects)
        for steps in recipes:
            share = quality[steps[0].bits]  # type: ignore[attr-defined]
            effects[steps[0]] = Effect(1 - share, share, share)
        self.tables = replace(self.tables, profile=replace(profile, effects=effects))

    monkeypatch.setattr(Menu, "_profile", measured)
    monkeypatch.setattr(Menu, "_wave", 2)
    monkeypatch.setattr(Menu, "_bytes", lambda self, steps: SIZES[steps[0].bits] * 1000)
    return Menu(job, parse_goal("quality >= 90%, minimize size"), real, every)


def looked_at(menu: Menu, share: dict[int, float]) -> list[list[tuple[str, int]]]:
    """Look at waves as a search does, and return the steps of each."""

    def ranked() -> list[Ranked]:
        found: Any = [
            Ranked(steps, None, LIKELY if share[steps[0].bits] >= 0.9 else -1.0)  # type: ignore[arg-type,attr-defined]
            for steps in menu.open
        ]
        return found

    waves, before = [], 0
    while menu.wants_more(ranked()) and menu.next_wave(ranked()):
        waves.append([(steps[0].name, steps[0].bits) for steps in menu.open[before:]])  # type: ignore[attr-defined]
        before = len(menu.open)
    return waves


def test_later_waves_look_at_what_is_smaller_than_the_smallest_that_is_likely(
    job: Job, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = {8: 1.0, 4: 0.95, 3: 0.5, 2: 0.1}
    waves = looked_at(menu_of(job, tables, monkeypatch, share), share)
    assert waves[0] == [("quantize", 4), ("quantize", 2)]
    # 4 bits will do: 3 are looked at, 8 are not, and the search for smaller ones ends where none is likely
    assert waves[1:] == [[("quantize", 3), ("gptq", 3)]]


def test_where_nothing_small_will_do_the_gentlest_follow(
    job: Job, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = {8: 0.99, 4: 0.5, 3: 0.3, 2: 0.1}
    waves = looked_at(menu_of(job, tables, monkeypatch, share), share)
    assert waves[:2] == [[("quantize", 4), ("quantize", 2)], [("quantize", 8), ("gptq", 8)]]
    assert ("gptq", 4) in waves[2]
