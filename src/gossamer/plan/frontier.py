"""Where the fewest bytes are the aim, which recipes are looked at first: those that no smaller one is gentler than.

What a recipe loses is not known before it is measured; that it loses more with fewer bits is. A grid of b bits leaves
an error of about 4^-b of the weights' variance (the high-resolution approximation: Gray and Neuhoff, "Quantization",
1998, section III); what is cut away leaves all of it. By these, recipes of as many bytes are put in order, and a few
that are spread over all sizes show between which two the goal's quality ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gossamer.goal import Goal
from gossamer.models.roles import ModelMap
from gossamer.plan.candidates import Steps
from gossamer.techniques.base import resolved

OF_ROWS = 4.0  # times the error with one scale for a row of any length, over that with one for a group
OF_INPUTS = 4.0  # times that of rounding the inputs of a layer, over that of rounding its weights to as many bits
OF_FLOATS = 4.0**-9  # of what 16 bits hold
OF_TOKENS = 1 / 16  # of what is cut off an embedding: rows of tokens that the data do not have
ALIKE = 0.99  # of a recipe's bytes: what takes more is as large


def fewest_bytes(goal: Goal) -> bool:
    """Say whether a goal asks for as few bytes as its quality allows, and for nothing else that a recipe decides."""
    bounded = {constraint.quantity for constraint in goal.constraints}
    objective = goal.objective.quantity if goal.objective is not None else ""
    return objective == "size" and bounded <= {"quality", "size", "time"}


def coarseness(model: ModelMap, steps: Steps) -> float:
    """Return about what share of the weights' variance a recipe's grids and cuts leave as error."""
    decisions, after = resolved(model, steps)
    grids = {one.parameter: one for one in decisions if one.weight is not None}
    narrow = any(one.dtype is not None for one in decisions)
    left = {layer.name: layer.num_parameters for layer in after.layers}
    error = 0.0
    for layer in model.layers:
        if layer.tied_to is not None:
            continue
        here, decided = left.get(layer.name, 0), grids.get(f"{layer.name}.weight")
        error += (OF_TOKENS if layer.role == "embedding" else 1.0) * (layer.num_parameters - here)
        if decided is None or decided.weight is None:
            error += narrow * OF_FLOATS * here
            continue
        error += here * 4.0**-decided.weight.bits * (1.0 if decided.weight.group_size else OF_ROWS)
        if decided.activation is not None:
            error += here * 4.0**-8 * OF_INPUTS
    return error / max(1, model.num_parameters)


def spread_first(model: ModelMap, recipes: Sequence[Steps], size: Callable[[Steps], int], count: int) -> list[Steps]:
    """Return recipes with `count` in front that are spread over all sizes; the others follow, largest first.

    Of those that are as coarse for as many bytes the one that needs fewer rows is taken: it is measured sooner.
    """
    rows = {steps: max((step.rows_needed() for step in steps), default=0) for steps in recipes}
    rough = {steps: coarseness(model, steps) for steps in recipes}
    best: list[Steps] = []  # from the smallest on: each is gentler than all that are smaller
    for steps in sorted(recipes, key=lambda one: (size(one), rough[one], rows[one])):
        if not best or rough[steps] < rough[best[-1]]:
            best.append(steps)
    front: list[Steps] = []
    for steps in reversed(best):
        if not front or size(steps) < ALIKE * size(front[-1]):
            front.append(steps)
    count = min(count, len(front))
    first = [front[(2 * number + 1) * len(front) // (2 * count)] for number in range(count)]
    rest = [steps for steps in recipes if steps not in set(first)]
    return [*first, *sorted(rest, key=lambda one: -size(one))]
