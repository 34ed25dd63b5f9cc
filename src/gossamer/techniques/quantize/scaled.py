"""The techniques that move difficulty between tensors: `awq` before it rounds weights, `smooth` before 8-bit inputs.

Both take the places of a block where scaling is exact (`models/scalings.py`), find factors from the moments of what is
read there (pure functions, `awq.py` and `smooth.py`), and put the scaled values into the model: the artifact is an
ordinary model of the same architecture, norms included. A block without any such place is only rounded (`awq`), or
left as it is (`smooth`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.errors import RecipeError
from gossamer.models.quantized import Quantized, QuantSpec, rows_of
from gossamer.models.roles import ModelMap
from gossamer.models.scalings import Scaling, find_scalings, scaled_weights
from gossamer.techniques.base import Decision, Needs, SearchSpace, Technique
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import CHANGED_BYTES, CODE_BYTES, BlockTechnique, moment_bytes
from gossamer.techniques.match import layers_matching
from gossamer.techniques.quantize.awq import (
    CHUNK_ROWS,
    NUM_EXPONENTS,
    Clip,
    Factors,
    Reader,
    awq_factors,
    round_clipped,
    scaled_moments,
)
from gossamer.techniques.quantize.calibrated import MIN_SAMPLES, CalibratedGrid
from gossamer.techniques.quantize.gptq import gptq
from gossamer.techniques.quantize.layers import num_inputs
from gossamer.techniques.quantize.moments import Moments
from gossamer.techniques.quantize.smooth import smooth_factors
from gossamer.techniques.sweep_gates import guarded

DAMPING = 0.01  # of GPTQ behind a scaling
MOST_READERS = 3  # layers that read one place: queries, keys and values
SEARCH_BYTES, CLIPPED_BYTES = 32, 40  # of a weight while factors are tried, and while its group is clipped


class Awq(CalibratedGrid):
    """Enlarge the columns that meet large activations, clip each group as far as the layer's output gains, then round.

    In a recipe: `- awq: {bits: 4, group_size: 64}`. Lin et al., "AWQ", 2023; the searches are in `awq.py`. With
    `round: gptq` the scaled weights are rounded by GPTQ, which takes its grids from them and does not clip.
    """

    name: ClassVar[str] = "awq"

    value_bytes: ClassVar[int] = CODE_BYTES + CHANGED_BYTES  # a weight is scaled before it is rounded

    round: Literal["nearest", "gptq"] = Field("nearest", description="what rounds the scaled weights")
    clip: Clip = Field(
        "full",
        description="how grids are clipped when rounding to the nearest: not at all, by the error of the weights, "
        "or by that of the output with the diagonal or all of the second moments",
    )
    exponents: int = Field(NUM_EXPONENTS, ge=0, description="exponents tried for each place; 0 = no scaling")

    def solve(self, block: Block) -> None:
        """Scale every place that has a rounded reader, then round each layer by the moments that it sees then."""
        moments = {name: seen for name, seen in block.moments().items() if seen.num_tokens}
        specs = {name: decision.weight for name, decision in block.decisions.items() if decision.weight is not None}
        factors: dict[str, Tensor] = {}
        if self.exponents:
            for place in places(block):
                found = self._search(block, place, moments, specs)
                if found is not None and found.exponent:
                    put_scaling(block, place, found.factors_I)
                    factors |= {f"{block.name}.{name}": found.factors_I for name in place.consumers}
        for parameter, spec in specs.items():
            seen, transposed = moments.pop(parameter, None), block.decisions[parameter].layer.transposed
            weight = block.weight(parameter)
            if not block.enough(parameter, seen, "rounded plainly"):
                block.set_quantized(parameter, self.plain_codes(block, [parameter])[parameter])
                continue
            assert seen is not None
            second_II = seen.second_II
            if parameter in factors:
                second_II = scaled_moments(second_II, factors[parameter])
            codes = None
            if self.round == "gptq":
                codes_of = partial(_gptq_codes, weight, second_II, spec, parameter, transposed)
                codes = guarded(block, [parameter], codes_of, DAMPING, "rounded to the nearest")
            if codes is None:
                codes = round_clipped(weight, second_II, spec, clip=self.clip, transposed=transposed, name=parameter)
            block.set_quantized(parameter, codes)

    def _search(
        self, block: Block, place: Scaling, moments: Mapping[str, Moments], specs: Mapping[str, QuantSpec]
    ) -> Factors | None:
        """Return the factors of a place, or None where nothing that reads it is rounded."""
        seen, readers = readers_of(block, place, moments, specs)
        if not readers:
            return None
        means_NI = torch.stack([part.mean_abs_I for part in seen])
        tokens_N1 = torch.tensor([[part.num_tokens] for part in seen], device=means_NI.device)
        mean_abs_I = (means_NI * tokens_N1).sum(0) / tokens_N1.sum()
        return awq_factors(mean_abs_I, readers, shared=place.shared, num_exponents=self.exponents)

    def solving_bytes(self, decisions: Sequence[Decision], values: int, sample_bytes: int) -> int:
        """Return the bytes that searching factors and rounding take; all moments are there until factors are found."""
        moments = sum(moment_bytes(decision) for decision in decisions)
        sizes = [(decision.layer.shape[0], num_inputs(decision.layer)) for decision in decisions]
        readers = sorted((rows * inputs for rows, inputs in sizes), reverse=True)[:MOST_READERS]
        search = 4 * sum(readers) + SEARCH_BYTES * max(readers, default=0)
        clipping = max((8 * o * i + CLIPPED_BYTES * min(o, CHUNK_ROWS) * i + 12 * i**2 for o, i in sizes), default=0)
        kept = self.value_bytes * values + moments
        # scaled values are put in place while the block is in memory
        here = kept + max(4 * values, search if self.exponents else 0, clipping)
        return here if self.round == "nearest" else max(here, super().solving_bytes(decisions, values, sample_bytes))

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: `gptq` fills the same place among the planner's candidates."""
        yield from ()


