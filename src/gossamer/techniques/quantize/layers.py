"""Which parameters a step rounds: what every technique of this family asks of its `targets` and `ignore`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gossamer.errors import RecipeError
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.techniques.base import Decision
from gossamer.techniques.match import layers_matching
from gossamer.techniques.quantize.grid import check_group

ROUNDED_KINDS = ("linear", "conv", "embedding")


def weight_decisions(
    model: ModelMap,
    technique: str,
    spec: QuantSpec,
    *,
    targets: Sequence[str],
    ignore: Sequence[str],
    activation: Callable[[LayerInfo], ActivationSpec | None] = lambda _: None,
) -> list[Decision]:
    """Return one decision for each matched layer; a tied head follows the embedding that owns the weight.

    Raises RecipeError for a pattern that matches nothing, TechniqueError for a group size that does not divide.
    """
    chosen = layers_matching(model, targets, "targets")
    ignored = {layer.name for layer in layers_matching(model, ignore, "ignore")} if ignore else set()
    decisions: dict[str, Decision] = {}
    for layer in chosen:
        if layer.name in ignored or layer.kind not in ROUNDED_KINDS:
            continue
        parameter = layer.tied_to or f"{layer.name}.weight"
        named = layer.name in targets or layer.tied_to is None
        if not named or parameter in decisions:
            continue  # a tied head is the embedding's memory: it is rounded when the embedding is
        check_group(num_inputs(layer), spec, layer.name)
        decisions[parameter] = Decision(parameter=parameter, layer=layer, weight=spec, activation=activation(layer))
    if not decisions:
        raise RecipeError(
            f"{technique} matches no layer: {len(chosen)} matched targets {list(targets)}, all ignored or tied",
            "loosen `ignore`, or add `embedding` to `targets`",
        )
    return list(decisions.values())


def num_inputs(layer: LayerInfo) -> int:
    """Return how many weights one output channel of a layer has."""
    return torch.Size(layer.shape[1:]).numel()
