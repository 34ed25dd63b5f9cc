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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import GossamerError, RecipeError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import QuantSpec
from gossamer.models.reduced_map import reduced_map
from gossamer.models.reduction import reduced
from gossamer.models.roles import Cut, Dimension, LayerInfo, ModelMap
from gossamer.models.stock import Change, changed_config
from gossamer.models.tokenizer_files import renumbered
from gossamer.models.words import Words
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.prune.prune import LESS_WORK
from gossamer.techniques.prune.same import check_same, computed
from gossamer.techniques.prune.uneven import checked_size, units_left
from gossamer.techniques.quantize.layers import num_inputs

MIN_SHARE = 0.1  # of all parameters: where tokens take less, cutting them gains little
SLACK = 0.002  # of the bound: headers and a graph's own bytes are not counted
FLOAT_BYTES = 4
EIGHT = QuantSpec(bits=8)
FOUR = QuantSpec(bits=4, symmetric=False, group_size=32)
ROUNDED = ((None, None, 1.0), (EIGHT, EIGHT, 1.0), (FOUR, EIGHT, 1.0))  # blocks, tokens, what is left of the blocks
CUT = ((EIGHT, FOUR, 0.5), (EIGHT, FOUR, 0.4))  # the same where blocks have to be cut too
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
            "prune", "low_rank", "distill", "rotate", "smooth", "awq", "sparsify", "quantize", "gptq",
            "learned_rounding", "tune_scales", "qat", "kv_cache", "cast",
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
        return checked_size(value)

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
            least = len(words.must(self.keep))
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
        return units_left(self.to, rows, 1)

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return a candidate whose source reads and writes with the trimmed tokenizer."""
        one, kept = vocabulary_of(model), self.kept(model)
        words = words_of(model).trimmed(kept, one.attributes or ())
        module = candidate.module
        assert isinstance(module, PreTrainedModel)
        new = {old: number for number, old in enumerate(kept)}
        samples = _samples(context.calibration, new) if candidate.weights is None else None
        expected = computed(candidate, context, samples[0]) if samples is not None else None
        values = module.config.to_dict()
        renamed = {(name,): found for name, found in renumbered(values, new).items() if found != values[name]}
        module.config = changed_config(module.config, Change(renamed))  # type: ignore[arg-type]
        generation = getattr(module, "generation_config", None)
        if generation is not None:
            module.generation_config = type(generation).from_dict(renumbered(generation.to_dict(), new))
        smaller = reduced(candidate, {one: kept})
        smaller.source = words.source
        if samples is not None and expected is not None:
            found = computed(smaller, context, samples[1])
            expected = expected if expected.shape == found.shape else expected[..., list(kept)]
            what, why = "vocabulary: the model with fewer tokens", "the number of a token means something to it"
            check_same(expected, found, what, why, "leave its vocabulary as it is", rounding=ROUNDING)
        smaller.applied.append(self.entry())
        return smaller

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield as many tokens as a goal leaves room for where rounding alone does not meet it.

        Eight bits are what rounding reaches at next to no loss; a goal that they meet needs no other tokens. Else there
        is room for some with all weights as they are, for more with all of them in 8 bits, for most with the blocks in
        4 bits. Where a goal asks for less work too, and blocks in 8 bits leave no room, a half of them does, or less.
        """
        try:
            sizes = sorted(_room(space), reverse=True)
            if not sizes:
                return
            words, rows = words_of(space.model), vocabulary_of(space.model).size
            used = len(words.chosen(1, None))
        except GossamerError:  # its tokens cannot be others
            return
        if used <= sizes[0] and used < rows:
            yield (cls.model_validate({}),)
        for percent in dict.fromkeys(100 * size // rows for size in sizes if size < used):
            if len(words.held) <= round(rows * percent / 100):
                yield (cls.model_validate({"to": f"{percent}%"}),)


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


def _room(space: SearchSpace) -> set[int]:
    """Return how many tokens a goal leaves room for by each way of rounding; nothing if in 8 bits there is for all."""
    one = next((one for one in space.model.dimensions if one.kind == "vocabulary"), None)
    if one is None or not space.wanted & {"size", "params"} or space.calibration_rows < 1:
        return set()
    layers = [layer for layer in space.model.layers if layer.tied_to is None]
    names = {member.parameter.removesuffix(".weight") for member in one.members}
    cut = [layer for layer in layers if layer.name in names]
    inside, total = sum(layer.num_parameters for layer in cut), space.model.num_parameters
    if inside < MIN_SHARE * total:
        return set()
    if not space.bounds.keys() & {"size", "params"}:
        return {one.size}  # the fewer the better
    words, share = words_of(space.model), space.bounds.get("size", 1.0) - SLACK
    beside = words.num_bytes
    others = [layer for layer in layers if layer.name not in names]
    allowed = share * (beside + _bytes(space, layers, None))
    room: list[int] = []
    for blocks, tokens, left in (*ROUNDED, *(CUT if space.wanted & LESS_WORK else ())):
        if left < 1 and room[1] > len(words.held):
            break  # in 8 bits the blocks fit whole
        for_tokens = beside + _bytes(space, cut, tokens)
        found = int(one.size * (allowed - left * _bytes(space, others, blocks)) / for_tokens)
        room.append(max([found, 0, *room[-1:]]))  # layers that no group divides are no smaller in 4 bits
    most = int(one.size * (1 - (1 - space.bounds.get("params", 1.0)) * total / inside))
    sizes = {min(most, size) for size in ([one.size] if room[1] >= one.size else room)}
    return {size for size in sizes if 0 < size < one.size}


def _bytes(space: SearchSpace, layers: Sequence[LayerInfo], spec: QuantSpec | None) -> int:
    """Return what layers take in the runtime's files: on a grid those that it fits, linear ones and embeddings."""
    total = 0
    for layer in layers:
        inside = spec if layer.kind in ("linear", "embedding") else None
        divides = inside is None or num_inputs(layer) % (inside.group_size or 1) == 0
        held = divides and (inside is None or not space.runtime.refusal(layer.role, layer.shape, inside, None))
        grid = inside if held else None
        total += space.runtime.stored_bytes(layer.role, layer.shape, grid, FLOAT_BYTES)
    return total


def _samples(batches: Sequence[Batch], new: Mapping[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Return inputs of tokens that all stay, in old and in new numbers: the first batch's, others in place of some."""
    if not batches or "input_ids" not in batches[0].inputs:
        return None
    inputs = {name: torch.from_numpy(values) for name, values in batches[0].inputs.items()}
    stand_in, shape = min(new), inputs["input_ids"].shape
    old = [number if number in new else stand_in for number in inputs["input_ids"].flatten().tolist()]
    before, after = torch.tensor(old).view(shape), torch.tensor([new[number] for number in old]).view(shape)
    return {**inputs, "input_ids": before}, {**inputs, "input_ids": after}
