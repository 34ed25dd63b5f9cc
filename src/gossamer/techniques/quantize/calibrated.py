"""The techniques that choose codes with calibration samples, block after block: `gptq` and `learned_rounding`.

They share the settings of a weight grid and the sweep of `blockwise.py`; what differs is how the codes of one block
are found, which is a pure function in a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gossamer.models.quantized import Quantized, QuantSpec, rows_of
from gossamer.models.roles import ModelMap
from gossamer.models.walker import hidden_states
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Decision, Needs, SearchSpace, Technique, searched
from gossamer.techniques.block import Block, token_error
from gossamer.techniques.blockwise import MAX_TOGETHER, MOST_SAMPLES, BlockTechnique
from gossamer.techniques.match import layers_matching
from gossamer.techniques.prune.masks import Pattern, PatternText, kept, magnitude_scores, read_pattern
from gossamer.techniques.prune.sparsegpt import sparsegpt
from gossamer.techniques.quantize.bias import corrected_bias
from gossamer.techniques.quantize.descend import descend
from gossamer.techniques.quantize.formats import FormatSettings, check_format
from gossamer.techniques.quantize.gptq import gptq
from gossamer.techniques.quantize.grid import ScaleSearch
from gossamer.techniques.quantize.layers import num_inputs, weight_decisions
from gossamer.techniques.quantize.learned import learn_rounding
from gossamer.techniques.quantize.moments import Moments
from gossamer.techniques.quantize.quantize import Quantize, needs_symmetry, stored_as_wider
from gossamer.techniques.quantize.refit import refit_scales
from gossamer.techniques.sweep_gates import guarded
from gossamer.techniques.sweep_precision import computing

MIN_SAMPLES = 8
LEARNED_BYTES = 56  # of a weight whose rounding is learned: what is learned, its gradient, the graph through both
GRAPH_SAMPLES = 6  # what a sample leaves in a block's graph, in samples between two blocks


class CalibratedGrid(FormatSettings, BlockTechnique):
    """Hold the settings that every calibrated rounding has: the grid, and which layers."""

    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(calibration_rows=MIN_SAMPLES, roles=("linear",), before=("cast",))

    bits: Literal[8, 7, 6, 5, 4, 3, 2] = searched(4, [4, 3], "width of a weight's code")
    symmetric: bool = searched(False, [False], "one grid around zero, or one with a zero point of its own")
    group_size: int | None = searched(
        64, [64, 32], "inputs that share a scale; empty = one scale for each output channel"
    )
    targets: tuple[str, ...] = Field(
        ("linear",), description="roles, module names, patterns with * or re:... ; what is rounded"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; what stays as it is")
    bits_of: tuple[tuple[Literal[8, 7, 6, 5, 4, 3, 2], tuple[str, ...]], ...] = Field(
        (), description="other widths for some layers: [[8, [patterns]], [3, [patterns]]]; the last match holds"
    )

    @model_validator(mode="after")
    def _agrees_with_its_format(self) -> Self:
        check_format(self.format, self.bits, self.symmetric, self.group_size)
        if self.bits_of and self.format != "int":
            raise ValueError(f"bits_of gives other widths of integers; these are {self._spec()}")
        return self

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each matched layer; see `quantize`."""
        decisions = weight_decisions(model, self.name, self._spec(), targets=self.targets, ignore=self.ignore)
        widths = {
            layer.name: bits for bits, patterns in self.bits_of for layer in layers_matching(model, patterns, "bits_of")
        }
        return [
            replace(decision, weight=self._spec().model_copy(update={"bits": widths[decision.layer.name]}))
            if decision.layer.name in widths
            else decision
            for decision in decisions
        ]

    def label(self) -> str:
        """Return the grid in a few words: `gptq int4 group 64 asymmetric`."""
        widths = sorted({bits for bits, _ in self.bits_of})
        grid = f"int{self.bits}" if self.format == "int" else self.format
        words = [self.name, grid if not widths else f"mixed int{'/'.join(map(str, widths))}"]
        if self.group_size:
            words.append(f"group {self.group_size}")
        if not self.symmetric:
            words.append("asymmetric")
        return " ".join(words)

    @property
    def takes_widths(self) -> bool:
        """Say that each layer is rounded to the grid that was decided for it."""
        return True

    def _spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, symmetric=self.symmetric, group_size=self.group_size, format=self.format)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield the grids of the search domain, alone and with rounded embeddings, where there are enough samples."""
        inside = [layer for layer in space.model.layers if layer.kind == "linear" and layer.stack is not None]
        if space.calibration_rows < 4 * MIN_SAMPLES or not inside:
            return
        for settings in cls.product("bits", "symmetric", "group_size"):
            settings["symmetric"] |= needs_symmetry(space)
            if settings["bits"] == 3 and settings["group_size"] != 32:
                continue  # 3 bits need the finest groups
            option = cls(**settings)
            spec, refused = option._spec(), []
            for layer in space.model.layers:
                if layer.kind != "linear" or layer.tied_to is not None:
                    continue
                divides = not option.group_size or num_inputs(layer) % option.group_size == 0
                if not divides or space.runtime.refusal(layer.role, layer.shape, spec, None) is not None:
                    refused.append(layer.name)
            held = [layer for layer in inside if layer.name not in refused]
            if 2 * len(refused) < len(inside) and not all(stored_as_wider(space, layer, spec) for layer in held):
                step = option.model_copy(update={"ignore": tuple(refused)})
                yield (step,)
                for embeddings in Quantize.of_embeddings(space):
                    yield step, embeddings


class Gptq(CalibratedGrid):
    """Round weights one input channel after another, each error made up for by the channels that follow.

    In a recipe: `- gptq: {bits: 4, group_size: 64}`. Frantar et al., "GPTQ", 2022; the solver is `gptq.py`.
    """

    name: ClassVar[str] = "gptq"

    scale: ScaleSearch = Field("mse", description="where scales come from: the extremes, least squared error, or HQQ")
    order: Literal["none", "static"] = Field(
        "static", description="input channels as they stand, or the most excited first (groups stay where they are)"
    )
    refit: bool = Field(True, description="fit the scales to the codes that were found, by least squares on outputs")
    passes: int = Field(2, ge=0, description="rounds of improving every code again, one input channel after another")
    damping: float = Field(0.01, gt=0, description="share of the mean second moment that is added to the diagonal")
    correct_bias: bool = Field(True, description="let a layer's bias, where it has one, take the mean error of outputs")
    sparsity: float = Field(0.0, ge=0, lt=1, description="share of each layer's weights that SparseGPT takes out first")
    pattern: PatternText = Field("", description="n:m, as in 2:4: n of every m neighbours stay; replaces `sparsity`")

    @model_validator(mode="after")
    def _search_fits_its_grid(self) -> Self:
        check_format(self.format, self.bits, self.symmetric, self.group_size, self.scale)
        return self

    def num_samples(self, batches: Sequence[Batch], decisions: Iterable[Decision]) -> int:
        """Return how many calibration batches are used: where widths are mixed, as many as the steps that want most.

        SmolLM2-135M to 92 MB, KL to the original: 0.0536 with 32 samples, 0.0498 with 64; with one width both do alike.
        """
        if self.samples is None and self.bits_of:
            return min(MOST_SAMPLES, len(batches))
        return super().num_samples(batches, decisions)

    @property
    def layer_by_layer(self) -> bool:
        """Say that each layer is solved from the moments of its own input."""
        return True

    def solve(self, block: Block) -> None:
        """Solve each layer from the second moments of its input; one without any is rounded plainly."""
        moments = block.moments()
        for parameters in self._together(block, moments):
            seen = moments[parameters[0]]
            for parameter in parameters:
                del moments[parameter]  # as large as all else: given back as soon as it is used
            biases = [self._bias_of(block, parameter) for parameter in parameters]
            second_II = seen.covariance_II if biases[0] else seen.second_II
            weights = [block.weight(parameter) for parameter in parameters]
            codes_of = partial(
                self._codes, weights, second_II, [block.decisions[parameter] for parameter in parameters]
            )
            found = guarded(block, parameters, codes_of, self.damping, "rounded plainly")
            if found is None:
                for parameter, codes in self.plain_codes(block, parameters).items():
                    block.set_quantized(parameter, codes)
                continue
            for parameter, weight, bias, codes in zip(parameters, weights, biases, found, strict=True):
                if bias:
                    before_OI, after_OI = (rows_of(values, codes.transposed) for values in (weight, codes.dequantize()))
                    block.set_weight(bias, corrected_bias(block.weight(bias), before_OI, after_OI, seen.mean_I))
                block.set_quantized(parameter, codes)

    def _together(self, block: Block, moments: dict[str, Moments]) -> list[list[str]]:
        """Return the parameters with enough moments, those that are solved at once side by side; round the others.

        Rows do not touch each other, so that small layers which read one input (queries, keys and values) have the
        same codes together and take the time of one.
        """
        groups: dict[tuple[Any, ...], list[str]] = {}
        for number, (parameter, decision) in enumerate(block.decisions.items()):
            seen = moments.get(parameter)
            if not block.enough(parameter, seen, "rounded plainly"):
                block.set_quantized(parameter, self.plain_codes(block, [parameter])[parameter])
                continue
            # masks and scales of whole tensors are chosen by all rows of a layer
            alone = self.sparse or decision.layer.num_parameters > MAX_TOGETHER or self.format != "int"
            biased = self._bias_of(block, parameter) is not None
            key = (number,) if alone else (id(seen), decision.weight, biased)
            groups.setdefault(key, []).append(parameter)
        return list(groups.values())

    def _bias_of(self, block: Block, parameter: str) -> str | None:
        """Return the name of the bias that takes the mean errors of a layer's outputs; None where there is none."""
        name = f"{parameter.rpartition('.')[0]}.bias"
        owner = block.candidate.module.get_submodule(name.rpartition(".")[0])
        return name if self.correct_bias and getattr(owner, "bias", None) is not None else None

    def without_samples(self, weight: Tensor, transposed: bool) -> Tensor:
        """Return a weight with its smallest values taken out, where the recipe wants some out."""
        if not self.sparse:
            return weight
        rows_OI = rows_of(weight, transposed)
        rows_OI = rows_OI * kept(magnitude_scores(rows_OI), self.sparsity, self._pattern)
        return (rows_OI.t() if transposed else rows_OI).reshape(weight.shape)

    def _codes(
        self, weights: Sequence[Tensor], second_II: Tensor, decisions: Sequence[Decision], damping: float
    ) -> list[Quantized]:
        """Return the codes of layers with one input and one grid: GPTQ's, improved by turns in scales and codes."""
        spec, name = decisions[0].weight, decisions[0].parameter
        assert spec is not None
        parts = [rows_of(weight, one.layer.transposed) for weight, one in zip(weights, decisions, strict=True)]
        start_OI = rows_OI = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.sparse:
            start_OI = sparsegpt(rows_OI, second_II, self.sparsity, pattern=self._pattern, damping=damping, name=name)
        codes = gptq(start_OI, second_II, spec, scale=self.scale, order=self.order, damping=damping, name=name)
        keep_OI = start_OI != 0
        for turn in range(self.passes + 1):
            if turn:
                codes = descend(rows_OI, second_II, codes, keep_OI=keep_OI, damping=damping)
            if self.refit:
                codes = refit_scales(rows_OI, second_II, codes)
        found, first = [], 0
        for weight, part, one in zip(weights, parts, decisions, strict=True):
            found.append(codes.rows(first, first + len(part), tuple(weight.shape), transposed=one.layer.transposed))
            first += len(part)
        return found

    @property
    def sparse(self) -> bool:
        """Say whether weights are taken out as they are rounded."""
        return bool(self.sparsity or self.pattern)

    @property
    def _pattern(self) -> Pattern | None:
        return read_pattern(self.pattern) if self.pattern else None


