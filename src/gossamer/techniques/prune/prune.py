"""The technique `prune`: channels, heads, experts and whole blocks are cut out of the weights and of the config.

What is left is an ordinary smaller model: its class loads it, no mask is kept, and every runtime is faster by what is
no longer computed. Which units go is chosen block after block in one sweep, from what the blocks before it have become;
the weights that read a dimension make up for what goes (`units.py`). Until the end of the sweep what goes is only zero:
the model that was swept and the one that is cut compute the same, which is checked.

Where a model has one number for all blocks (most do), the same number of units goes everywhere. Blocks go by how little
their outputs differ from their inputs, or by what the predictions lose without each (`blocks.py`); experts by what they
add to their tokens (`experts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_serializer, field_validator, model_validator
from torch import Tensor

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import rows_of
from gossamer.models.reduced_map import reduced_map
from gossamer.models.reduction import reduced
from gossamer.models.roles import Cut, Cuttable, Dimension, LayerInfo, ModelMap
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import MOST_SAMPLES, BlockTechnique
from gossamer.techniques.prune.blocks import blocks_to_go
from gossamer.techniques.prune.experts import kept_experts
from gossamer.techniques.prune.importance import forward_of, importance, tensors
from gossamer.techniques.prune.masking import MIN_SAMPLES, Masking
from gossamer.techniques.prune.readers import kept_units, known_beforehand, merged, readers_of, reading, units_of
from gossamer.techniques.prune.same import cut_out
from gossamer.techniques.prune.taylor import taylor_scores
from gossamer.techniques.prune.uneven import Places, Size, in_words, meant, read_sizes, units_left
from gossamer.techniques.prune.width import narrowed, scale_last_norm
from gossamer.techniques.prune.width_fit import fit_narrower

OF_UNITS = ("obs", "fisher", "taylor", "activation", "magnitude")
OF_BLOCKS = ("influence", "divergence", "taylor")
OF_EXPERTS = ("activation",)
LESS_WORK = frozenset(("latency", "throughput", "flops", "params"))  # what cutting serves better than rounding
PROPOSED: dict[Cuttable, tuple[str, ...]] = {  # shares that stay
    "ffn": ("75%", "62%", "50%", "25%"),
    "heads": ("75%", "67%", "50%"),
    "layers": ("83%", "67%", "50%"),
    "channels": ("75%", "62%", "50%"),
    "experts": ("75%", "50%"),
}
NARROWER = ("75%", "50%")
By = Literal["obs", "fisher", "taylor", "activation", "magnitude", "influence", "divergence"]
DEFAULT_BY: dict[Cuttable, By] = {"layers": "influence", "width": "activation", "experts": "activation"}  # else obs


class Prune(BlockTechnique):
    """Cut channels of feed-forward networks, heads, experts, blocks, or the stream's width out of model and config.

    In a recipe: `- prune: {what: ffn, to: 50%}` or `- prune: {what: layers, remove: 2}`, before steps that round.
    """

    name: ClassVar[str] = "prune"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=MIN_SAMPLES,
        before=(
            "rotate", "smooth", "awq", "sparsify", "quantize", "gptq", "learned_rounding", "tune_scales", "qat",
            "kv_cache", "cast",
        ),
    )  # fmt: skip

    what: Cuttable = Field(
        description="ffn (channels of feed-forward networks), heads, channels (of convolutions), layers, experts, or "
        "width (of the residual stream)"
    )
    to: str | float | Places | None = Field(
        None, description="what stays, of each: a share (50%) or a number of units; or {place: either} for each place"
    )
    remove: int | tuple[int, ...] | None = Field(
        None, description="what goes, of each: a number of units, or (layers) which blocks, counted from 0"
    )
    by: By | None = Field(
        None,
        description="which units go: obs (the default), fisher, taylor, activation, magnitude; layers: influence (the "
        "default), divergence, taylor; width: as ffn, activation by default; experts: activation",
    )
    targets: tuple[str, ...] = Field(
        ("*",), description="names of stacks or blocks, patterns with *: where it is cut; a part of a name is enough"
    )
    multiple: int = Field(1, ge=1, description="what stays is rounded up to a multiple of this")
    refit: bool = Field(True, description="let the weights that stay, and biases, make up for what goes")
    damping: float = Field(0.01, gt=0, description="share of the mean second moment that is added to the diagonal")

    @field_validator("what")
    @classmethod
    def _cuts_units(cls, value: Cuttable) -> Cuttable:
        if value == "vocabulary":
            raise ValueError("tokens go by a step of their own: write `- vocabulary: {to: 25%}`")
        return value

    @field_validator("to", mode="before")
    @classmethod
    def _read_share(cls, value: Any) -> Any:
        return read_sizes(value)

    @field_serializer("to")
    def _write_places(self, value: Any) -> Any:
        return dict(value) if isinstance(value, tuple) else value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.to is None) == (self.remove is None):
            raise ValueError("say either `to` (what stays) or `remove` (what goes)")
        if isinstance(self.to, tuple) and self.targets != ("*",):
            raise ValueError("name the places in `to` or in `targets`, not in both")
        if self.what != "layers" and isinstance(self.remove, tuple):
            raise ValueError("which units go is found out; only blocks can be named (what: layers)")
        fitting = {"layers": OF_BLOCKS, "experts": OF_EXPERTS}.get(self.what, OF_UNITS)
        if self.by is not None and self.by not in fitting:
            raise ValueError(f"{self.what} are chosen by {', '.join(fitting)}, not by {self.by}")
        return self

    def rows_needed(self) -> int:
        """Return how many calibration rows this step cannot do without: none where only sizes of weights count."""
        blind = isinstance(self.remove, tuple) or (self._by == "magnitude" and not self.refit)
        return 0 if blind else super().rows_needed()

    def label(self) -> str:
        """Return what is cut and how far: `prune ffn to 50%`."""
        if self.to is not None:
            size = in_words(self.to) if isinstance(self.to, tuple) else self.to
            return f"{self.name} {self.what} to {size} by {self._by}"
        gone = self.remove if isinstance(self.remove, int) else ", ".join(map(str, self.remove or ()))
        return f"{self.name} {self.what}, {gone} fewer by {self._by}"

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each dimension that is cut.

        Raises RecipeError where the model has none of that kind, where a target matches none, and for sizes that leave
        nothing or cut nothing.
        """
        layers = {f"{layer.name}.weight": layer for layer in model.layers}
        return [
            Decision(parameter=f"{cut.dimension.name}: {self.what}", layer=_shown(cut.dimension, layers), cut=cut)
            for cut in self.cuts(model)
        ]

    def cuts(self, model: ModelMap) -> list[Cut]:
        """Return what each dimension is cut to, and whether all that the config has one number for are cut alike."""
        sizes = self.sizes(model)

        def alike(one: Dimension) -> bool:
            shared = [each for each in model.dimensions if each.attributes == one.attributes and each.kind == one.kind]
            return all(sizes.get(each, 0) * one.size == sizes[one] * each.size for each in shared)

        return [Cut(one, size, alike(one)) for one, size in sizes.items()]

    def after(self, model: ModelMap) -> ModelMap:
        """Return the map of the model once it is cut."""
        sizes = self.sizes(model)
        if not isinstance(self.remove, tuple):
            return reduced_map(model, sizes)
        return reduced_map(model, sizes, {one: self._named_to_stay(one) for one in sizes})

    def _named_to_stay(self, one: Dimension) -> list[int]:
        """Return the blocks that stay where those that go are named."""
        assert isinstance(self.remove, tuple)
        return [number for number in range(one.size) if number not in self.remove]

    def sizes(self, model: ModelMap) -> dict[Dimension, int]:
        """Return the size that each dimension is cut to. Raises RecipeError as `resolve` does."""
        found = [one for one in model.dimensions if one.kind == self.what]
        if not found:
            raise RecipeError(f"no {self.what} of this model can be cut", "`gossamer inspect` says why, by name")
        uneven = dict(self.to) if isinstance(self.to, tuple) else {}
        places = tuple(uneven) or self.targets
        for target in places:
            if not any(meant(one, target) for one in found):
                names = sorted({one.stack for one in found})
                raise RecipeError(
                    f"{'to' if uneven else 'targets'}: {target!r} matches none of {len(found)} places",
                    f"known: {', '.join(names)}",
                )
        named = {one: [place for place in places if meant(one, place)] for one in found}
        return {one: self._size(one, uneven.get(names[-1])) for one, names in named.items() if names}

    def _size(self, one: Dimension, here: Size | None) -> int:
        if isinstance(self.remove, tuple):
            if wrong := sorted(number for number in self.remove if not 0 <= number < one.size):
                raise RecipeError(f"{one.name} has no block {wrong[0]}: it has {one.size}, from 0", "name those it has")
            if held := sorted(set(self.remove) & set(one.held)):
                raise RecipeError(f"block {held[0]} of {one.name} holds what the others read", "remove another one")
            size = one.size - len(set(self.remove))
        elif self.remove is not None:
            size = one.size - self.remove
        else:
            asked = here if here is not None else self.to
            assert isinstance(asked, str | float | int)
            size = units_left(asked, one.size, self.multiple)
        least = max(1, len(one.held))
        if one.kind == "experts" and one.sizes:
            least = min(one.sizes)  # what the router picks for each token
        if not least <= size < one.size:
            raise RecipeError(
                f"{self.what} of {one.name}: {size} of {one.size} would stay", f"leave from {least} to {one.size - 1}"
            )
        return size

    @property
    def _by(self) -> By:
        return self.by or DEFAULT_BY.get(self.what, "obs")

    def solve(self, block: Block) -> None:
        """Do nothing: the sweep is `Masking`'s."""

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the samples, and of the block at hand."""
        if self.what in ("layers", "width", "experts"):
            samples = (self.samples or MOST_SAMPLES) * sample_bytes
            if self.what == "width":  # the model as it was, and what passes both
                samples = 4 * model.num_parameters + 4 * samples
            return Technique.working_bytes(self, model, num_samples, sample_bytes) + samples
        return self._masking(model, self.sizes(model), {}).working_bytes(model, num_samples, sample_bytes)

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return a smaller candidate."""
        sizes = self.sizes(model)
        if self.what == "width":
            return self._narrowed(candidate, model, sizes, context)
        if self.what == "layers":
            smaller = reduced(candidate, self._kept_blocks(candidate, sizes, context))
        elif self.what == "experts":
            forward, samples = forward_of(candidate, context), self._samples(context)
            smaller = reduced(candidate, kept_experts(candidate, sizes, forward, samples))
        else:
            candidate = self._masked(candidate, model, sizes, context)
            kept = {one: kept_units(candidate, one, size) for one, size in sizes.items()}
            smaller = cut_out(candidate, kept, context, self.label())
        smaller.applied.append(self.entry())
        return smaller

    def _narrowed(
        self, candidate: Candidate, model: ModelMap, sizes: Mapping[Dimension, int], context: Context
    ) -> Candidate:
        """Return the candidate with fewer channels in its residual stream, its layers fitted to what they were."""
        totals = self._totals(candidate, model, sizes, context)
        kept = {
            one: sorted(totals[one].argsort(stable=True)[one.size - size :].tolist()) for one, size in sizes.items()
        }
        example = {name: torch.from_numpy(values) for name, values in context.example.items()}
        forward = forward_of(candidate, context)
        smaller, before, factor = narrowed(candidate, kept, forward, example)
        if self.refit:
            samples, damping = self._samples(context), self.damping
            steps = 1 + sum(stack.num_blocks for stack in model.stacks)
            with context.progress.stage(f"{self.name}: blocks fitted", steps) as advance:
                fit_narrower(
                    before, smaller.module, kept, model.stacks, forward, samples, damping=damping, advance=advance
                )
            if factor != 1:  # the norm was fitted to what it wrote before
                scale_last_norm(smaller.module, factor, kept, partial(forward, smaller.module, example))
        smaller.applied.append(self.entry())
        return smaller

    def _kept_blocks(
        self, candidate: Candidate, sizes: Mapping[Dimension, int], context: Context
    ) -> dict[Dimension, list[int]]:
        kept, scores = {}, {}
        if self._by == "taylor" and not isinstance(self.remove, tuple):
            scores = taylor_scores(candidate, sizes, self._batches(context), context)
        for one, size in sizes.items():
            if isinstance(self.remove, tuple):
                kept[one] = self._named_to_stay(one)
                continue
            if scores:
                free = [number for number in scores[one].argsort(stable=True).tolist() if number not in one.held]
                gone = set(free[: one.size - size])
            else:
                count, samples = one.size - size, self._samples(context)
                gone = set(blocks_to_go(candidate, one, count, self._by, samples, context))
            kept[one] = [number for number in range(one.size) if number not in gone]
        return kept

    def _masked(
        self, candidate: Candidate, model: ModelMap, sizes: Mapping[Dimension, int], context: Context
    ) -> Candidate:
        """Return the candidate with what goes set to zero in the weights that read it, the others making up for it."""
        chosen = self._chosen(candidate, model, sizes, context)
        if self.rows_needed():
            from gossamer.techniques.sweep import Sweep  # a sweep is made of what stands in blockwise.py

            masking = self._masking(model, sizes, chosen)
            Sweep(masking, candidate, model, context, masking.resolve(model)).run()
            return candidate
        layers = {f"{layer.name}.weight": layer for layer in model.layers}
        for reader, seen in readers_of(sizes, layers).items():
            weight, transposed = candidate.values(reader), layers[reader].transposed
            rows_OI = rows_of(weight, transposed).clone()
            rows_OI.view(len(rows_OI), -1, seen.unit)[:, list(chosen[reader])] = 0.0
            after = (rows_OI.t() if transposed else rows_OI).reshape(weight.shape).contiguous()
            candidate.put_weight(reader, partial(_itself, after))
        return candidate

    def _masking(
        self, model: ModelMap, sizes: Mapping[Dimension, int], chosen: Mapping[str, tuple[int, ...]]
    ) -> Masking:
        readers = readers_of(sizes, {f"{layer.name}.weight": layer for layer in model.layers})
        return Masking(
            step=self.entry(),
            readers={name: (reader.unit, reader.count) for name, reader in readers.items()},
            chosen=dict(chosen),
            refit=self.refit,
            damping=self.damping,
            samples=self.samples or MOST_SAMPLES,
            calibration_dtype=self.calibration_dtype,
        )

    def _chosen(
        self, candidate: Candidate, model: ModelMap, sizes: Mapping[Dimension, int], context: Context
    ) -> dict[str, tuple[int, ...]]:
        """Return what is known before the sweep: everything but what `obs` finds in each block by itself."""
        readers = readers_of(sizes, {f"{layer.name}.weight": layer for layer in model.layers})
        wanted = {one: size for one, size in sizes.items() if self._by != "obs" or known_beforehand(one, readers)}
        if not wanted:
            return {}
        totals = self._totals(candidate, model, wanted, context)
        found: list[tuple[str, list[int]]] = []
        for one, size in wanted.items():
            gone = torch.argsort(totals[one], stable=True)[: one.size - size].tolist()
            read = [(member, readers[member.parameter]) for member in reading(one)]
            found += [(member.parameter, units_of(one, gone, member, reader)) for member, reader in read]
        return merged(found)

    def _totals(
        self, candidate: Candidate, model: ModelMap, sizes: Mapping[Dimension, int], context: Context
    ) -> dict[Dimension, Tensor]:
        """Return the score of every unit, [U], by dimension, over all that read it."""
        return importance(candidate, model, sizes, self._batches(context), context, by=self._by, damping=self.damping)

    def _batches(self, context: Context) -> list[Batch]:
        count = min(self.samples or MOST_SAMPLES, len(context.calibration))
        if count < self.rows_needed():
            raise TechniqueError(
                f"{self.label()} needs {self.rows_needed()} calibration samples, {count} were given",
                "give more rows with --data",
            )
        return [context.calibration[number * len(context.calibration) // count] for number in range(count)]

    def _samples(self, context: Context) -> list[dict[str, Tensor]]:
        return [tensors(batch) for batch in self._batches(context)]

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield cuts of each kind that the runtime can hold, alone and with channels, where less work is asked for.

        A goal on size alone is left to rounding: docs/concepts/pruning.md has what each lost on one encoder.
        """
        if space.calibration_rows < 4 * MIN_SAMPLES or not space.wanted & LESS_WORK:
            return
        found: dict[str, list[Prune]] = {}
        for kind, shares in PROPOSED.items():
            if kind == "experts" and "params" not in space.wanted:
                continue  # a token asks as many of those that stay
            steps = [cls.model_validate({"what": kind, "to": share}) for share in shares]
            # by the sizes that they lead to: of few blocks several shares are one number
            distinct = {tuple(step.sizes(space.model).values()): step for step in steps if step._fits(space)}
            found[kind] = list(distinct.values())
            yield from ((step,) for step in found[kind])
        for kinds in (("heads", "ffn"), ("layers", "ffn")):
            yield from product(*(found[kind] for kind in kinds))

    @classmethod
    def narrowing(cls, space: SearchSpace) -> list[Prune]:
        """Return the cuts of the stream's width that the runtime can hold: what `candidates` leaves for the end."""
        steps = [cls.model_validate({"what": "width", "to": share}) for share in NARROWER]
        return [step for step in steps if step._fits(space)]

    def _fits(self, space: SearchSpace) -> bool:
        """Say whether the model has such units, so many of them, and the runtime a place for what is left."""
        try:
            cuts = self.cuts(space.model)
        except RecipeError:
            return False
        return all(space.runtime.cut_refusal(cut) is None for cut in cuts)


def _itself(values: Tensor) -> Tensor:
    return values


def _shown(one: Dimension, layers: Mapping[str, LayerInfo]) -> LayerInfo:
    """Return the layer that stands for a dimension in tables."""
    if one.readers:
        return layers[one.readers[0]]
    return next(layer for layer in layers.values() if layer.stack == one.stack)
