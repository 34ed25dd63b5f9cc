"""A recipe: techniques in order with their settings, as people write it in YAML and as the planner hands it on.

    - quantize: {bits: 4, group_size: 128, ignore: [lm_head]}
    - cast: {dtype: bfloat16}

or, with a name, the same list under `recipe:`. Which techniques and settings exist is not checked here but where the
techniques are known. The file is untrusted input: plain data only, no tags, anchors or merges, and a key that is
written twice is an error and not the last one wins.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gossamer.errors import RecipeError

SHAPE = "a recipe is a list of steps, each `- technique: {setting: value}`"
TOP_KEYS = ("recipe", "name", "description")
MAX_DEPTH = 50
PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class Step(BaseModel):
    """Hold one step: a technique's name and the settings that differ from its defaults, as JSON values.

    `line` is where it stands in the file it was read from; it takes no part in comparisons and is not written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    technique: str = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    line: int | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="after")
    def _plain(self) -> Self:
        _check_plain(self.settings, f"settings of {self.technique}")
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.entry() == other.entry()

    def __hash__(self) -> int:
        return hash(self.technique)

    def entry(self) -> dict[str, Any]:
        """Return {technique: settings}."""
        return {self.technique: self.settings}


class Recipe(BaseModel):
    """Hold the steps in order. `Recipe.from_yaml(recipe.to_yaml()) == recipe`.

    >>> Recipe.from_yaml("- quantize: {bits: 4}").steps[0].settings
    {'bits': 4}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[Step, ...] = Field(min_length=1)
    name: str = ""
    description: str = ""

    @classmethod
    def from_yaml(cls, text: str, origin: str = "recipe") -> Self:
        """Read a recipe. Raises RecipeError naming `origin` and the line that is malformed, doubled or misshapen."""
        top = _compose(text, origin)
        named: dict[str, str] = {}
        steps: Node | None = top
        if isinstance(top, MappingNode):
            parts = {_key(key, origin): value for key, value in top.value}
            for key, node in top.value:
                if key.value not in TOP_KEYS:
                    _refuse(key, origin, f"unknown key {key.value!r}", f"known: {', '.join(TOP_KEYS)}; {SHAPE}")
                if key.value != "recipe":
                    named[key.value] = _text(node, key.value, origin)
            steps = parts.get("recipe")
        if not isinstance(steps, SequenceNode):
            _refuse(steps or top, origin, "no list of steps", SHAPE)
        if not steps.value:
            _refuse(steps, origin, "the list of steps is empty", SHAPE)
        return cls(steps=tuple(_read_step(node, origin) for node in steps.value), **named)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe file. Raises RecipeError when it cannot be read; see `from_yaml`."""
        try:
            text = Path(path).read_text("utf-8")
        except OSError as error:
            raise RecipeError(f"cannot read recipe {path}: {error.strerror}", "check the path") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
        return cls.from_yaml(text, str(path))

    def to_yaml(self) -> str:
        """Return the recipe as YAML: the bare list, or with its name and description above it."""
        steps = self.entries()
        named = {key: text for key, text in (("name", self.name), ("description", self.description)) if text}
        whole = {**named, "recipe": steps} if named else steps
        readable = json.dumps(whole, ensure_ascii=False).isprintable()  # PyYAML loses U+0085 unless it is escaped
        return yaml.dump(whole, Dumper=_PlainDumper, sort_keys=False, allow_unicode=readable, width=100)

    def dump(self, path: str | Path) -> None:
        """Write the recipe as a YAML file. Raises RecipeError when it cannot be written."""
        try:
            Path(path).write_text(self.to_yaml(), "utf-8")
        except OSError as error:
            raise RecipeError(f"cannot write recipe {path}: {error.strerror}", "name another file") from error

    def entries(self) -> list[dict[str, Any]]:
        """Return [{technique: settings}, ...]: the JSON form, also what a fingerprint is taken of."""
        return [step.entry() for step in self.steps]

    def __str__(self) -> str:
        return " + ".join(
            step.technique + "".join(f" {key}={value}" for key, value in step.settings.items()) for step in self.steps
        )