class LearnedRounding(Gptq):
    """Learn for each weight whether to round up or down, and each group's scale, from the output of its whole block.

    In a recipe: `- learned_rounding: {bits: 4, group_size: 64, steps: 200}`. Cheng et al., "AutoRound", 2023; the
    solver is `learned.py`. Slower than `gptq` by some `steps` x `batch_size` / `samples` times, and closer.
    """

    name: ClassVar[str] = "learned_rounding"
    learned_value_bytes: ClassVar[int] = 64  # weight, position, offset, gradients, and what autograd keeps of rounding

    start: Literal["gptq", "nearest"] = Field("gptq", description="the codes that learning starts from")
    steps: int = Field(200, ge=1, description="steps of signed gradient descent for each block")
    batch_size: int = Field(8, ge=1, description="samples of one step")
    rate: float | None = Field(None, gt=0, description="first step of an offset, in codes; empty = 1 / steps")

    @model_validator(mode="after")
    def _learns_integers(self) -> Self:
        if self.format != "int":
            raise ValueError(f"learned_rounding moves codes by equal steps, which {self.format} has not; use gptq")
        return self

    def solving_bytes(self, decisions: Sequence[Decision], values: int, sample_bytes: int) -> int:
        """Return the bytes that the start takes, or one step of learning: all layers' gradients, one sample's graph."""
        learning = LEARNED_BYTES * values + GRAPH_SAMPLES * sample_bytes
        return max(super().solving_bytes(decisions, values, sample_bytes) + 4 * values, learning)

    @property
    def fits_outputs(self) -> bool:
        """Say that the reference outputs of every sample are wanted."""
        return True

    def solve(self, block: Block) -> None:
        """Learn from the start codes on; keep what was learned only where the block's output is nearer with it."""
        weights = {parameter: block.candidate.values(parameter).clone() for parameter in block.decisions}
        if self.start == "gptq":
            super().solve(block)
        else:
            for parameter, codes in self.plain_codes(block).items():
                block.set_quantized(parameter, codes)
        if not block.calls:
            return
        if self.sparse:  # what was taken out must not come back: it is not to be made up for either
            weights = {name: weight * (block.solved[name].dequantize() != 0) for name, weight in weights.items()}
        # an expert that saw too few tokens keeps what it has: so few say nothing of those to come
        start = {name: codes for name, codes in block.solved.items() if name not in block.starved}
        before = block.output_error()
        learned = self._learned(block, {name: weights[name] for name in start}, start)
        for parameter, codes in learned.items():
            block.set_quantized(parameter, codes)
        after = block.output_error()
        if not after < before:
            block.notes.append(f"learning gave {after:.2e} after {before:.2e}, so {self.start} stands")
            for parameter, codes in start.items():
                block.set_quantized(parameter, codes)

    def _learned(
        self, block: Block, weights: Mapping[str, Tensor], start: Mapping[str, Quantized]
    ) -> dict[str, Quantized]:
        """Return the codes that are learned from `start`, on the block's device."""
        inside = {parameter: parameter.removeprefix(f"{block.name}.") for parameter in start}
        block.module.requires_grad_(False)

        def loss(made: Mapping[str, Tensor], sample: int) -> Tensor:
            with computing(block.dtype, block.device):
                output = block.output(block.calls[sample], {inside[name]: weight for name, weight in made.items()})
            return token_error(hidden_states(output), hidden_states(block.targets[sample]).to(block.device))

        with block.in_memory():
            learned, _ = learn_rounding(
                loss,
                {name: weight.to(block.device) for name, weight in weights.items()},
                {name: codes.to(block.device) for name, codes in start.items()},
                len(block.calls),
                steps=self.steps,
                batch_size=self.batch_size,
                rate=self.rate,
                seed=block.seed,
            )
        return learned

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it takes minutes a block, so it is carried out where a recipe asks for it."""
        yield from ()
