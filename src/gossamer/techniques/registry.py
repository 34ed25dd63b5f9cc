"""Find every technique, and turn a recipe's entries into technique objects in an order that makes sense.

A technique is found because its file lies in a family's folder: no second list has to be kept.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache

from pydantic import ValidationError

import gossamer.techniques
from gossamer.errors import RecipeError
from gossamer.recipe import Recipe, Step
from gossamer.techniques.base import Technique


@cache
def techniques() -> dict[str, type[Technique]]:
    """Return every technique class by the name that recipes use."""
    found: dict[str, type[Technique]] = {}
    for module in pkgutil.walk_packages(gossamer.techniques.__path__, prefix="gossamer.techniques."):
        for value in vars(importlib.import_module(module.name)).values():
            known = isinstance(value, type) and issubclass(value, Technique) and not value.__name__.startswith("_")
            if known and not inspect.isabstract(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def resolve(recipe: Recipe) -> list[Technique]:
    """Return the recipe's steps as techniques, checked alone and together.

    Raises RecipeError for an unknown technique or setting, for an order that makes no sense, and for steps that
    exclude each other.
    """
    steps = [build(step) for step in recipe.steps]
    for position, step in enumerate(steps):
        for later in steps[position + 1 :]:
            if later.name in step.needs.excludes or step.name in later.needs.excludes:
                raise RecipeError(f"{step.name} and {later.name} cannot be combined", "choose one of them")
            if step.name != later.name and (later.name in step.needs.after or step.name in later.needs.before):
                raise RecipeError(
                    f"{step.name} stands before {later.name}, but must come after it", "swap the two steps"
                )
    return steps


def build(step: Step) -> Technique:
    """Return one recipe entry as a technique. Raises RecipeError naming the setting and what would be right."""
    known = techniques()
    if step.technique not in known:
        close = get_close_matches(step.technique, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RecipeError(f"no technique is called {step.technique!r}", f"{hint}known: {', '.join(known)}")
    try:
        return known[step.technique].model_validate(dict(step.settings))
    except ValidationError as error:
        raise RecipeError(*_explained(step, error)) from error


def _explained(step: Step, error: ValidationError) -> tuple[str, str]:
    """Return (message, hint) for the first thing that is wrong with a step's settings."""
    fields = techniques()[step.technique].model_fields
    first = error.errors()[0]
    setting = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = get_close_matches(setting, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"settings: {', '.join(fields)}"
        return f"{step.technique} has no setting {setting!r}", hint
    where = f"{step.technique}: {setting} = {first['input']!r}" if setting else step.technique
    return f"{where}: {first['msg'].removeprefix('Value error, ')}", _allowed(fields, setting)


def _allowed(fields: Mapping[str, object], setting: str) -> str:
    """Return the description of a setting as a hint."""
    description = getattr(fields.get(setting), "description", None)
    return str(description) if description else f"settings: {', '.join(fields)}"


def recipe_of(steps: tuple[Technique, ...] | list[Technique]) -> Recipe:
    """Return the recipe that holds these steps."""
    entries = [step.entry() for step in steps]
    return Recipe(steps=tuple(Step(technique=name, settings=s) for entry in entries for name, s in entry.items()))
