"""The technique `vocabulary`: keep the tokens of the user's domain; embedding, head and tokenizer are cut alike.

A small encoder is half embedding, and most rows of it are for words that its user's texts never hold. Tokens that the
rows hold stay, and all by which any text becomes tokens (`models/vocabulary.py`): a word whose token is gone is read in
smaller pieces. The tokens close ranks, so everything from here on, later steps and the proof too, reads the rows with
the tokenizer that ships: what is lost is measured on texts, not on tokens.

A step of its own and not `prune: {what: vocabulary}`: which tokens go is counted in the rows, all of them, and not seen
in weights or activations; none of `by`, `refit`, `damping` or `targets` means anything here.

Left out: tasks that are scored token by token (`Task.tokens_fixed`), merging rows of tokens that go into those that
take their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import GossamerError, RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import QuantSpec
from gossamer.models.reduction import reduced, reduced_map
from gossamer.models.roles import Cut, Dimension, ModelMap
from gossamer.models.stock import Change, changed_config
from gossamer.models.tokenizer_files import renumbered
from gossamer.models.words import Words
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique

MIN_SHARE = 0.1  # of all parameters: where tokens take less, cutting them gains little
PROPOSED = ("35%", "22%", "15%", "10%")  # besides all tokens that the rows hold
ROUNDING = 1e-4  # of the largest output: the cut model may differ so much on tokens that stay


class Vocabulary(Technique):
    """Keep the tokens that the rows hold, cut the others out of embedding and head, and rewrite the tokenizer.

    In a recipe: `- vocabulary: {}` (all that the rows hold), `- vocabulary: {to: 25%}`, before every other step.
    """

    name: ClassVar[str] = "vocabulary"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=1,
        before=(
            "prune", "rotate", "smooth", "awq", "sparsify", "quantize", "gptq", "learned_rounding", "tune_scales",
            "kv_cache", "cast",
        ),
        excludes=("vocabulary",),
    )  # fmt: skip

    to: str | int | float | None = Field(
        None, description="how many tokens stay: a share (25%) or a number; without it those that the rows hold"
    )
    min_count: int = Field(1, ge=1, description="how often the rows must hold a token to be one of theirs")
    keep: tuple[str, ...] = Field((), description="texts whose tokens stay, whatever the rows hold")

    @field_validator("to", mode="before")
    @classmethod
    def _read_share(cls, value: Any) -> Any:
        if isinstance(value, str) and _share(value) is None:
            raise ValueError(f"{value!r} is neither a share like 25% nor a number")
        if isinstance(value, float) and not (isfinite(value) and (value < 1 or value == int(value))):
            raise ValueError(f"{value!r} is neither a share below 1 nor a whole number of tokens")
        return value

    def label(self) -> str:
        """Return how many tokens stay: `vocabulary to 25%`."""
        if self.to is not None:
            return f"{self.name} to {self.to}"
        return f"{self.name} of the rows" + (f", {self.min_count} times or more" if self.min_count > 1 else "")

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return the decision to cut the rows of embedding and head.

        Raises RecipeError or ModelError where the tokens cannot be others, and for sizes below what must stay.
        """
        one = vocabulary_of(model)
        cut = Cut(one, len(self.kept(model)))
        layer = model.layer(one.name)
        return [Decision(parameter=f"{one.name}: vocabulary", layer=layer, cut=cut)]

    def after(self, model: ModelMap) -> ModelMap:
        """Return the map of the model and its tokenizer once they are cut."""
        one, kept = vocabulary_of(model), self.kept(model)
        smaller = reduced_map(model, {one: len(kept)})
        return replace(smaller, words=words_of(model).trimmed(kept, one.attributes or ()))

    def kept(self, model: ModelMap) -> tuple[int, ...]:
        """Return the numbers of the tokens that stay, in order. Raises RecipeError as `resolve` does."""
        words, rows = words_of(model), vocabulary_of(model).size
        tokens = words.vocabulary.tokens
        if tokens[-1] >= rows:
            raise RecipeError(
                f"the tokenizer numbers a token {tokens[-1]}, the embedding has {rows} rows",
                "resize the embedding first: model.resize_token_embeddings(len(tokenizer))",
            )
        size = self._size(rows)
        if size is not None:
            least = len(words.held.union(*map(words.numbers_of, self.keep)))
            most = min(len(tokens), rows - 1)
            if not least <= size <= most:
                raise RecipeError(
                    f"vocabulary: {size} of {rows} tokens would stay; {least} must, by which any text becomes tokens",
                    f"leave from {least} to {most}",
                )
        kept = words.chosen(self.min_count, size, self.keep)
        if len(kept) == rows:
            raise RecipeError(f"vocabulary: the rows hold all {rows} tokens, so that none goes", "say how many: to")
        return kept

    def _size(self, rows: int) -> int | None:
        if self.to is None:
            return None
        share = _share(self.to) if isinstance(self.to, str) else self.to
        assert share is not None
        return round(rows * share) if isinstance(self.to, str) or share < 1 else int(share)

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return a candidate whose source reads and writes with the trimmed tokenizer."""
        one, kept = vocabulary_of(model), self.kept(model)
        words = words_of(model).trimmed(kept, one.attributes or ())
        module = candidate.module
        assert isinstance(module, PreTrainedModel)
        sample = _sample(context.calibration, kept) if candidate.weights is None else None
        expected = _computed(candidate, context, sample) if sample is not None else None
        new = {old: number for number, old in enumerate(kept)}
        values = module.config.to_dict()
        renamed = {(name,): found for name, found in renumbered(values, new).items() if found != values[name]}
        module.config = changed_config(module.config, Change(renamed))  # type: ignore[arg-type]
        generation = getattr(module, "generation_config", None)
        if generation is not None:
            module.generation_config = type(generation).from_dict(renumbered(generation.to_dict(), new))
        smaller = reduced(candidate, {one: kept})
        smaller.source = words.source
        if sample is not None and expected is not None:
            found = _computed(smaller, context, {**sample, "input_ids": _renamed(sample["input_ids"], new)})
            _check_same(expected if expected.shape == found.shape else expected[..., list(kept)], found)
        smaller.applied.append(self.entry())
        return smaller

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield all tokens of the rows, and fewer, where a goal bounds bytes or parameters below what rounding reaches.

        Eight bits are what rounding reaches at next to no loss; a goal that they meet needs no other tokens.
        """
        if space.calibration_rows < 1 or not _too_tight(space):
            return
        try:
            whole = cls.model_validate({})
            most, rows = len(whole.kept(space.model)), vocabulary_of(space.model).size
            fewer = [cls.model_validate({"to": share}) for share in PROPOSED]
            held = len(words_of(space.model).held)
        except GossamerError:
            return
        yield (whole,)
        for step in fewer:
            size = step._size(rows)
            assert size is not None
            if held <= size < most:
                yield (step,)


