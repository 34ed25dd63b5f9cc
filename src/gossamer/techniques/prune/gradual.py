"""The technique `gradual`: weights are set to zero while what stays is trained, from none to a share or a pattern.

It is `distill` with masks that grow meanwhile (`growth.py`: which weights go, and when). The start, which has all of
its weights, is no outcome: only what has all of its zeros is judged, and kept where it is better than the start with
its smallest weights gone at once. As those of `sparsify`, zeros make no file smaller, no runtime here faster;
later steps keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.distill.distill import Distill
from gossamer.techniques.prune.growing import By, Growth, Within, growing_masks
from gossamer.techniques.prune.masks import PatternText, read_pattern
from gossamer.techniques.prune.sparsify import sparse_decisions
from gossamer.techniques.prune.uneven import read_share

MASK_BYTES, SCORE_BYTES = 2, 4


class Gradual(Distill):
    """Take weights out while the others are trained to follow the original: `- gradual: {sparsity: 60%}`.

    By magnitude (Zhu and Gupta, "To prune, or not to prune", 2017, section 3) or by movement (Sanh, Wolf, Rush,
    "Movement Pruning", 2020, section 4); before steps that round, which keep the zeros.
    """

    name: ClassVar[str] = "gradual"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(
        training=True,
        gradients=True,
        roles=("linear",),
        after=("vocabulary", "prune", "prune_until", "sparsify", "low_rank"),
        before=(
            "smooth", "awq", "quantize", "gptq", "learned_rounding", "tune_scales", "qat", "lora", "kv_cache", "cast",
        ),
        # a turned residual stream has no zeros left, and is not the one that blocks follow; rounding's error, which
        # thin layers make up for, is told by the original's weights
        excludes=("rotate", "compensate"),
    )  # fmt: skip

    divergence_left: ClassVar[float] = 1.0

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the weights that become zero, as 0.6 or 60%")
    pattern: PatternText = Field(
        "", description="n:m, as in 2:4: n of every m neighbouring inputs stay; replaces `sparsity`"
    )
    by: By = Field("magnitude", description="which go: the smallest, or (movement) those that training moves to zero")
    within: Within = Field(
        "layer", description="the share is that of each layer, or (model) of all together, some losing more"
    )
    start: float = Field(0.1, ge=0, lt=1, description="share of the steps behind which the first weights go")
    rest: float = Field(0.4, gt=0, lt=1, description="share of the steps, the last ones, that have all of the zeros")
    targets: tuple[str, ...] = Field(
        ("linear",), description="roles, module names, patterns with * or re:... ; what is made sparse"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; what stays as it is")

    @field_validator("sparsity", mode="before")
    @classmethod
    def _read_share(cls, value: Any) -> Any:
        share = read_share(value) if isinstance(value, str) else None
        return value if share is None else share

    @model_validator(mode="after")
    def _check_together(self) -> Gradual:
        if self.start + self.rest > 1:
            raise ValueError(
                f"start {self.start:g} and rest {self.rest:g} are {self.start + self.rest:g} of the steps, and leave "
                "none for growing: lower one of them"
            )
        if self.pattern and self.within == "model":
            raise ValueError(f"pattern {self.pattern} says what stays in each layer: leave `within` out")
        return self

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each linear layer inside a block, as `sparsify` does."""
        return sparse_decisions(model, self.name, self.pattern, targets=self.targets, ignore=self.ignore)

    def label(self) -> str:
        """Return how much goes and by what: `gradual 60% by movement`."""
        return f"{self.name} {self.pattern or f'{self.sparsity:.0%}'} by {self.by}"

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of a training, of masks, and of scores."""
        each = MASK_BYTES + (SCORE_BYTES if self.by == "movement" else 0)
        return super().working_bytes(model, num_samples, sample_bytes) + each * model.num_parameters

    def _trained(
        self, candidate: Candidate, model: ModelMap, context: Context, checkpoints: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train in place, and return what came of it: three losses, and the values."""
        gone = f"with {self.pattern or f'{self.sparsity:.0%}'} gone at once by magnitude"
        masks = growing_masks(candidate.module, self.resolve(model), self._growth)
        words = "all weights", gone, "the smallest of the start are gone"
        return self._trained_without(candidate, context, checkpoints, masks, words)

    @property
    def _growth(self) -> Growth:
        pattern = read_pattern(self.pattern) if self.pattern else None
        return Growth(self.sparsity, pattern, self.by, self.within, self.start, self.rest)

    @classmethod
    def repairs(cls, steps: Sequence[Technique], space: SearchSpace) -> Sequence[Technique]:
        """Return nothing: a mask makes no file smaller and no runtime here faster, so no goal asks for it."""
        del steps, space
        return ()
