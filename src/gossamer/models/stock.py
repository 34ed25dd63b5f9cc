"""What a stock model class can be: which numbers of its config say which shapes, found by building it without values.

No architecture is named. A class is built on torch's meta device from a changed config, and the shapes of its
parameters are compared with those that are wanted; the change that leaves the fewest different is kept, until none is.
What no config can say (another number of heads in one layer only, where the class has one number for all) is found out
the same way, in milliseconds, and never by a model that does not load.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from gossamer.models.config import quiet_transformers
from gossamer.models.experts import take_apart
from gossamer.models.lazy import without_values

Path = tuple[str, ...]  # of a number in a config, through the configs inside it
Shapes = Mapping[str, tuple[int, ...]]
REFUSALS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    RuntimeError,
    KeyError,
    IndexError,
    AttributeError,
    ZeroDivisionError,
)


@dataclass(frozen=True)
class Change:
    """Say what is changed in a config: numbers by path, and of lists with one entry a block which entries stay."""

    numbers: Mapping[Path, int] = field(default_factory=dict)
    kept_blocks: Mapping[int, Sequence[int]] = field(
        default_factory=dict
    )  # blocks of a stack before -> those that stay

    def with_number(self, path: Path, value: int) -> Change:
        """Return the change with one more number."""
        return Change({**self.numbers, path: value}, self.kept_blocks)

    def names(self) -> tuple[str, ...]:
        """Return the names of the numbers, as `text_config.num_hidden_layers`."""
        return tuple(".".join(path) for path in self.numbers)


def changed_config(config: PretrainedConfig, change: Change) -> PretrainedConfig:
    """Return the config with the change made; its own class checks it. Raises what that raises, ValueError mostly."""
    values = config.to_dict()
    for path, value in change.numbers.items():
        inside: Any = values
        for name in path[:-1]:
            inside = inside[int(name) if isinstance(inside, list) else name]
        inside[int(path[-1]) if isinstance(inside, list) else path[-1]] = value
    if change.kept_blocks:
        _shorten(values, change.kept_blocks)
    for name in ("id2label", "label2id"):  # they decide the number of labels, which is not given twice
        if values.get(name):
            values.pop("num_labels", None)
    with quiet_transformers():
        return type(config).from_dict(values, attn_implementation=config._attn_implementation)


def build_empty(module: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return a module of the same class for a config, without values, experts taken apart as in every model here."""
    with quiet_transformers():
        built = without_values(lambda: type(module)(config))
    assert isinstance(built, PreTrainedModel)
    take_apart(built)
    return built


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, tied ones under each of their names."""
    return {name: tuple(value.shape) for name, value in module.named_parameters(remove_duplicate=False)}


@dataclass(frozen=True)
class Fit:
    """Hold how near a config comes to shapes that are wanted: the change, and what still differs (wanted, got)."""

    change: Change
    differs: Mapping[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]


class Stock:
    """Find what the config of a module must say so that its class has other shapes. Builds are remembered."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.numbers = dict(_numbers(module.config))  # that may be sizes, by path
        self._built: dict[tuple[Any, ...], Shapes | None] = {}

    def fit(
        self,
        wanted: Shapes,
        sizes: Mapping[int, int],
        *,
        pinned: int | None = None,
        said: Sequence[int] = (),
        kept_blocks: Mapping[int, Sequence[int]] | None = None,
    ) -> Fit | None:
        """Return the change of the config after which the class has the wanted shapes, or comes nearest to it.

        `sizes` are numbers that become others (768 -> 512); a number of the config is changed when it is one of them.
        `pinned` is the size of a head, where heads are counted: a config may leave it open and derive it, so it is said
        where that brings shapes nearer; it is never changed (half as many heads and heads half as wide have one shape).
        `said` are such sizes where the width is what changes, and may.
        None where no change brings shapes nearer.

        >>> Stock(model).fit(wanted, {1536: 768}).change.names()  # doctest: +SKIP
        ('intermediate_size',)
        """
        start = self._fit(wanted, Change({}, kept_blocks or {}))
        best = start
        while best is None or best.differs:
            change = best.change if best is not None else Change({}, kept_blocks or {})
            for options in self._options(sizes, pinned, change, said):
                fits = [fit for option in options if (fit := self._fit(wanted, option)) is not None]
                nearest = min(fits, key=lambda fit: len(fit.differs), default=None)
                if nearest is not None and (best is None or len(nearest.differs) < len(best.differs)):
                    best = nearest
                    break
            else:
                break
        return None if best is start and (best is None or best.differs) else best

    def shapes(self, change: Change) -> Shapes | None:
        """Return the shapes of the class after a change of its config; None where config or class refuse it."""
        key = (*sorted(change.numbers.items()), *((count, tuple(kept)) for count, kept in change.kept_blocks.items()))
        if key not in self._built:
            try:
                self._built[key] = shapes_of(build_empty(self.module, changed_config(self.module.config, change)))
            except REFUSALS:
                self._built[key] = None
        return self._built[key]

    def accepts(self, change: Change) -> bool:
        """Say whether the config takes a change, without building anything."""
        try:
            changed_config(self.module.config, change)
        except REFUSALS:
            return False
        return True

    def number(self, path: Path) -> int | None:
        """Return a number of the config as it is."""
        return self.numbers[path]

    @property
    def token_ids(self) -> tuple[Path, ...]:
        """Return where the config names a token by its number."""
        return tuple(_token_ids(self.module.config.to_dict()))

    def _fit(self, wanted: Shapes, change: Change) -> Fit | None:
        built = self.shapes(change)
        if built is None:
            return None
        names = dict.fromkeys((*wanted, *built))
        pairs = {name: (wanted.get(name), built.get(name)) for name in names}
        return Fit(change, {name: (ours, theirs) for name, (ours, theirs) in pairs.items() if ours != theirs})

    def _options(
        self, sizes: Mapping[int, int], pinned: int | None, start: Change, said: Sequence[int] = ()
    ) -> Iterator[list[Change]]:
        """Yield the start with one more number changed, then with two more where one is refused or open by itself."""
        singles, hard = [], set()
        for path, number in self.numbers.items():
            if path in start.numbers:
                continue
            if path[-1] in UNSAID:
                singles += [(path, pinned)] if number is None and pinned is not None else []
                singles += [(path, size) for size in said] if number is None else []
            elif pinned is not None and any(word in path[-1] for word in ("dim", "size")):
                continue
            elif number is None:
                singles += [(path, value) for value in dict.fromkeys((*sizes.values(), *sizes))]
            elif number in sizes:
                singles.append((path, sizes[number]))
        changes = [start.with_number(*single) for single in singles]
        yield changes
        for (path, _), change in zip(singles, changes, strict=True):
            if self.numbers[path] is None or self.shapes(change) is None:
                hard.add(path)
        pairs = [(one, two) for index, one in enumerate(singles) for two in singles[index + 1 :]]
        pairs = [(one, two) for one, two in pairs if one[0] != two[0] and (one[0] in hard) != (two[0] in hard)]
        yield [start.with_number(*one).with_number(*two) for one, two in pairs]


