"""What a model reads: its tokenizer, how often the user's rows hold each token, and the same after some are gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from gossamer.errors import ModelError
from gossamer.models.tokenizer_files import TOKENIZER, as_text, token_ids, trimmed_files
from gossamer.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gossamer.models.source import Source

Counts = Mapping[int, int]  # token -> how often


class Words:
    """Hold the tokenizer of a source and the counts of its tokens in the rows; both are looked at when first asked for.

    `count` gives the counts over all rows that a technique may look at, `count_apart` those over rows other than the
    ones that effects are measured on. `refusal` says why the tokens cannot be others, empty where they can.
    """

    def __init__(
        self,
        source: Source,
        count: Callable[[], Counts] = dict,
        count_apart: Callable[[], Counts] | None = None,
        refusal: str = "",
    ) -> None:
        self.source = source
        self.refusal = refusal
        self._count = count
        self._count_apart = count_apart
        self._chosen: dict[tuple[int, int | None, tuple[str, ...]], tuple[int, ...]] = {}
        self._trimmed: dict[tuple[int, ...], Words] = {}

    @cached_property
    def counts(self) -> Counts:
        """Return how often the rows hold each token."""
        return self._count()

    @cached_property
    def apart(self) -> Words:
        """Return the same words counted over rows on which nothing is measured: what an effect is honest about."""
        return self if self._count_apart is None else Words(self.source, self._count_apart, None, self.refusal)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Return the tokens. Raises ModelError for a model without a tokenizer.json, or one that is not understood."""
        name = self.source.name
        if TOKENIZER not in self.source.beside.names:
            raise ModelError(
                f"{name} has no {TOKENIZER}, the one form of a tokenizer that is trimmed",
                "write it once: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            )
        try:
            return Vocabulary(json.loads(self.source.beside.read(TOKENIZER)))
        except ModelError as error:
            raise ModelError(f"the vocabulary of {name} cannot be trimmed: {error.message}", error.hint) from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"{TOKENIZER} of {name} cannot be read: {error!r}", "save the tokenizer again") from error

    @cached_property
    def held(self) -> frozenset[int]:
        """Return the tokens that must stay: the tokenizer's, those that its class calls special, and the configs'."""
        found = set(getattr(self.source.processor(), "all_special_ids", ()))
        for name in ("config.json", "generation_config.json"):
            if name in self.source.beside.names:
                found |= set(token_ids(json.loads(self.source.beside.read(name))))
        return self.vocabulary.held | (found & set(self.vocabulary.tokens))

    @cached_property
    def num_bytes(self) -> int:
        """Return the bytes of the files that ship beside the weights."""
        return sum(len(self.source.beside.read(name)) for name in self.source.beside.names)

    def must(self, keep: tuple[str, ...]) -> frozenset[int]:
        """Return the tokens that must stay together with those of some texts, and what these need to come about."""
        texts = set().union(*map(self.numbers_of, keep))
        return self.held.union(*map(self.vocabulary.needed, texts))

    def chosen(self, least: int, size: int | None, keep: tuple[str, ...] = ()) -> tuple[int, ...]:
        """Return the numbers of the tokens that stay, in order; see `Vocabulary.chosen`. `keep` are texts."""
        key = (least, size, keep)
        if key not in self._chosen:
            self._chosen[key] = self.vocabulary.chosen(self.counts, self.must(keep), least=least, size=size)
        return self._chosen[key]

    def numbers_of(self, text: str) -> set[int]:
        """Return the tokens of a text, special ones around it left out."""
        return set(self.source.processor()(text, add_special_tokens=False)["input_ids"])

    def trimmed(self, kept: tuple[int, ...], size_names: tuple[str, ...]) -> Words:
        """Return the words of a model of which only these tokens stay; `size_names` say their number in config.json."""
        if kept not in self._trimmed:
            files = {name: self.source.beside.read(name) for name in self.source.beside.names}
            found = trimmed_files(files, self.vocabulary, kept)
            config = json.loads(found["config.json"])
            for name in size_names:
                inside = config
                *path, last = name.split(".")
                for part in path:
                    inside = inside.setdefault(part, {})
                inside[last] = len(kept)
            found["config.json"] = as_text(config, indent=2)
            changed = {name: content for name, content in found.items() if content != files[name]}
            self._trimmed[kept] = Words(
                self.source.with_files(changed, kept), refusal="its vocabulary was trimmed before"
            )
        return self._trimmed[kept]
