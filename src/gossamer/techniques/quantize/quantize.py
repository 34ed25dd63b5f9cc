"""The technique `quantize`: round-to-nearest codes for weights, and 8-bit grids for the inputs of layers.

Weights get codes from `grid.py` (no data needed); with `activations: dynamic` a layer's input is rounded to 8 bits as
it comes, with `activations: static` to a range found on calibration rows by `ranges.py`. Convolutions take their
batch norms in first, so that what is rounded is what the runtime multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.deferred import Outline
from gossamer.models.fold import fold_batch_norms
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec
from gossamer.models.roles import EXPERT_ROLES, LayerInfo, ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, check_not_rounded, searched
from gossamer.techniques.match import layers_matching
from gossamer.techniques.quantize.formats import FormatSettings, check_format
from gossamer.techniques.quantize.grid import ScaleSearch, quantize_weight
from gossamer.techniques.quantize.layers import num_inputs, weight_decisions
from gossamer.techniques.quantize.ranges import Observer, chosen_range, collect_ranges

FINE_GROUPS = (32, 64, 128)
MIN_EMBEDDING_SHARE = 0.05  # of all parameters: below it the planner does not ask whether to round embeddings


class Quantize(FormatSettings):
    """Round weights to 8, 7, 4, 3 or 2 bits or to a float format, and optionally the inputs of layers to 8 bits.

    In a recipe: `- quantize: {bits: 4, group_size: 128, ignore: [lm_head]}`, `- quantize: {format: nvfp4}`.
    """

    name: ClassVar[str] = "quantize"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(roles=("linear", "convolution", "embedding"))

    bits: Literal[8, 7, 6, 5, 4, 3, 2] = searched(
        8, [8, 7, 4, 3, 2], "width of a weight's code; 7 cannot overflow on processors without int8 dot products"
    )
    symmetric: bool = searched(True, [True, False], "one grid around zero, or one with a zero point of its own")
    group_size: int | None = searched(
        None, [None, 128, 64, 32], "inputs that share a scale; empty = one scale for each output channel"
    )
    scale: ScaleSearch = searched("mse", ["mse"], "where scales come from: the extremes, least squared error, or HQQ")
    activations: Literal["none", "dynamic", "static"] = searched(
        "none", ["none", "dynamic", "static"], "round the inputs of layers to 8 bits: not, as they come, calibrated"
    )
    activation_scope: Literal["tensor", "token"] = Field("tensor", description="what shares a dynamic range")
    activation_symmetric: bool = Field(False, description="int8 inputs around zero instead of uint8 with a zero point")
    observer: Observer = searched("mse", ["mse"], "how a static range is chosen: minmax, percentile or mse")
    percentile: float = Field(99.99, gt=50, le=100, description="share of values inside the range, for `percentile`")
    targets: tuple[str, ...] = Field(
        ("linear", "convolution"), description="roles, module names, patterns with * or re:... ; what is rounded"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; what stays as it is")

    @model_validator(mode="after")
    def _fits_integer_kernels(self) -> Self:
        check_format(self.format, self.bits, self.symmetric, self.group_size, self.scale)
        integers = self.format == "int" and self.bits >= 7 and self.symmetric and not self.group_size
        if self.activations != "none" and not integers:
            grid = self._weight_spec()
            raise ValueError(
                f"activations: {self.activations} needs weights of 8 or 7 bits, symmetric, one scale a channel; "
                f"these are {grid}"
            )
        return self

    def rows_needed(self) -> int:
        """Return how many calibration rows this step cannot do without."""
        return 8 if self.activations == "static" else 0

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return one decision for each matched layer; a tied head follows the embedding that owns the weight.

        Raises RecipeError for a pattern that matches nothing, TechniqueError for a group size that does not divide.
        """
        return weight_decisions(
            model,
            self.name,
            self._weight_spec(),
            targets=self.targets,
            ignore=self.ignore,
            activation=self._activation_spec,
        )

    def label(self) -> str:
        """Return the grid in a few words: `int8 dynamic`, `int4 group 32 asymmetric of embedding`."""
        words = [f"int{self.bits}" if self.format == "int" else self.format]
        if self.group_size:
            words.append(f"group {self.group_size}")
        if not self.symmetric:
            words.append("asymmetric")
        words.append("weight-only" if self.activations == "none" else self.activations)
        if "embedding" in self.targets:
            words = [*words[:-1], "embeddings"]
        return " ".join(words)

    def _weight_spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, symmetric=self.symmetric, group_size=self.group_size, format=self.format)

    def _activation_spec(self, layer: LayerInfo) -> ActivationSpec | None:
        if self.activations == "none" or layer.kind == "embedding":
            return None
        return ActivationSpec(kind=self.activations, scope=self.activation_scope, symmetric=self.activation_symmetric)

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with codes in place of weights and grids in front of layers.

        Static ranges are found on the candidate as it is before this step rounds anything. Raises TechniqueError for
        a parameter that an earlier step has rounded, and for too few calibration rows.
        """
        decisions = self.resolve(model)
        check_not_rounded(candidate, decisions)
        if candidate.weights is None and any(decision.layer.kind == "conv" for decision in decisions):
            example = {name: torch.from_numpy(values) for name, values in context.example.items()}
            candidate.module, _ = fold_batch_norms(candidate.module, example, _forward_of(candidate, context))
        candidate.activations.update(self._input_grids(candidate, decisions, context))
        with context.progress.stage("rounding weights", len(decisions)) as advance:
            for decision in decisions:
                assert decision.weight is not None
                shape = tuple(candidate.module.get_parameter(decision.parameter).shape)
                scales = decision.weight.scale_dtype
                outline = Outline(decision.weight, shape, decision.layer.transposed, scales)
                candidate.round(decision.parameter, outline, self._rule(decision))
                advance(1)
        candidate.applied.append(self.entry())
        return candidate

    def _rule(self, decision: Decision) -> Callable[[Tensor], Quantized]:
        """Return what makes a parameter's codes from its values."""
        assert decision.weight is not None
        return partial(
            quantize_weight,
            spec=decision.weight,
            scale=self.scale,
            transposed=decision.layer.transposed,
            name=decision.parameter,
        )

    def _input_grids(
        self, candidate: Candidate, decisions: list[Decision], context: Context
    ) -> dict[str, ActivationSpec]:
        """Return the grid of each layer's input by module name: as declared, or calibrated."""
        specs = {d.layer.name: d.activation for d in decisions if d.activation is not None}
        if self.activations != "static":
            return specs
        if len(context.calibration) < self.rows_needed():
            raise TechniqueError(
                f"static activations need {self.rows_needed()} calibration rows, {len(context.calibration)} were given",
                "give more rows with --data, or use activations: dynamic",
            )
        forward = _Forward(candidate, context)
        ranges = collect_ranges(candidate.module, specs, forward, histogram=self.observer != "minmax")
        grids = {}
        for name, spec in specs.items():
            low, high = chosen_range(ranges[name], self.observer, self.percentile, symmetric=spec.symmetric)
            grids[name] = spec.model_copy(update={"low": low, "high": high})
        return grids

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Quantize, ...]]:
        """Yield every combination of a weight grid for the layers and one for the embeddings that the runtime holds."""
        of_embeddings: list[Quantize | None] = [None, *cls.of_embeddings(space)]
        for layers in cls._options(space, targets=_present_targets(space.model), activations=cls._activation_domain()):
            for rows in of_embeddings:
                yield (layers,) if rows is None else (layers, rows)

    @classmethod
    def of_embeddings(cls, space: SearchSpace) -> list[Quantize]:
        """Return the grids for the embeddings that the runtime holds; none where embeddings are a small part."""
        embeddings = [layer for layer in space.model.layers if layer.role == "embedding" and layer.tied_to is None]
        share = sum(layer.num_parameters for layer in embeddings) / max(1, space.model.num_parameters)
        if share < MIN_EMBEDDING_SHARE:
            return []
        return list(cls._options(space, targets=("embedding",), activations=("none",)))

    @classmethod
    def _activation_domain(cls) -> tuple[str, ...]:
        return tuple(cls.domain("activations"))

    @classmethod
    def _options(
        cls, space: SearchSpace, *, targets: tuple[str, ...], activations: tuple[str, ...]
    ) -> Iterator[Quantize]:
        """Yield the settings from the search domains that the runtime can hold for these targets."""
        if not targets:
            return
        seen: set[Quantize] = set()
        for settings in cls.product("activations", "bits", "symmetric", "group_size", "scale", "observer"):
            if settings["activations"] not in activations or not _sensible(settings, space):
                continue
            if settings["activations"] == "none":
                settings["observer"] = cls.model_fields["observer"].default
            option = cls._held_by(space, cls(targets=targets, **settings))
            if option is not None and option not in seen:
                seen.add(option)
                yield option

    @classmethod
    def _held_by(cls, space: SearchSpace, option: Quantize) -> Quantize | None:
        """Return the option with layers that the runtime or the group size refuses under `ignore`.

        None if most are, or if the runtime stores its codes as wider ones.
        """
        refused, kept_parameters, all_parameters, narrow = [], 0, 0, option.activations != "none"
        for layer in layers_matching(space.model, option.targets, "targets"):
            if layer.kind not in ("linear", "conv", "embedding") or layer.tied_to is not None:
                continue
            divides = not option.group_size or num_inputs(layer) % option.group_size == 0
            activation = option._activation_spec(layer)
            reason = space.runtime.refusal(layer.role, layer.shape, option._weight_spec(), activation)
            all_parameters += layer.num_parameters
            if reason is None and divides:
                kept_parameters += layer.num_parameters
                narrow = narrow or not stored_as_wider(space, layer, option._weight_spec())
            else:
                refused.append(layer.name)
        if kept_parameters * 2 < all_parameters or not narrow:
            return None
        return option.model_copy(update={"ignore": tuple(refused)})


