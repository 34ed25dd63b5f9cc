"""What vLLM makes of a compressed-tensors folder: which of its schemes each layer falls under, or why none.

The rules are those of vLLM 0.33.0's published source (model_executor/layers/quantization/compressed_tensors), as a
table. A scheme is chosen by the settings of a config group, and asks for parameters by name, dtype and shape. Three
rules hold for the whole folder:

    - codes in plain int8 (`int-quantized`) must come with rounded inputs: one group without ends the loading
    - layers that are fused (queries, keys and values; gate and up) share one group, or none of them is in any
    - of NVFP4 layers that are fused the largest `weight_global_scale` is taken for all: it must be the same

Nothing is run here. Left out: whether vLLM has the model's architecture, which kernel a GPU has for a shape (widths
other than 4 and 8 bits, and zero points other than of 4 bits, need its Humming kernel), experts, thin layers beside
weights.

Shape suffixes: O rows, I inputs, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.models.shards import Shards

SERVER = "vLLM 0.33.0"
# names of layers as architectures spell them -> fused into one by vLLM
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
FLOATS = "F16 BF16 F32"  # scales are cast to what vLLM computes with


@dataclass(frozen=True)
class Scheme:
    """Describe one of vLLM's schemes: the settings of a config group that lead to it, and what it loads.

    `inputs` are the strategies of rounded inputs with whether they are dynamic, None where inputs are not rounded;
    `group_size` is the only one that it takes, None for any.
    """

    name: str
    format: str
    type: str
    bits: range
    strategies: tuple[str, ...]
    inputs: tuple[tuple[str, bool] | None, ...] = (None,)
    symmetric_only: bool = True
    group_size: int | None = None
    tensors: tuple[str, ...] = ("weight", "weight_scale")

    def takes(self, group: Mapping[str, Any]) -> bool:
        """Say whether a config group leads here."""
        weights, inputs = group["weights"], group.get("input_activations")
        rounded = (inputs["strategy"], bool(inputs["dynamic"])) if inputs else None
        return (
            group["format"] == self.format
            and weights["type"] == self.type
            and weights["num_bits"] in self.bits
            and weights["strategy"] in self.strategies
            and rounded in self.inputs
            and (weights["symmetric"] or not self.symmetric_only)
            and self.group_size in (None, weights["group_size"])
            and (inputs is None or inputs["num_bits"] == 8)
        )


PACKED = ("weight_packed", "weight_scale", "weight_shape")
SCHEMES = (
    Scheme("WNA16", "pack-quantized", "int", range(2, 9), ("group", "channel"), symmetric_only=False, tensors=PACKED),
    Scheme("W8A8Int8", "int-quantized", "int", range(8, 9), ("channel",), (("tensor", False), ("token", True))),
    Scheme("W4A8Int", "int-quantized", "int", range(4, 5), ("group", "channel"), (("token", True),)),
    Scheme("W8A16Fp8", "float-quantized", "float", range(8, 9), ("channel",)),
    Scheme(
        "W4A4Mxfp4", "mxfp4-pack-quantized", "float", range(4, 5), ("group",), group_size=32,
        tensors=("weight_packed", "weight_scale"),
    ),
    Scheme(
        "W4A4Fp4", "nvfp4-pack-quantized", "float", range(4, 5), ("tensor_group",), group_size=16,
        tensors=("weight_packed", "weight_scale", "weight_global_scale"),
    ),
)  # fmt: skip


def scheme_of(group: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme that a config group of a folder leads to, None where vLLM has none."""
    return next((scheme for scheme in SCHEMES if scheme.takes(group)), None)