def words_of(model: ModelMap) -> Words:
    """Return what a model reads. Raises RecipeError where that cannot be cut, with the reason."""
    if model.words is None:
        raise RecipeError("vocabulary: there are no rows in which tokens are counted", "give rows of text with --data")
    if model.words.refusal:
        raise RecipeError(f"vocabulary: tokens stay as they are: {model.words.refusal}", "leave the step out")
    return model.words


def vocabulary_of(model: ModelMap) -> Dimension:
    """Return the dimension that tokens are. Raises RecipeError for a model whose config does not count them."""
    found = next((one for one in model.dimensions if one.kind == "vocabulary"), None)
    if found is None:
        raise RecipeError("no number of config.json says how many tokens this model knows", "leave the step out")
    return found


def _too_tight(space: SearchSpace) -> bool:
    """Say whether fewer tokens are wanted: by parameters, or by fewer bytes than 8 bits for all weights take."""
    one = next((one for one in space.model.dimensions if one.kind == "vocabulary"), None)
    if one is None or space.model.words is None or not space.wanted & {"size", "params"}:
        return False
    layers = [layer for layer in space.model.layers if layer.tied_to is None]
    if space.model.layer(one.name).num_parameters < MIN_SHARE * space.model.num_parameters:
        return False
    if "params" in space.wanted or "size" not in space.bounds:
        return True
    rounded = QuantSpec(bits=8)
    bytes_of = space.runtime.stored_bytes
    small = sum(
        bytes_of(layer.role, layer.shape, rounded if layer.kind in ("linear", "embedding") else None, 4)
        for layer in layers
    )
    return small > space.bounds["size"] * sum(bytes_of(layer.role, layer.shape, None, 4) for layer in layers)


def _sample(batches: Sequence[Batch], kept: tuple[int, ...]) -> dict[str, Tensor] | None:
    """Return the inputs of the first batch of which all tokens stay, None where no batch is so."""
    stays = set(kept)
    for batch in batches:
        if "input_ids" in batch.inputs and stays.issuperset(batch.inputs["input_ids"].flatten().tolist()):
            return {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
    return None


def _renamed(ids: Tensor, new: dict[int, int]) -> Tensor:
    return torch.tensor([new[number] for number in ids.flatten().tolist()]).view(ids.shape)


def _computed(candidate: Candidate, context: Context, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return candidate.source.forward(candidate.module, inputs, context.task.output)


def _check_same(expected: Tensor, found: Tensor) -> None:
    """Raise TechniqueError where the cut model computes something else from tokens that stayed."""
    away, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not away <= ROUNDING * max(largest, torch.finfo(torch.float32).tiny):
        raise TechniqueError(
            f"vocabulary: with fewer tokens the model is off by {away:.2e} where outputs reach {largest:.2e}: the "
            "number of a token means something to it",
            "leave its vocabulary as it is",
        )


def _share(text: str) -> float | None:
    """Return 0.25 for `25%`, None for what is no share."""
    number = text.strip().removesuffix("%").strip()
    try:
        share = float(number) / 100 if text.strip().endswith("%") else None
    except ValueError:
        return None
    return share if share is not None and isfinite(share) else None