class _Forward:
    """Run the candidate over the calibration rows, once for each time it is iterated."""

    def __init__(self, candidate: Candidate, context: Context) -> None:
        self.candidate = candidate
        self.context = context

    def __iter__(self) -> Iterator[None]:
        source = self.candidate.source
        batches = self.context.calibration
        with (
            self.candidate.simulated() as module,
            torch.inference_mode(),
            self.context.progress.stage("calibrating", len(batches)) as advance,
        ):
            for batch in batches:
                inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
                source.forward(module, inputs, self.context.task.output)
                advance(1)
                yield


def _forward_of(candidate: Candidate, context: Context) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """Return the function that runs a module of this candidate on named inputs."""
    return lambda module, inputs: candidate.source.forward(module, inputs, context.task.output)


def _present_targets(model: ModelMap) -> tuple[str, ...]:
    """Return which of the default targets the model has at all."""
    kinds = {layer.kind for layer in model.layers if layer.tied_to is None}
    return tuple(target for kind, target in (("linear", "linear"), ("conv", "convolution")) if kind in kinds)


def needs_symmetry(space: SearchSpace) -> bool:
    """Say whether the runtime has no place for the zero points of this model's experts, which are most of it."""
    spec = QuantSpec(bits=4, symmetric=False)
    experts = next((layer for layer in space.model.layers if layer.role in EXPERT_ROLES), None)
    return experts is not None and space.runtime.refusal(experts.role, experts.shape, spec, None) is not None


