"""Where a checkpoint's files hold a model's parameters: under their own name, a former one, or inside a stacked tensor.

transformers 5 renames and merges tensors while it opens a checkpoint. What is read piece by piece needs the way back:

    as it is         model.layers.0.self_attn.q_proj.weight
    renamed          model.layers.0.mlp.gate.weight            lies under  ...0.block_sparse_moe.gate.weight
    one of a stack   model.layers.0.mlp.experts.3.up_proj...   is a part of  ...0.mlp.experts.gate_up_proj, at 3

Left out: parameters that are joined of several tensors (fused queries, keys and values); their model is told by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from gossamer.models.experts import Layout, layouts


@dataclass(frozen=True)
class Place:
    """Name the tensor that holds a parameter, and (for a layer of a stacked tensor) which part of it."""

    tensor: str
    layout: Layout | None = None
    expert: int = 0
    number: int = 0


def find_places(module: nn.Module, held: Iterable[str]) -> dict[str, Place]:
    """Return where each parameter and buffer of a model lies among the tensors `held`; what is nowhere is missing."""
    tensors = {name: name for name in held}
    mapping = get_model_conversion_mapping(module, add_legacy=False) if isinstance(module, PreTrainedModel) else []
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    for name in list(tensors) if renamings else ():
        tensors.setdefault(apply_renamings(name, renamings), name)
    places = {name: Place(tensors[name]) for name in module.state_dict() if name in tensors}
    for experts, layout in layouts(module):
        stacked = f"{experts}.{layout.parameter}"
        if stacked in tensors:
            for expert, names in enumerate(layout.names(experts)):
                for number, name in enumerate(names):
                    places.setdefault(name, Place(tensors[stacked], layout, expert, number))
    return places


def reader(
    places: Mapping[str, Place], read: Callable[[str], Tensor], read_row: Callable[[str, int], Tensor]
) -> Callable[[str], Tensor]:
    """Return what reads a parameter by its name in the model: `read` a whole tensor, `read_row` one index of its first.

    >>> reader(find_places(module, shards.held), shards.read, shards.read_row)("lm_head.weight")  # doctest: +SKIP
    """

    def value(name: str) -> Tensor:
        place = places.get(name, Place(name))
        if place.layout is None:
            return read(place.tensor)
        row = read_row(place.tensor, place.expert).unsqueeze(0)
        return place.layout.piece(row, 0, place.number).contiguous()

    return value
