"""The technique `gates`: which heads and channels go is learned together with the weights that stay, then they are cut.

It is `distill` with a gate in front of every unit (`gating.py`: how gates are drawn, and close). The start, which has
all of its units, is no outcome: only what has lost those that go is judged, and kept where it is better than the start
without its smallest units. Behind it the model is cut as by `prune`: what is left is an ordinary smaller model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_serializer, field_validator, model_validator
from torch import Tensor

from gossamer.models.candidate import Candidate
from gossamer.models.reduced_map import reduced_map
from gossamer.models.roles import Cuttable, Dimension, ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.distill.distill import Distill
from gossamer.techniques.prune.gating import closing_gates
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.prune.readers import kept_units
from gossamer.techniques.prune.same import cut_out
from gossamer.techniques.prune.uneven import Places, in_words, read_sizes
from gossamer.techniques.prune.until import Until

KINDS: tuple[Cuttable, ...] = ("heads", "ffn", "channels")


class Gates(Until, Distill):
    """Train gates and weights together until so many heads and channels are shut, then cut: `- gates: {ffn: 50%}`.

    Or to a share of the blocks' time, whose sizes are found by measuring first: `- gates: {latency: 50%}`. Louizos
    et al., "Learning Sparse Neural Networks through L0 Regularization", 2018; Xia et al., "Structured Pruning Learns
    Compact and Accurate Models", 2022.
    """

    name: ClassVar[str] = "gates"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(
        training=True,
        gradients=True,
        after=("vocabulary", "prune", "prune_until"),
        before=(
            "low_rank", "sparsify", "gradual", "distill", "rotate", "smooth", "awq", "quantize", "gptq",
            "learned_rounding", "tune_scales", "gguf", "qat", "lora", "kv_cache", "cast",
        ),
        excludes=("compensate",),
    )  # fmt: skip

    divergence_left: ClassVar[float] = 1.0

    heads: str | float | Places | None = Field(
        None, description="heads that stay in each block: a share (50%), a number, or {place: either} for each place"
    )
    ffn: str | float | Places | None = Field(None, description="channels of feed-forward networks that stay, alike")
    channels: str | float | Places | None = Field(None, description="channels of convolutions that stay, alike")
    multiple: int = Field(1, ge=1, description="what stays is rounded up to a multiple of this")
    rest: float = Field(0.4, gt=0, lt=1, description="share of the steps, the last ones, that train what is left")

    @field_validator("heads", "ffn", "channels", mode="before")
    @classmethod
    def _read_sizes(cls, value: Any) -> Any:
        return None if value is None else read_sizes(value)

    @field_serializer("heads", "ffn", "channels")
    def _write_places(self, value: Any) -> Any:
        return dict(value) if isinstance(value, tuple) else value

    @model_validator(mode="after")
    def _says_how_much(self) -> Gates:
        sizes = [kind for kind in KINDS if getattr(self, kind) is not None]
        goals = [goal for goal in ("latency", "params") if getattr(self, goal) is not None]
        if bool(sizes) == bool(goals) or len(goals) > 1:
            raise ValueError("say what stays (heads, ffn, channels), or one goal: latency or params")
        return self

    @property
    def may_cut(self) -> tuple[Cuttable, ...]:
        """Return the kinds of units that may go for a goal."""
        return "heads", "ffn"

    def with_sizes(self, cuts: Sequence[Prune]) -> tuple[Technique, ...]:
        """Return this step with sizes in place of its goal."""
        sizes = {cut.what: cut.entry()[cut.name]["to"] for cut in cuts}
        settings = {**self.entry()[self.name], **sizes}
        return (type(self).model_validate({k: v for k, v in settings.items() if k not in ("latency", "params")}),)

    def label(self) -> str:
        """Return what is left: `gates heads 50%, ffn 50%`."""
        if self.quantity is not None:
            return f"{self.name} until {self.quantity} {self.latency or self.params}"
        found = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}
        told = (f"{kind} {in_words(size) if isinstance(size, tuple) else size}" for kind, size in found.items())
        return f"{self.name} {', '.join(told)}"

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each dimension that is cut. Raises RecipeError as `prune` does."""
        return [decision for part in self._parts for decision in part.resolve(model)]

    def after(self, model: ModelMap) -> ModelMap:
        """Return the map of the model once it is cut."""
        return reduced_map(model, self.sizes(model))

    def sizes(self, model: ModelMap) -> dict[Dimension, int]:
        """Return the size that each dimension is cut to. Raises RecipeError as `resolve` does."""
        return {one: size for part in self._parts for one, size in part.sizes(model).items()}

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return a smaller candidate, trained."""
        self._check_settled()
        candidate = super().apply(candidate, model, context)
        for part in self._parts:  # one after another: a config is asked for one number at a time
            kept = {one: kept_units(candidate, one, size) for one, size in part.sizes(model).items()}
            candidate = cut_out(candidate, kept, context, self.label())
        return candidate

    def _trained(
        self, candidate: Candidate, model: ModelMap, context: Context, checkpoints: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train in place, and return what came of it: three losses, and the values, zero for what goes."""
        gates = closing_gates(candidate.module, self.sizes(model), rest=self.rest, seed=context.seed)
        words = "all units", "without the smallest at once", "the smallest units of the start are gone"
        return self._trained_without(candidate, context, checkpoints, gates, words)

    @property
    def _parts(self) -> list[Prune]:
        """Return what is cut as steps that cut. Raises RecipeError where sizes are still to be found."""
        self._check_settled()
        sizes = {kind: size for kind in KINDS if (size := getattr(self, kind)) is not None}
        return [
            Prune.model_validate({"what": kind, "to": size, "multiple": self.multiple}) for kind, size in sizes.items()
        ]

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it takes minutes."""
        yield from ()

    @classmethod
    def repairs(cls, steps: Sequence[Technique], space: SearchSpace) -> Sequence[Technique]:
        """Return nothing: it cuts, which a repair does not."""
        del steps, space
        return ()