def _numbers(config: PretrainedConfig, inside: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """Yield the numbers of a config that may be sizes, and those that are left open."""
    values = config.to_dict()
    for name in values if inside else dict.fromkeys((*values, *UNSAID)):
        value, part = values.get(name), getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _numbers(part, (*inside, name))
        elif value is None and (name in OPEN or name in UNSAID):
            yield (*inside, name), None
        elif isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_token_id"):
            yield (*inside, name), value


def _token_ids(values: Mapping[str, Any], inside: Path = ()) -> Iterator[Path]:
    """Yield the paths of settings that are the number of a token."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value, (*inside, name))
        elif str(name).endswith("_token_id") and isinstance(value, int):
            yield (*inside, name)


# numbers that configs leave open and derive from others (any other None means that a feature is off), and those that
# classes look for whether or not their config declares them
OPEN = frozenset(("n_inner", "intermediate_size", "num_key_value_heads", "moe_intermediate_size", "ffn_dim"))
UNSAID = ("head_dim",)


def _shorten(values: dict[str, Any], kept_blocks: Mapping[int, Sequence[int]]) -> None:
    """Keep the entries of blocks that stay in lists that have one entry a block (the kinds of attention)."""
    for name, value in list(values.items()):
        if isinstance(value, dict):
            _shorten(value, kept_blocks)
        elif isinstance(value, list) and len(value) in kept_blocks and name != "architectures":
            values[name] = [copy.deepcopy(value[index]) for index in kept_blocks[len(value)]]
