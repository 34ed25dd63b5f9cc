"""The technique `gguf`: weights solved for the blocks of a GGUF file, each in the format that the recipe names.

The solver is `gguf_solve.py`, the blocks are told in `models/gguf_blocks.py`. With calibration rows each weight's error
counts by the mean of its squared input, the diagonal of the second moment of what the layer sees behind the layers that
are solved already: llama.cpp's importance matrix, taken on the compressed stream. An embedding has no such input, and
is solved by plain least squares. What is in memory afterwards are the very numbers that llama.cpp reads from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.deferred import Outline
from gossamer.models.gguf_blocks import BLOCK, BlockName, format_named
from gossamer.models.quantized import Quantized, QuantSpec, rows_of
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique, check_not_rounded, searched
from gossamer.techniques.block import Block
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.match import layers_matching
from gossamer.techniques.quantize.gguf_solve import solve
from gossamer.techniques.quantize.layers import num_inputs, weight_decisions

MIN_SAMPLES = 8
TABLE_FORMATS: tuple[BlockName, ...] = ("q8_0", "q6_k")
MOST_FELT = ("v", "down")  # what llama.cpp's mixed files give more bits too


class GgufBlocks(BlockTechnique):
    """Solve weights for the blocks of a GGUF file, with errors weighed by the inputs of calibration rows.

    In a recipe: `- gguf: {format: q4_k, format_of: [[q6_k, [v, down]]]}`, for `--runtime gguf`. Where 256 does not
    divide a row, q5_0, q5_1 and q8_0 stand in for q4_k, q5_k and q6_k, as in llama.cpp.
    """

    name: ClassVar[str] = "gguf"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(
        roles=("linear", "embedding"), before=("cast",), excludes=("compensate", "lora", "qat", "tune_scales")
    )

    format: BlockName = searched("q4_k", ["q4_0", "q4_k", "q5_k", "q6_k", "q8_0"], "the block that holds the weights")
    importance: bool = Field(True, description="weigh errors by the mean of each squared input over calibration rows")
    targets: tuple[str, ...] = Field(
        ("linear",), description="roles, module names, patterns with * or re:... ; what is rounded"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; what stays as it is")
    format_of: tuple[tuple[BlockName, tuple[str, ...]], ...] = Field(
        (), description="other formats for some layers: [[q6_k, [patterns]]]; the last match holds"
    )

    def rows_needed(self) -> int:
        """Return how many calibration rows this step cannot do without."""
        return MIN_SAMPLES if self.importance else 0

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each matched layer, in the format that its rows can have.

        Raises RecipeError for a pattern that matches nothing, TechniqueError for rows that no block divides.
        """
        plain = QuantSpec(bits=8)  # of the decisions' layers only their names are kept
        decisions = weight_decisions(model, self.name, plain, targets=self.targets, ignore=self.ignore)
        others: dict[str, BlockName] = {}
        for name, patterns in self.format_of:
            others |= {layer.name: name for layer in layers_matching(model, patterns, "format_of")}
        return [
            replace(decision, weight=_grid(others.get(decision.layer.name, self.format), decision.layer))
            for decision in decisions
        ]

    def label(self) -> str:
        """Return the formats in a few words: `gguf q4_k/q6_k`, `gguf q8_0 embeddings`."""
        names = [self.format, *(name for name, _ in self.format_of)]
        words = [self.name, "/".join(dict.fromkeys(names))]
        if "embedding" in self.targets:
            words.append("embeddings")
        elif not self.importance:
            words.append("without rows")
        return " ".join(words)

    @property
    def layer_by_layer(self) -> bool:
        """Say that each layer is solved from the moments of its own input."""
        return True

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with the blocks of every decided layer: by a sweep over its blocks, or at once."""
        if self.importance:
            return super().apply(candidate, model, context)
        decisions = self.resolve(model)
        check_not_rounded(candidate, decisions)
        with context.progress.stage("solving for GGUF blocks", len(decisions)) as advance:
            for decision in decisions:
                assert decision.weight is not None
                shape = tuple(candidate.module.get_parameter(decision.parameter).shape)
                outline = Outline(decision.weight, shape, decision.layer.transposed, decision.weight.scale_dtype)
                candidate.round(decision.parameter, outline, partial(_solved, decision=decision))
                advance(1)
        candidate.applied.append(self.entry())
        return candidate

    def solve(self, block: Block) -> None:
        """Solve each layer with the mean of its squared inputs; an embedding, and what saw too few, without."""
        moments = block.moments()
        for parameter, decision in block.decisions.items():
            seen, importance_I = moments.get(parameter), None
            if decision.layer.kind != "embedding" and block.enough(parameter, seen, "solved without importance"):
                assert seen is not None
                importance_I = seen.second_II.diagonal().clone()
            block.set_quantized(parameter, _solved(block.weight(parameter), decision, importance_I))

    def plain_codes(self, block: Block, parameters: Iterable[str] | None = None) -> dict[str, Quantized]:
        """Return what is solved without importance."""
        names = block.decisions if parameters is None else parameters
        return {name: _solved(block.weight(name), block.decisions[name]) for name in names}

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of a sweep, or of one layer at a time."""
        if self.importance:
            return super().working_bytes(model, num_samples, sample_bytes)
        return Technique.working_bytes(self, model, num_samples, sample_bytes)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield every format, mixtures, and those with embeddings, for a runtime that has blocks."""
        layers = [layer for layer in space.model.layers if layer.kind == "linear" and layer.tied_to is None]
        refused = tuple(layer.name for layer in layers if num_inputs(layer) % BLOCK)
        if not space.runtime.holds_blocks or 2 * len(refused) >= len(layers):
            return
        rows = space.calibration_rows >= 4 * MIN_SAMPLES
        roles = {layer.role for layer in layers}
        mixtures: list[tuple[tuple[BlockName, tuple[str, ...]], ...]] = [()]
        if roles.issuperset(MOST_FELT):
            mixtures.append((("q6_k", MOST_FELT),))
        seen: set[tuple[str, ...]] = set()
        for name in cls.domain("format"):
            for mixture in mixtures if name in ("q4_k", "q5_k") else mixtures[:1]:
                settings = {"format": name, "importance": rows, "ignore": refused, "format_of": mixture}
                step = cls.model_validate(settings)
                grids = tuple(str(decision.weight) for decision in step.resolve(space.model))
                if grids not in seen:  # where one format stands in for another
                    seen.add(grids)
                    yield (step,)
                    for table in cls._of_embeddings(space):
                        yield step, table

    @classmethod
    def _of_embeddings(cls, space: SearchSpace) -> Iterator[GgufBlocks]:
        """Yield the formats for embeddings whose rows blocks divide."""
        tables = [layer for layer in space.model.layers if layer.role == "embedding" and layer.tied_to is None]
        seen: set[tuple[str, ...]] = set()
        for name in TABLE_FORMATS if tables and not any(num_inputs(table) % BLOCK for table in tables) else ():
            step = cls.model_validate({"format": name, "importance": False, "targets": ("embedding",)})
            grids = tuple(str(decision.weight) for decision in step.resolve(space.model))
            if grids not in seen:
                seen.add(grids)
                yield step


def _grid(name: BlockName, layer: LayerInfo) -> QuantSpec:
    """Return the grid of the blocks that hold a layer."""
    form = format_named(name, num_inputs(layer)) if layer.kind != "conv" else None
    if form is None:
        what = "is a convolution" if layer.kind == "conv" else f"has rows of {num_inputs(layer)}"
        raise TechniqueError(
            f"GGUF blocks hold {BLOCK} neighbouring weights of a matrix's row; {layer.name} {what}",
            f"name {layer.name} under `ignore`",
        )
    return QuantSpec.of_block(form)


def _solved(weight: Tensor, decision: Decision, importance_I: Tensor | None = None) -> Quantized:
    """Return the blocks of one weight."""
    assert decision.weight is not None
    form = decision.weight.block_format
    assert form is not None
    transposed = decision.layer.transposed
    rows_Oy = solve(rows_of(weight, transposed), form, importance_I, decision.parameter)
    return Quantized.of_blocks(rows_Oy, form, tuple(weight.shape), transposed=transposed)
