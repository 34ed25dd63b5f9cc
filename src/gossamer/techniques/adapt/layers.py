"""Which layers can have thin ones beside them, of which rank, and the settings that say so."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from gossamer.errors import RecipeError
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.techniques.base import Decision, Technique
from gossamer.techniques.match import layers_matching


class ThinLayers(Technique):
    """A technique that puts thin layers beside others: which others, and of which rank."""

    rank: int = Field(16, ge=1, description="of the thin layers beside each layer")
    targets: tuple[str, ...] = Field(
        ("linear",), description="roles, module names, patterns with * or re:... ; which layers get some"
    )
    ignore: tuple[str, ...] = Field((), description="the same kinds of patterns; what stays as it is")

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return nothing: what weights hold is other steps' matter.

        Raises RecipeError for a pattern that matches nothing, and for a rank that makes a layer larger.
        """
        for layer in self.chosen(model):
            check_rank(layer, self.rank, self.name)
        return []

    def chosen(self, model: ModelMap) -> list[LayerInfo]:
        """Return the layers that get thin ones."""
        return adaptable(model, self.name, self.targets, self.ignore)


def adaptable(model: ModelMap, step: str, targets: Sequence[str], ignore: Sequence[str]) -> list[LayerInfo]:
    """Return the matched linear layers inside of blocks that can have thin layers beside them.

    Raises RecipeError for a pattern that matches nothing, and where no such layer is left.
    """
    ignored = {layer.name for layer in layers_matching(model, ignore, "ignore")} if ignore else set()
    found = [
        layer
        for layer in layers_matching(model, targets, "targets")
        if layer.kind == "linear"
        and layer.role not in ("adapter", "router")
        and layer.stack is not None
        and layer.experts is None
        and layer.tied_to is None
        and not layer.transposed
        and layer.name not in ignored
    ]
    if not found:
        raise RecipeError(
            f"{step} matches no linear layer inside a block: targets {list(targets)}",
            "loosen `targets` or `ignore` (layers of experts, and those stored [in, out] as GPT-2's, have no adapters)",
        )
    return found


def check_rank(layer: LayerInfo, rank: int, step: str) -> None:
    """Raise RecipeError for a rank at which the thin layers hold as much as the one that they stand beside."""
    outputs, inputs = layer.shape
    largest = (outputs * inputs - 1) // (outputs + inputs)
    if rank > largest:
        raise RecipeError(
            f"{step}: rank {rank} beside {layer.name} takes {rank * (outputs + inputs):,} numbers, where the layer "
            f"itself has {outputs * inputs:,}",
            f"give a rank up to {largest}, or name the layer under `ignore`",
        )
