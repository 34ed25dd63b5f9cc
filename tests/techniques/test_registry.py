from __future__ import annotations

import itertools

import pytest

from gossamer.errors import RecipeError
from gossamer.recipe import Recipe, Step
from gossamer.techniques.registry import build, recipe_of, resolve, techniques


def recipe(*steps: tuple[str, dict[str, object]]) -> Recipe:
    return Recipe(steps=tuple(Step(technique=name, settings=settings) for name, settings in steps))


def test_techniques_are_found_by_their_files() -> None:
    assert {"quantize", "cast"} <= set(techniques())
    for name, technique in techniques().items():
        assert technique.name == name
        assert technique.__doc__
        assert all(field.description for field in technique.model_fields.values()), name


def test_declared_orders_are_symmetric() -> None:
    """What one technique says of another must not contradict what the other says of it."""
    for (name, one), (other_name, other) in itertools.permutations(techniques().items(), 2):
        assert not (other_name in one.needs.after and name in other.needs.after)
        assert not (other_name in one.needs.before and name in other.needs.before)
        for named in (*one.needs.after, *one.needs.before, *one.needs.excludes):
            assert named in techniques(), f"{name} names {named}, which is no technique"


def test_order_against_a_declaration_is_refused() -> None:
    with pytest.raises(RecipeError, match="cast stands before quantize, but must come after it"):
        resolve(recipe(("cast", {}), ("quantize", {"bits": 8})))
    assert [step.name for step in resolve(recipe(("quantize", {}), ("cast", {})))] == ["quantize", "cast"]


@pytest.mark.parametrize(
    ("step", "message", "hint"),
    [
        (("quantise", {}), "no technique is called 'quantise'", "did you mean quantize?"),
        (("quantize", {"bit": 4}), "quantize has no setting 'bit'", "did you mean bits?"),
        (("quantize", {"bits": 9}), "quantize: bits = 9", "width of a weight's code"),
        (("quantize", {"bits": 4, "activations": "static"}), "needs weights of 8 or 7 bits", ""),
        (("quantize", {"group_size": "many"}), "quantize: group_size = 'many'", ""),
    ],
)
def test_wrong_steps_are_explained(step: tuple[str, dict[str, object]], message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as found:
        build(Step(technique=step[0], settings=step[1]))
    assert message in found.value.message
    assert hint in found.value.hint


def test_a_recipe_comes_back_from_its_techniques() -> None:
    steps = resolve(
        recipe(("quantize", {"bits": 4, "group_size": 32, "ignore": ["lm_head"]}), ("cast", {"dtype": "fp16"}))
    )
    assert resolve(recipe_of(steps)) == steps
