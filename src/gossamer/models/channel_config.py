"""Which numbers of config.json say how many channels a network has: found by building its class from other numbers.

Every number that is the size of some dimension, one in a list too (`hidden_sizes`), is made smaller by one share, as
all dimensions are. If the class then has the shapes that are wanted, numbers that it has them without are given back;
a dimension follows the numbers without whose change its own parameters keep their sizes. Dimensions that follow one
number go together: by the same share, since a bottleneck has a quarter of the number that says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gossamer.models.dimensions import cut_shapes
from gossamer.models.roles import Dimension
from gossamer.models.stock import Change, Path, Shapes, Stock, shapes_of


def said_by_numbers(module: PreTrainedModel, dimensions: Sequence[Dimension]) -> list[Dimension]:
    """Return dimensions with the numbers that say their sizes; with none where no config says them.

    >>> said_by_numbers(resnet, dimensions)[0].attributes  # doctest: +SKIP
    ('embedding_size', 'hidden_sizes.0')
    """
    unsaid = [replace(one, attributes=()) for one in dimensions]
    part = next((part for part in (2, 3, 5, 7) if all(one.size % part == 0 for one in dimensions)), None)
    if part is None or not dimensions:
        return unsaid
    sizes = {one.size: one.size // part for one in dimensions}
    stock, shapes = Stock(module), shapes_of(module)
    wanted = cut_shapes(shapes, {one: sizes[one.size] for one in dimensions})
    numbers = {path: sizes[value] for path, value in _numbers(module.config.to_dict()) if value in sizes}
    if stock.shapes(Change(numbers)) != wanted:
        return unsaid
    for path in list(numbers):
        fewer = {other: value for other, value in numbers.items() if other != path}
        if stock.shapes(Change(fewer)) == wanted:
            numbers = fewer
    followed = {one: _followed(stock, numbers, wanted, one) for one in dimensions}
    return [
        replace(one, attributes=tuple(".".join(path) for path in numbers if path in _together(followed, one)))
        for one in dimensions
    ]


def channel_change(module: nn.Module, shapes: Shapes, sizes: Mapping[Dimension, int]) -> Change | None:
    """Return the change of a config that says dimensions of other sizes; None where none says them.

    `shapes` are those of all parameters afterwards.
    """
    if not isinstance(module, PreTrainedModel) or not all(one.attributes for one in sizes):
        return None
    now = {".".join(path): (path, value) for path, value in _numbers(module.config.to_dict())}
    numbers: dict[Path, int] = {}
    for one, size in sizes.items():
        for name in one.attributes or ():
            path, value = now[name]
            if value * size % one.size or numbers.setdefault(path, value * size // one.size) * one.size != value * size:
                return None
    change = Change(numbers)
    return change if Stock(module).shapes(change) == shapes else None


def _numbers(values: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield the whole numbers of a config with their paths, through lists too."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name not in ("id2label", "label2id"):
                yield from _numbers(value, (*path, str(name)))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _numbers(value, (*path, str(number)))
    elif isinstance(values, int) and not isinstance(values, bool):
        yield path, values


def _followed(stock: Stock, numbers: Mapping[Path, int], wanted: Shapes, one: Dimension) -> set[Path]:
    """Return the numbers without whose change a parameter of a dimension has another size along it."""
    found = set()
    for path in numbers:
        built = stock.shapes(Change({other: value for other, value in numbers.items() if other != path}))
        if built is None or any(
            built.get(member.parameter, wanted[member.parameter])[member.axis] != wanted[member.parameter][member.axis]
            for member in one.members
        ):
            found.add(path)
    return found


def _together(followed: Mapping[Dimension, set[Path]], one: Dimension) -> set[Path]:
    """Return the numbers that a dimension follows, and those that others follow which share one with it."""
    together = set(followed[one])
    while more := {path for paths in followed.values() if paths & together for path in paths} - together:
        together |= more
    return together