def stored_as_wider(space: SearchSpace, layer: LayerInfo, spec: QuantSpec) -> bool:
    """Say whether the runtime's file takes as many bytes with one bit more: then fewer bits lose for nothing."""
    if spec.bits == 8 or spec.format != "int":
        return False
    wider = spec.model_copy(update={"bits": spec.bits + 1})
    sizes = [space.runtime.stored_bytes(layer.role, layer.shape, each, 4) for each in (spec, wider)]
    return sizes[0] >= sizes[1]


def _sensible(settings: dict[str, Any], space: SearchSpace) -> bool:
    """Say whether a combination of settings is worth the planner's time; recipes may still ask for any of them."""
    if settings["activations"] != "none":
        enough_rows = settings["activations"] == "dynamic" or space.calibration_rows >= 8
        return settings["bits"] >= 7 and settings["symmetric"] and settings["group_size"] is None and enough_rows
    if settings["bits"] == 7:
        return False  # only integer products can overflow
    if settings["bits"] == 8:
        return settings["symmetric"] and settings["group_size"] is None  # finer 8-bit grids cost bytes and gain nothing
    if settings["symmetric"] != needs_symmetry(space) or settings["group_size"] is None:
        return False  # below 8 bits a zero point and groups pay for themselves
    # 3 and 2 bits need the finest groups
    return bool(settings["bits"] == 4 or settings["group_size"] == min(FINE_GROUPS))