def load(path: str | Path) -> Recipe:
    """Read a recipe file; see `Recipe.load`."""
    return Recipe.load(path)


class _PlainDumper(yaml.SafeDumper):
    """Write equal lists twice instead of with an anchor, which reading refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _compose(text: str, origin: str) -> Node:
    """Parse YAML into nodes that know their lines, and check every one of them."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:  # the parser recurses, and takes quadratic time over deep nesting
                raise RecipeError(f"{origin}, line {line}: nested deeper than {MAX_DEPTH} levels", SHAPE)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError(f"{origin}, line {line}: anchors and aliases are not taken", "write it out in full")
        top = yaml.compose(text, Loader=yaml.SafeLoader)
        if top is None:
            raise RecipeError(f"{origin} is empty", SHAPE)
        _check_node(top, origin)
    except yaml.reader.ReaderError as error:
        raise RecipeError(f"{origin}: {error.reason} (character {error.position})", "write plain text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = error.problem or error.context
        raise RecipeError(f"{origin}, line {line}: not valid YAML: {what}", SHAPE) from error
    return top


def _check_node(node: Node, origin: str) -> None:
    """Refuse tags, keys that are no text or come twice, and numbers that are not finite, at any depth."""
    if node.tag not in {f"tag:yaml.org,2002:{tag}" for tag in PLAIN_TAGS}:
        kind = node.tag.rpartition(":")[2]
        _refuse(node, origin, f"{kind} values are not taken", "quote it to make it text")
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name = _key(key, origin)
            if name in lines:
                _refuse(key, origin, f"{name!r} is given twice (first in line {lines[name]})", "keep one of them")
            lines[name] = key.start_mark.line + 1
            _check_node(value, origin)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            _check_node(item, origin)
    else:
        value = _construct(node, origin)
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(node, origin, f"{node.value} is not a finite number", "write a number")


def _read_step(node: Node, origin: str) -> Step:
    if isinstance(node, ScalarNode):
        _refuse(node, origin, f"step {node.value!r} is no mapping", f"write `- {node.value}: {{}}`")
    if not isinstance(node, MappingNode) or len(node.value) != 1:
        found = f"{len(node.value)} keys" if isinstance(node, MappingNode) else "a list"
        _refuse(node, origin, f"a step names one technique, found {found}", SHAPE)
    key, settings = node.value[0]
    empty = isinstance(settings, ScalarNode) and settings.tag.endswith(":null")
    if not (empty or isinstance(settings, MappingNode)):
        _refuse(settings, origin, f"settings of {key.value!r} are no mapping", SHAPE)
    values = {} if empty else _construct(settings, origin)
    if not key.value:
        _refuse(key, origin, "a step names no technique", SHAPE)
    return Step(technique=key.value, settings=values, line=key.start_mark.line + 1)


def _construct(node: Node, origin: str) -> Any:
    """Return the plain value of a checked node. A loader without text: the node is all it needs."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (ValueError, OverflowError) as error:
        _refuse(node, origin, f"cannot read the value: {error}", "quote it to make it text")
    finally:
        loader.dispose()


def _key(node: Node, origin: str) -> str:
    if not isinstance(node, ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        shown = repr(node.value) if isinstance(node, ScalarNode) else "a list or mapping"
        _refuse(node, origin, f"key {shown} is not text", "quote it; YAML reads on, off, yes, no as true or false")
    return str(node.value)


def _text(node: Node, key: str, origin: str) -> str:
    if not isinstance(node, ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        _refuse(node, origin, f"{key} is not text", f"write {key}: some words")
    return str(node.value)


def _refuse(node: Node, origin: str, what: str, hint: str) -> NoReturn:
    raise RecipeError(f"{origin}, line {node.start_mark.line + 1}: {what}", hint)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what YAML and JSON cannot both hold."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise RecipeError(f"{where}: key {key!r} is not text", "use text keys")
            _check_plain(part, f"{where}.{key}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_plain(part, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {value} is not a finite number", "write a number")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise RecipeError(f"{where}: {type(value).__name__} is no plain value", "use text, numbers, lists, mappings")
