"""The technique `low_rank`: linear layers become two thin ones, by a decomposition that knows their input.

Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression", 2024,
section 3.1. Of all weights W' of rank R the one that changes a layer's outputs least, with S = L L^T the second moments
of its inputs, comes from truncating in the space where all directions of the input count alike:

    W L = A diag(s) B^T        W' = A_R diag(s_R) B_R^T L^-1        error = sum of s_j^2 over j > R

(the solver is `techniques/quantize/low_rank.py`, which has the same task with a rounding error). A layer with a bias is
solved by the covariance, and its bias takes the mean error. Blocks are taken in order, so that a later layer's moments
are those of what the earlier ones have become. Until the end of the sweep a weight keeps its shape; then it is split
(`models/factors.py`), and the split model must compute what the swept one did.

Two layers hold R (I + O) numbers: a rank that makes a layer no smaller is refused. Left out: other shares for other
layers (the paper's whitening tells nothing between layers; `rank` can be given for each by a step of its own), and the
paper's second stage, an update by low-rank adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.factors import factored, factored_map
from gossamer.models.quantized import rows_of
from gossamer.models.roles import Cut, Dimension, LayerInfo, Member, ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.match import layers_matching
from gossamer.techniques.prune.same import check_same, computed
from gossamer.techniques.quantize.bias import corrected_bias
from gossamer.techniques.quantize.low_rank import low_rank

MIN_SAMPLES = 8


class LowRank(BlockTechnique):
    """Replace linear layers by two thin ones each, the nearest in their outputs on calibration rows.

    In a recipe: `- low_rank: {rank: 50%, targets: [up, down]}`, before steps that round. For runtimes that hold a graph
    (onnxruntime, openvino): no config.json says such a layer.
    """

    name: ClassVar[str] = "low_rank"
    family: ClassVar[str] = "prune"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=MIN_SAMPLES,
        roles=("linear",),
        after=("prune",),
        before=(
            "rotate", "smooth", "awq", "sparsify", "quantize", "gptq", "learned_rounding", "tune_scales", "qat",
            "kv_cache", "cast",
        ),
    )  # fmt: skip

    rank: str | int = Field("50%", description="of each layer: a rank, or the share (50%) of its parameters that stay")
    targets: tuple[str, ...] = Field(
        ("linear",), description="roles, module names, patterns with * or re:... ; what is split"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; what stays as it is")
    damping: float = Field(0.01, gt=0, description="share of the mean second moment that is added to the diagonal")

    @field_validator("rank")
    @classmethod
    def _read_rank(cls, value: str | int) -> str | int:
        if isinstance(value, str):
            try:
                share = float(value.strip().removesuffix("%")) / 100
            except ValueError:
                share = math.nan
            if not value.strip().endswith("%") or not 0 < share < 1:
                raise ValueError(f"{value!r} is neither a share between 0% and 100% nor a rank")
        elif value < 1:
            raise ValueError(f"a rank of {value} leaves nothing")
        return value

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each linear layer inside a block.

        Raises RecipeError for a pattern that matches nothing, and for a rank that would make a layer no smaller.
        """
        ignored = {layer.name for layer in layers_matching(model, self.ignore, "ignore")} if self.ignore else set()
        chosen = [
            layer
            for layer in layers_matching(model, self.targets, "targets")
            if layer.kind == "linear" and layer.stack is not None and layer.experts is None and not layer.tied_to
        ]
        decisions = [self._decision(layer) for layer in chosen if layer.name not in ignored and layer.role != "router"]
        if not decisions:
            raise RecipeError(
                f"{self.name} matches no linear layer inside a block: targets {list(self.targets)}",
                "loosen `targets` or `ignore`",
            )
        return decisions

    def _decision(self, layer: LayerInfo) -> Decision:
        outputs, inputs = layer.shape
        rank, largest = self._rank_of(layer), (outputs * inputs - 1) // (outputs + inputs)
        if rank > largest:
            raise RecipeError(
                f"rank {rank} makes {layer.name} larger: {rank * (outputs + inputs):,} parameters, "
                f"where {outputs} x {inputs} has {outputs * inputs:,}",
                f"give a rank up to {largest}, or name the layer under `ignore`",
            )
        weight = f"{layer.name}.weight"
        full = Dimension(
            "rank",
            layer.name,
            layer.stack or "",
            layer.block,
            min(outputs, inputs),
            (Member(weight, 0),),
            (weight,),
            (),
        )
        return Decision(parameter=weight, layer=layer, cut=Cut(full, rank))

    def _rank_of(self, layer: LayerInfo) -> int:
        if isinstance(self.rank, int):
            return self.rank
        outputs, inputs = layer.shape
        share = float(self.rank.strip().removesuffix("%")) / 100
        return max(1, int(share * outputs * inputs / (outputs + inputs)))

    def after(self, model: ModelMap) -> ModelMap:
        """Return the map of the model with two layers in the place of one."""
        return factored_map(model, {one.layer.name: self._rank_of(one.layer) for one in self.resolve(model)})

    def label(self) -> str:
        """Return how much stays of what: `low_rank 50% of up, down`."""
        return f"{self.name} {self.rank} of {', '.join(self.targets)}"

    @property
    def layer_by_layer(self) -> bool:
        """Say that each layer is solved from the moments of its own input."""
        return True

    def solve(self, block: Block) -> None:
        """Give each decided weight its rank; one that no sample reaches is truncated as it stands."""
        moments = block.moments()
        for parameter, decision in block.decisions.items():
            seen, turned = moments.pop(parameter, None), decision.layer.transposed
            weight = block.weight(parameter)
            before_OI = rows_of(weight.float(), turned)
            bias = f"{decision.layer.name}.bias"
            owner = block.candidate.module.get_submodule(decision.layer.name)
            biased = getattr(owner, "bias", None) is not None
            second_II = torch.eye(before_OI.shape[1], device=before_OI.device)
            if block.enough(parameter, seen, "truncated as it stands"):
                assert seen is not None
                second_II = seen.covariance_II if biased else seen.second_II
            up_OR, down_RI = low_rank(before_OI, second_II, self._rank_of(decision.layer), damping=self.damping)
            after_OI = up_OR @ down_RI
            if biased and seen is not None:
                block.set_weight(bias, corrected_bias(block.weight(bias), before_OI, after_OI, seen.mean_I))
            block.set_weight(parameter, (after_OI.t() if turned else after_OI).reshape(weight.shape).contiguous())

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with two layers in the place of each decided one."""
        if candidate.weights is not None:
            raise TechniqueError(
                "low_rank leaves a model that no config says, and it is read piece by piece",
                "give it enough --memory to be opened whole",
            )
        decisions = self.resolve(model)
        candidate = super().apply(candidate, model, context)
        expected = computed(candidate, context)
        ranks = {one.layer.name: (self._rank_of(one.layer), one.layer.transposed) for one in decisions}
        candidate = factored(candidate, ranks)
        check_same(
            expected,
            computed(candidate, context),
            f"{self.label()}: the model with split layers",
            "something in it computes with the weights that went",
            "leave this model's layers whole, and say so to us",
        )
        return candidate

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it is carried out where a recipe asks for it (docs/concepts/pruning.md: what it loses)."""
        yield from ()
