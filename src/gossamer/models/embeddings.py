"""Find what has a row for each token: embedding, head and its bias, and the number of the config that says how many.

No architecture is named: the numbers of the config that are the rows of the input embedding are made smaller one by
one, and what changes with one of them belongs to it (`stock.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from gossamer.models.roles import Dimension, Member
from gossamer.models.stock import Change, Path, Shapes, Stock


def find_vocabulary(stock: Stock, shapes: Shapes) -> Iterator[Dimension]:
    """Yield the dimension `vocabulary` of a model whose config says how many tokens it knows; nothing for others.

    >>> next(find_vocabulary(Stock(bert), shapes_of(bert))).attributes  # doctest: +SKIP
    ('vocab_size',)
    """
    embedding = _input_embedding(stock.module)
    if embedding is None:
        return
    name = next(name for name, part in stock.module.named_modules() if part is embedding)
    rows = embedding.num_embeddings
    for path in (path for path, number in stock.numbers.items() if number == rows and rows > 1):
        smaller = stock.shapes(Change({path: rows - 1, **dict.fromkeys(_paddings(stock), 0)}))
        members = _members(shapes, smaller, rows) if smaller is not None else None
        if members is not None and any(member.parameter == f"{name}.weight" for member in members):
            yield Dimension("vocabulary", name, name, None, rows, tuple(members), (), (".".join(path),))
            return


def _input_embedding(module: PreTrainedModel) -> nn.Embedding | None:
    try:
        found = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # transformers: the model has none
        return None
    return found if isinstance(found, nn.Embedding) else None


def _paddings(stock: Stock) -> list[Path]:
    """Return where the config names the padding token: an embedding refuses one beyond its rows."""
    return [path for path in stock.token_ids if path[-1] == "pad_token_id"]


def _members(shapes: Shapes, smaller: Shapes, rows: int) -> Sequence[Member] | None:
    """Return the axes that are one shorter in the smaller shapes; None where anything else differs too."""
    if smaller.keys() != shapes.keys():
        return None
    found = []
    for name, shape in shapes.items():
        pairs = enumerate(zip(shape, smaller[name], strict=True)) if len(shape) == len(smaller[name]) else ()
        axes = [axis for axis, (size, now) in pairs if size != now]
        if smaller[name] != shape and (len(axes) != 1 or shape[axes[0]] != rows):
            return None
        found += [Member(name, axis) for axis in axes]
    return found
