"""Sizes that differ from place to place: `to: {encoder.layer.0: 768, encoder.layer.5: 50%}`.

A place is the name of a stack, a block or a part of it, a pattern, or a part of the name; the last one that means a
dimension holds for it, and what none means stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any

from gossamer.models.roles import Dimension

Size = int | float | str  # a number of units or a share (50%, 0.5)
Places = tuple[tuple[str, Size], ...]


def read_sizes(value: Any) -> Any:
    """Return what `to` was given, a mapping as pairs. Raises ValueError for sizes that mean nothing."""
    if not isinstance(value, Mapping):
        return checked_size(value)
    if not value:
        raise ValueError("it names no place")
    return tuple((str(place), checked_size(size)) for place, size in value.items())


def checked_size(value: Any) -> Any:
    """Return a size that means something. Raises ValueError for other words and numbers."""
    if isinstance(value, str) and read_share(value) is None:
        raise ValueError(f"{value!r} is neither a share like 50% nor a number")
    if isinstance(value, float) and not (isfinite(value) and (value < 1 or value == int(value))):
        raise ValueError(f"{value!r} is neither a share below 1 nor a whole number of units")
    return value


def read_share(text: str) -> float | None:
    """Return 0.5 for `50%`, None for what is no share.

    >>> read_share("50%")
    0.5
    """
    number = text.strip().removesuffix("%").strip()
    try:
        share = float(number) / 100 if text.strip().endswith("%") else None
    except ValueError:
        return None
    return share if share is not None and isfinite(share) else None


def units_left(size: Size, whole: int, multiple: int) -> int:
    """Return how many of `whole` units a size means, rounded up to a multiple where it is a share or a number.

    >>> units_left("50%", 12, 4)
    8
    """
    share = read_share(size) if isinstance(size, str) else size
    assert share is not None
    count = round(whole * share) if isinstance(size, str) or share < 1 else int(share)
    return -(-count // multiple) * multiple


def in_words(places: Places) -> str:
    """Return sizes in a few words: how many units are left in all of the places, or the shares as they were given.

    >>> in_words((("layer.0", 384), ("layer.1", 1152)))
    '1536 in 2 places'
    """
    sizes = [size for _, size in places]
    counts = [size for size in sizes if not isinstance(size, str) and size >= 1]
    left = f"{sum(counts):g}" if len(counts) == len(sizes) else " and ".join(map(str, dict.fromkeys(sizes)))
    return f"{left} in {len(places)} place{'s' if len(places) > 1 else ''}"


def meant(one: Dimension, target: str) -> bool:
    """Say whether a target means a dimension: its name or its stack's, a pattern, or a part of the name."""
    parts = set(one.name.split(".")) | set(one.stack.split("."))
    return target in parts or any(
        fnmatchcase(name, target) or name.startswith(f"{target}.") for name in (one.name, one.stack)
    )
