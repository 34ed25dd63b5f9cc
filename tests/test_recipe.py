from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import RecipeError
from gossamer.recipe import Recipe, Step, load

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
steps = st.builds(Step, technique=st.text(min_size=1), settings=st.dictionaries(st.text(), values, max_size=3))
recipes = st.builds(
    Recipe, steps=st.lists(steps, min_size=1, max_size=3).map(tuple), name=st.text(), description=st.text()
)


@settings(deadline=None)
@given(recipes)
def test_a_recipe_written_reads_back_as_itself(recipe: Recipe) -> None:
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    # == takes 1 for 1.0 and True; JSON does not
    assert json.dumps(again.entries()) == json.dumps(recipe.entries())


def test_both_forms_are_read() -> None:
    bare = Recipe.from_yaml("- quantize: {bits: 4, ignore: [lm_head]}\n- cast:\n")
    assert bare.entries() == [{"quantize": {"bits": 4, "ignore": ["lm_head"]}}, {"cast": {}}]
    named = Recipe.from_yaml("name: small\ndescription: for phones\nrecipe:\n  - quantize: {bits: 4}\n")
    assert (named.name, named.description, named.steps[0].technique) == ("small", "for phones", "quantize")
    assert [step.line for step in bare.steps] == [1, 2]
    assert named.steps[0].line == 4


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    shared = [1, 2]
    recipe = Recipe(steps=(Step(technique="a", settings={"x": shared, "y": shared}),), name="né")
    recipe.dump(tmp_path / "recipe.yaml")
    assert load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "recipe", "is empty"),
        ("# nothing\n", "recipe", "is empty"),
        ("[]", "line 1", "list of steps is empty"),
        ("hello", "line 1", "no list of steps"),
        ("recipe: 3", "line 1", "no list of steps"),
        ("name: x\nsteps: []", "line 2", "unknown key 'steps'"),
        ("name: [a]\nrecipe: [{q: {}}]", "line 1", "name is not text"),
        ("- q: {a: 1}\n- r:\n    a: 1\n    a: 2\n", "line 4", "'a' is given twice (first in line 3)"),
        ("- q:\n    x: {k: 1,\n        k: 2}", "line 3", "'k' is given twice (first in line 2)"),
        ("- q: {}\n- q: 3", "line 2", "settings of 'q'"),
        ("- q: [1]", "line 1", "settings of 'q'"),
        ("- q: {}\n- r", "line 2", "step 'r' is no mapping"),
        ("- - q", "line 1", "found a list"),
        ("- q: {}\n\n- {a: {}, b: {}}", "line 3", "found 2 keys"),
        ("- {}", "line 1", "found 0 keys"),
        ("- '': {}", "line 1", "names no technique"),
        ("- 1: {}", "line 1", "key '1' is not text"),
        ("- q: {on: 1}", "line 1", "key 'on' is not text"),
        ("- q: {[a]: 1}", "line 1", "is not text"),
        ("- q:\n    a: &x [1]\n    b: *x", "line 2", "anchors and aliases"),
        ("- q: {<<: {a: 1}}", "line 1", "is not text"),
        ("- q: {a: !!python/object/apply:os.system [ls]}", "line 1", "values are not taken"),
        ("- q:\n    a: 2020-01-01", "line 2", "timestamp values"),
        ("- q: {a: .nan}", "line 1", "not a finite number"),
        ("- q: {a: -.inf}", "line 1", "not a finite number"),
        ("- q: {a: !!int x}", "line 1", "cannot read the value"),
        ("- q: {a: 1}\n- q: {a: [1, 2}", "line 2", "not valid YAML"),
        ("- q: {a: 'open", "line 1", "not valid YAML"),
        ("- q: {}\n---\n- r: {}", "line 2", "not valid YAML"),
        ("- q: \x00", "character 5", "special characters"),
        ("- q: {a: " + "[" * 500 + "]" * 500 + "}", "line 1", "nested deeper than 50 levels"),
    ],
)
def test_a_bad_recipe_names_the_line(text: str, where: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert where in caught.value.message
    assert what in caught.value.message
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("- q: {a: é}".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(byte 9\)"):
        load(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="cannot write"):
        Recipe(steps=(Step(technique="q"),)).dump(tmp_path)


@pytest.mark.parametrize("value", [{1}, (1,), float("nan"), {1: 2}, Path("x"), b"x"])
def test_settings_are_plain_values(value: object) -> None:
    with pytest.raises(RecipeError, match="settings of q"):
        Step(technique="q", settings={"a": [value]})
