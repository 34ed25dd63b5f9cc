"""Turn the patterns of a recipe into named layers. A pattern that matches nothing is an error, never a silent skip.

A pattern is a role (`embedding`, `q`, `down`, `classifier`, ...), a kind (`linear`, `convolution`), a module name, a
name with `*` and `?`, or `re:` and a regular expression that must match the whole name. A module name also matches
the layers inside it: `model.layers.0` is every layer of the first block; a last component alone (`lm_head`) is enough.
`expert` is every layer of an expert; `up`, `gate`, `down` are those of experts too. A kind leaves routers out (what
decides where a token goes is rounded only where it is named), and the thin layers of adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import get_args

from gossamer.errors import RecipeError
from gossamer.models.roles import LayerInfo, ModelMap, Role

KINDS = {"linear": "linear", "convolution": "conv", "conv": "conv"}
ROLES = frozenset(get_args(Role))
EXPERTS = "expert"


def layers_matching(model: ModelMap, patterns: Iterable[str], setting: str) -> list[LayerInfo]:
    """Return the layers that any pattern matches, in the model's order.

    Raises RecipeError naming the pattern that matches nothing and what comes close; the words `linear` and
    `convolution` may match nothing as long as another pattern of the same setting matches.
    """
    patterns = list(patterns)
    matched: dict[str, LayerInfo] = {}
    empty = []
    for pattern in patterns:
        found = [layer for layer in model.layers if matches(layer, pattern)]
        matched.update((layer.name, layer) for layer in found)
        if not found and not (pattern in KINDS and len(patterns) > 1):
            empty.append(pattern)
    if empty or not matched:
        names = [layer.name for layer in model.layers]
        pattern = (empty or patterns or [""])[0]
        close = get_close_matches(pattern, [*names, *ROLES, EXPERTS, *(name.rpartition(".")[2] for name in names)], n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`gossamer inspect` lists the modules and their roles"
        raise RecipeError(f"{setting}: {pattern!r} matches none of {len(names)} layers", hint)
    return [layer for layer in model.layers if layer.name in matched]


def matches(layer: LayerInfo, pattern: str) -> bool:
    """Say whether one pattern means this layer.

    Raises RecipeError for a regular expression that cannot be read.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], layer.name) is not None
        except re.error as error:
            raise RecipeError(
                f"{pattern!r} is not a regular expression: {error}", "mend it, or use * patterns"
            ) from error
    if pattern in KINDS:
        return layer.kind == KINDS[pattern] and layer.role not in ("router", "adapter")
    if pattern in ROLES and layer.role in (pattern, f"{EXPERTS}_{pattern}"):
        return True
    if pattern == EXPERTS and layer.experts is not None:
        return True
    inside = layer.name == pattern or layer.name.startswith(pattern + ".") or layer.name.endswith("." + pattern)
    return inside or fnmatchcase(layer.name, pattern)