class Smooth(BlockTechnique):
    """Divide activation channels with outliers by factors that the weights take up, before both are rounded to 8 bits.

    In a recipe it stands before the step that rounds: `- smooth: {}` and `- quantize: {activations: dynamic}`. Nothing
    is rounded here, and what the model computes stays the same. Xiao et al., "SmoothQuant", 2022; see `smooth.py`.
    """

    name: ClassVar[str] = "smooth"
    family: ClassVar[str] = "quantize"
    value_bytes: ClassVar[int] = CHANGED_BYTES
    needs: ClassVar[Needs] = Needs(
        calibration_rows=MIN_SAMPLES,
        roles=("linear",),
        before=("quantize", "gptq", "learned_rounding", "awq", "cast"),
    )

    bits: Literal[8, 7] = Field(8, description="width of the codes that the weights will get")
    alpha: float | None = Field(
        None, ge=0, le=1, description="how much of the activations' range moves into weights; empty = found by place"
    )
    targets: tuple[str, ...] = Field(
        ("linear",), description="roles, module names, patterns with * or re:... ; readers whose inputs are smoothed"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; readers that are left out")

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each linear layer inside a block; only some of them can be smoothed."""
        ignored = {layer.name for layer in layers_matching(model, self.ignore, "ignore")} if self.ignore else set()
        decisions = [
            Decision(parameter=layer.tied_to or f"{layer.name}.weight", layer=layer)
            for layer in layers_matching(model, self.targets, "targets")
            if layer.kind == "linear" and layer.stack is not None and layer.name not in ignored
        ]
        if not decisions:
            raise RecipeError(
                f"{self.name} matches no linear layer inside a block: targets {list(self.targets)}",
                "loosen `targets` or `ignore`",
            )
        return decisions

    def solve(self, block: Block) -> None:
        """Scale each place by the factors with the least predicted error of its readers."""
        moments = {name: seen for name, seen in block.moments().items() if seen.num_tokens}
        spec = QuantSpec(bits=self.bits)
        for place in places(block):
            seen, readers = readers_of(block, place, moments, dict.fromkeys(block.decisions, spec))
            if len(readers) < len(place.consumers):
                continue  # one that is left out would get another input
            max_abs_I = seen[0].max_abs_I
            for part in seen[1:]:
                max_abs_I = max_abs_I.maximum(part.max_abs_I)
            found = smooth_factors(max_abs_I, readers, shared=place.shared, alpha=self.alpha)
            if found.error < found.plain_error or self.alpha is not None:
                put_scaling(block, place, found.factors_I)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it is carried out where a recipe asks for it."""
        yield from ()


def _gptq_codes(
    weight: Tensor, second_II: Tensor, spec: QuantSpec, name: str, transposed: bool, damping: float
) -> Quantized:
    """Return GPTQ's codes of one parameter."""
    rows_OI, shape = rows_of(weight, transposed), tuple(weight.shape)
    return gptq(rows_OI, second_II, spec, damping=damping, transposed=transposed, shape=shape, name=name)


def places(block: Block) -> list[Scaling]:
    """Return where a block may be scaled: nowhere that a parameter is shared, rounded already, or cannot be tried."""
    if not block.calls:
        return []
    names = Counter(id(values) for _, values in block.candidate.module.named_parameters(remove_duplicate=False))

    def free(name: str) -> bool:
        alone = names[id(block.module.get_parameter(name))] == 1
        return alone and f"{block.name}.{name}" not in block.candidate.quantized

    with block.in_memory():
        found = find_scalings(block.module, block.calls[0].on(block.device))
    return [place for place in found if all(free(name) for name in (*place.producers, *place.consumers))]


def put_scaling(block: Block, place: Scaling, factors_I: Tensor) -> None:
    """Put a place's scaled values into the model, for the sweep to remember."""
    with block.in_memory():
        scaled = scaled_weights(block.module, place, factors_I)
    for name, values in scaled.items():
        block.set_weight(f"{block.name}.{name}", values)


def readers_of(
    block: Block, place: Scaling, moments: Mapping[str, Moments], specs: Mapping[str, QuantSpec]
) -> tuple[list[Moments], list[Reader]]:
    """Return the moments and the readers of a place, of those consumers that are rounded and were reached."""
    seen, readers = [], []
    for name in place.consumers:
        full = f"{block.name}.{name}"
        if full in specs and full in moments:
            rows_OI = rows_of(block.weight(full), name in place.turned)
            seen.append(moments[full])
            readers.append(Reader(rows_OI, moments[full].second_II, specs[full]))
    return seen, readers