def expected_tensors(group: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what vLLM loads of a layer [O, I] by local name: safetensors' dtypes (several may do), and the shape."""
    scheme, weights = scheme_of(group), group["weights"]
    assert scheme is not None
    (rows, columns), bits = shape, weights["num_bits"]
    groups = columns // weights["group_size"] if "group" in weights["strategy"] else 1
    halves = ("U8", (rows, columns // 2))
    words = ("I32", (rows, math.ceil(columns * bits / 32)))
    scales = {"mxfp4-pack-quantized": "U8", "nvfp4-pack-quantized": "F8_E4M3"}.get(scheme.format, FLOATS)
    known: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("I8" if scheme.type == "int" else "F8_E4M3", shape),
        "weight_packed": words if scheme.type == "int" else halves,
        "weight_scale": (scales, (rows, groups)),
        "weight_shape": ("I64", (2,)),
        "weight_global_scale": ("F32", (1,)),
        "weight_zero_point": ("I32", (math.ceil(rows * bits / 32), groups)),
        "input_scale": (FLOATS, (1,)),
        "input_zero_point": ("I8", (1,)),
    }
    wanted = [*scheme.tensors]
    if not weights["symmetric"]:
        wanted.append("weight_zero_point")
    inputs = group.get("input_activations")
    if inputs and not inputs["dynamic"]:
        wanted += ["input_scale"] if inputs["symmetric"] else ["input_scale", "input_zero_point"]
    return {name: known[name] for name in wanted}


def served_notes(config: Mapping[str, Any], folder: Path, tables: Collection[str]) -> tuple[str, ...]:
    """Return in words what vLLM would make of a folder with this config.json; nothing of one without codes.

    `tables` are the names of its embeddings.
    """
    settings = config.get("quantization_config")
    if not settings:
        return ()
    reasons = list(_reasons(settings, folder, tables))
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return (f"loads with transformers, not with {SERVER}: {reasons[0]}{more}",)
    schemes = {scheme_of(group) for group in settings["config_groups"].values()}
    names = ", ".join(sorted(scheme.name for scheme in schemes if scheme is not None)) or "plain floats"
    return (f"by its published source {SERVER} loads this folder too ({names}); that was not tried",)


def _reasons(settings: Mapping[str, Any], folder: Path, tables: Collection[str]) -> Iterator[str]:
    """Yield why vLLM does not load a folder, or computes something else with it."""
    for group in settings["config_groups"].values():
        if why := _refusal(group, tables):
            yield f"{_named(group['targets'])}: {why}"
    yield from _torn(settings)
    yield from _other_scales(settings, folder)
    cache = settings.get("kv_cache_scheme")
    if cache and (cache["type"] != "float" or cache["num_bits"] != 8):
        yield f"keys and values are kept as {cache['type']}{cache['num_bits']}, which it keeps as fp8 only"


def _refusal(group: Mapping[str, Any], tables: Collection[str]) -> str | None:
    """Return why vLLM has no scheme for a config group, or None when it has one."""
    weights = group["weights"]
    scheme = scheme_of(group)
    if any(target.startswith("re:") for target in group["targets"]):
        return "experts were not followed"
    table = next((target for target in group["targets"] if target in tables), None)
    if group["format"] == "int-quantized" and not group.get("input_activations"):
        what = "an embedding, or shared with one" if table else "its inputs are not rounded"
        return f"it wants int8 codes only where inputs are rounded too ({what}); leave it in floats"
    if table is not None:
        return f"it opens no embedding in {group['format']}; leave it in floats"
    if scheme is not None:
        return None
    kind = f"{weights['type']}{weights['num_bits']}"
    if group["format"] == "pack-quantized":
        return f"zero points of {kind} codes lie as transformers reads them, not packed; use symmetric: true"
    scope = f"group {weights['group_size']}" if weights["group_size"] else "per channel"
    inputs = " with rounded inputs" if group.get("input_activations") else ""
    return f"it has no scheme for {kind} {'' if weights['symmetric'] else 'asymmetric '}{scope}{inputs}"


def _torn(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield layers that vLLM fuses and that are held in different ways."""
    place = {target: name for name, group in settings["config_groups"].items() for target in group["targets"]}
    place |= dict.fromkeys(settings.get("ignore") or (), "floats")
    for names in _siblings(place):
        if len({place[name] for name in names}) > 1:
            yield f"it fuses {_in_short(names)}, which are held in different ways"


def _other_scales(settings: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield NVFP4 layers that vLLM fuses and whose global scales differ."""
    groups = [group for group in settings["config_groups"].values() if group["format"] == "nvfp4-pack-quantized"]
    held = Shards(folder)
    for names in _siblings([target for group in groups for target in group["targets"]]):
        scales = {float(held.read(f"{name}.weight_global_scale")) for name in names}
        if len(scales) > 1:
            yield f"it takes one global scale for {_in_short(names)}, which have {len(scales)}: other numbers"


def _siblings(names: Collection[str]) -> Iterator[list[str]]:
    """Yield the layers that vLLM fuses into one."""
    known = set(names)
    for name in names:
        owner, _, last = name.rpartition(".")
        for fused in FUSED:
            if last == fused[0]:
                yield [f"{owner}.{one}" for one in fused if f"{owner}.{one}" in known]


def _in_short(names: Collection[str]) -> str:
    owner = next(iter(names)).rpartition(".")[0]
    return f"{', '.join(name.rpartition('.')[2] for name in names)} of {owner}"


def _named(targets: Collection[str]) -> str:
    first = next(iter(targets))
    return first if len(targets) == 1 else f"{first} and {len(targets) - 1} more"
