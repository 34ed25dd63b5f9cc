"""Which recipes there are to choose from: every technique's own proposals, alone and one of each together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.roles import ModelMap
from gossamer.techniques.base import SearchSpace, Technique, resolved
from gossamer.techniques.registry import recipe_of, resolve, techniques

Steps = tuple[Technique, ...]
MAX_RECIPES = 5000  # a bound on what is predicted, not on what is tried: predicting one costs some milliseconds


def recipes(space: SearchSpace, wanted: Callable[[Technique], bool] = lambda _: True) -> list[Steps]:
    """Return every recipe that the techniques propose for this model and runtime, in a stable order.

    Runs of different techniques are combined in the order that their needs declare; combinations that exclude each
    other, or that round one parameter twice, are left out, and so are runs with a step that is not `wanted`.
    """
    proposals = {
        name: [(run, _rounded(run, space.model)) for run in technique.candidates(space) if all(map(wanted, run))]
        for name, technique in techniques().items()
    }
    names = [name for name, runs in proposals.items() if runs]
    found: dict[Steps, None] = {}
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            for runs in product(*(proposals[name] for name in chosen)):
                if len(found) >= MAX_RECIPES:
                    return list(found)
                if not all(one.isdisjoint(other) for (_, one), (_, other) in combinations(runs, 2)):
                    continue
                steps = _ordered([run for run, _ in runs])
                if steps is not None and (len(runs) == 1 or _fit(steps, space)):
                    found[steps] = None
    return list(found)


def _fit(steps: Steps, space: SearchSpace) -> bool:
    """Say whether each step fits what those before it leave (groups of what is left of a row, say)."""
    try:
        decisions, _ = resolved(space.model, steps)
    except (RecipeError, TechniqueError):
        return False
    found = [one for one in decisions if one.weight is not None]
    return not any(space.runtime.refusal(one.layer.role, one.layer.shape, one.weight, one.activation) for one in found)


def repaired(steps: Steps, space: SearchSpace, possible: Callable[[Steps], bool] = lambda _: True) -> list[Steps]:
    """Return the recipe with each technique's repair of it, one at a time, where the order allows it.

    Of several that a technique has, the first that is `possible`, the last where none is.
    """
    found = []
    for technique in techniques().values():
        ordered = (_ordered([*((one,) for one in steps), (step,)]) for step in technique.repairs(steps, space))
        variants = [one for one in ordered if one is not None]
        if variants:
            found.append(next((one for one in variants[:-1] if possible(one)), variants[-1]))
    return found


def joined(first: Steps, then: Steps, space: SearchSpace) -> Steps | None:
    """Return two runs of steps as one recipe: the first before the other, or as soon as the order of steps allows it.

    None where it never does, or where a step does not fit what those before it leave.
    """
    for place in range(len(then) + 1):
        steps = (*then[:place], *first, *then[place:])
        try:
            resolve(recipe_of(steps))
        except RecipeError:
            continue
        return steps if _fit(steps, space) else None
    return None


def _rounded(steps: Sequence[Technique], model: ModelMap) -> frozenset[str]:
    """Return the parameters whose codes some steps decide."""
    decided, _ = resolved(model, steps)
    return frozenset(decision.parameter for decision in decided if decision.weight is not None)


def rounds_twice(steps: Sequence[Technique], model: ModelMap) -> list[str]:
    """Return the parameters whose codes more than one step decides."""
    decided, _ = resolved(model, steps)
    counts = Counter(decision.parameter for decision in decided if decision.weight is not None)
    return [parameter for parameter, count in counts.items() if count > 1]


def _ordered(runs: Sequence[Steps]) -> Steps | None:
    """Return the runs one after another in the first order that their declared needs allow, None when there is none."""
    for arrangement in _arrangements(list(runs)):
        steps = tuple(step for run in arrangement for step in run)
        try:
            resolve(recipe_of(steps))
        except RecipeError:
            continue
        return steps
    return None


def _arrangements(runs: list[Steps]) -> Iterator[list[Steps]]:
    if len(runs) <= 1:
        yield runs
        return
    for index, first in enumerate(runs):
        for rest in _arrangements(runs[:index] + runs[index + 1 :]):
            yield [first, *rest]


def name_of(steps: Steps) -> str:
    """Return a short name that tells recipes apart: `quantize int8 dynamic + quantize embedding int8`."""
    return " + ".join(step.label() for step in steps)
