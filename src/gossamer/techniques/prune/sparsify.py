"""The technique `sparsify`: single weights, or n of every m, are set to zero without training.

A mask alone makes no file smaller and no runtime faster; it is what sparse kernels and stronger compression start from.
Later steps keep it: a weight that is exactly zero stays so when it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from gossamer.errors import RecipeError
from gossamer.models.quantized import rows_of
from gossamer.models.roles import ModelMap
from gossamer.techniques.base import Decision, Needs, SearchSpace, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import CHANGED_BYTES, BlockTechnique
from gossamer.techniques.match import layers_matching
from gossamer.techniques.prune.masks import (
    PatternText,
    check_pattern,
    kept,
    magnitude_scores,
    read_pattern,
    wanda_scores,
)
from gossamer.techniques.prune.sparsegpt import sparsegpt
from gossamer.techniques.quantize.descend import descend_values
from gossamer.techniques.quantize.layers import num_inputs
from gossamer.techniques.sweep_gates import guarded

MIN_SAMPLES = 8


class Sparsify(BlockTechnique):
    """Set a share of each layer's weights to zero, block after block, the rest making up for it where `by` can.

    In a recipe: `- sparsify: {sparsity: 0.5}` or `- sparsify: {pattern: "2:4"}`, before steps that round.
    """

    name: ClassVar[str] = "sparsify"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=MIN_SAMPLES,
        roles=("linear",),
        after=("rotate",),  # a turned residual stream has no zeros left
        before=("quantize", "gptq", "learned_rounding", "awq", "cast"),
    )

    value_bytes: ClassVar[int] = CHANGED_BYTES
    row_bytes: ClassVar[int] = 32  # SparseGPT's weights, and while they are fitted again: by rows and by channels

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of each layer's weights that become zero")
    pattern: PatternText = Field(
        "", description="n:m, as in 2:4: n of every m neighbouring inputs stay; replaces `sparsity`"
    )
    by: Literal["sparsegpt", "wanda", "magnitude"] = Field(
        "sparsegpt", description="which weights go, and (sparsegpt) how the others make up for them"
    )
    passes: int = Field(2, ge=0, description="rounds of fitting again what stays, with sparsegpt")
    damping: float = Field(0.01, gt=0, description="share of the mean second moment that is added to the diagonal")
    targets: tuple[str, ...] = Field(
        ("linear",), description="roles, module names, patterns with * or re:... ; what is made sparse"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; what stays as it is")

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each linear layer inside a block.

        Raises RecipeError for a pattern that matches nothing, TechniqueError for an n:m that does not divide.
        """
        return sparse_decisions(model, self.name, self.pattern, targets=self.targets, ignore=self.ignore)

    def label(self) -> str:
        """Return how much goes and by what: `sparsify 2:4 by wanda`."""
        return f"{self.name} {self.pattern or f'{self.sparsity:.0%}'} by {self.by}"

    @property
    def layer_by_layer(self) -> bool:
        """Say that each layer is solved from the moments of its own input."""
        return True

    def solve(self, block: Block) -> None:
        """Make each decided layer sparse; one that no calibration token reached goes by magnitude."""
        moments = {} if self.by == "magnitude" else block.moments()
        pattern = read_pattern(self.pattern) if self.pattern else None
        for parameter, decision in block.decisions.items():
            transposed = decision.layer.transposed
            weight, seen = block.weight(parameter), moments.pop(parameter, None)
            rows_OI = rows_of(weight.float(), transposed)
            sparse_OI = None
            if self.by != "magnitude" and block.enough(parameter, seen, "cut by magnitude"):
                assert seen is not None
                if self.by == "wanda":
                    sparse_OI = rows_OI * kept(wanda_scores(rows_OI, seen.second_II), self.sparsity, pattern)
                else:
                    made_up = partial(self._made_up_for, rows_OI, seen.second_II, parameter)
                    sparse_OI = guarded(block, [parameter], made_up, self.damping, "cut by magnitude")
            if sparse_OI is None:
                sparse_OI = rows_OI * kept(magnitude_scores(rows_OI), self.sparsity, pattern)
            block.set_weight(parameter, _reshaped(sparse_OI, weight, transposed))

    def _made_up_for(self, rows_OI: Tensor, second_II: Tensor, name: str, damping: float) -> Tensor:
        """Return SparseGPT's weights, those that stay fitted again."""
        pattern = read_pattern(self.pattern) if self.pattern else None
        sparse_OI = sparsegpt(rows_OI, second_II, self.sparsity, pattern=pattern, damping=damping, name=name)
        return descend_values(rows_OI, second_II, sparse_OI, passes=self.passes, damping=damping)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: a mask makes no file smaller and no runtime here faster, so no goal asks for it."""
        yield from ()


def sparse_decisions(
    model: ModelMap, technique: str, pattern: str, *, targets: Sequence[str], ignore: Sequence[str]
) -> list[Decision]:
    """Return one decision for each matched linear layer inside a block that owns its weight.

    Raises RecipeError for a pattern that matches nothing, TechniqueError for an n:m that does not divide.
    """
    ignored = {layer.name for layer in layers_matching(model, ignore, "ignore")} if ignore else set()
    decisions = [
        Decision(parameter=f"{layer.name}.weight", layer=layer)
        for layer in layers_matching(model, targets, "targets")
        if layer.kind == "linear" and layer.stack is not None and not layer.tied_to and layer.name not in ignored
    ]
    if not decisions:
        raise RecipeError(
            f"{technique} matches no linear layer inside a block: targets {list(targets)}",
            "loosen `targets` or `ignore`",
        )
    for decision in decisions:
        if pattern:
            check_pattern(read_pattern(pattern), num_inputs(decision.layer), decision.layer.name)
    return decisions


def _reshaped(rows_OI: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Return rows in the shape of the parameter that they came from."""
    return (rows_OI.t() if transposed else rows_OI).reshape(weight.shape).contiguous()
