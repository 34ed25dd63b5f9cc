"""Lower our codes into the tensors and the `quantization_config` that compressed-tensors 0.15 and later reads.

A layer `p` with codes q (int-b, [O, I]), scale s [O, G] and zero point z [O, G] becomes one of two layouts:

    pack-quantized   p.weight_packed  int32 [O, ceil(I*b/32)]   codes + 2^(b-1), bit by bit without gaps
                     p.weight_shape   int64 [2]
                     p.weight_scale   float16 [O, G] (float32 where codes came with such)
                     p.weight_zero_point  int8 [O, G], only when asymmetric
    int-quantized    p.weight         int8  [O, I]
                     p.weight_scale   float16 [O, G] (float32 where codes came with such)
                     p.weight_zero_point  int8 [O, G], only when asymmetric

pack-quantized is used for weight-only linear layers, int-quantized where inputs are rounded too (what integer kernels
of servers expect) and for embeddings: transformers 5.23 looks for a parameter called `weight` when it opens one, and
ties parameters of that name. A table therefore takes 8 bits per code, whatever its codes need. Where the output layer
shares it, it is stored once, but each of the two modules keeps its copy of the scales.

An asymmetric packed layer calls its groups blocks of 1 x g (strategy "block"), which is the same grid. Under
strategy "group" or "channel" compressed-tensors 0.20 packs the zero points too, and then cannot load them: while
transformers builds the empty model they keep their unpacked shape, and the file's shape does not fit.

Codes that are no integers take layouts of their own (`torch_floats.py`).
    expert           the tensors of pack-quantized, symmetric only, for each layer of stacked experts under the name
                     that a checkpoint gives it; scales are stored as the model's floats

transformers 5.24 unpacks experts while it opens a folder and stacks them: one grid for all experts of the model, zero
points are dropped without a word, and the weight's dtype is that of its scales (a float16 product of code and scale
would be rounded once more). A layer of the stack that is not packed would be dropped too, so what is not quantized is
stored stacked, under its parameter's own name.

Static input grids are `p.input_scale` and `p.input_zero_point` (unsigned codes minus 128: the format is signed).
Left out: convolutions and GPT-2's Conv1D (the format has no place for them).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

import torch
from compressed_tensors import __version__ as compressed_tensors_version
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import Tensor

from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec
from gossamer.models.shards import Entry
from gossamer.runtimes import torch_floats as floats

SCALE_BYTES = 2
EXPERT_SCALE_BYTES = 4
Layout = Literal["pack-quantized", "int-quantized", "expert"] | floats.FloatLayout
Setting = tuple[QuantSpec, ActivationSpec | None, Layout, int]  # the last: columns I of the weight


def layout_of(spec: QuantSpec, activation: ActivationSpec | None, is_table: bool, is_expert: bool = False) -> Layout:
    """Return which layout a layer's weight takes; a table is an embedding or shared with one."""
    if spec.format != "int":
        return floats.LAYOUTS[spec.format]
    if is_expert:
        return "expert"
    return "int-quantized" if activation is not None or is_table else "pack-quantized"


def layer_tensors(quantized: Quantized, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that hold one weight [O, I] by local name; scales that are not float16 become `dtype`."""
    if layout in floats.LAYOUTS.values():
        return floats.float_tensors(quantized)
    tensors = {"weight_scale": quantized.scale.to(scale_dtype(quantized.scale.dtype, dtype, layout)).contiguous()}
    if layout != "int-quantized":
        tensors["weight_packed"] = pack_codes(quantized.codes, quantized.spec.bits)
        tensors["weight_shape"] = torch.tensor(quantized.shape, dtype=torch.int64)
    else:
        tensors["weight"] = quantized.codes.reshape(quantized.shape).contiguous()
    if quantized.zero_point is not None:
        tensors["weight_zero_point"] = quantized.zero_point.contiguous()
    return tensors


def layer_entries(
    prefix: str, shape: tuple[int, ...], spec: QuantSpec, layout: Layout, scales: torch.dtype
) -> list[Entry]:
    """Return what `layer_tensors` will hold for a weight [O, I], before any code is made; names begin with `prefix`.

    `scales` is the dtype that scales are stored as.
    """
    if layout in floats.LAYOUTS.values():
        return floats.float_entries(prefix, shape, spec)
    rows, columns = shape
    groups = columns // spec.group_size if spec.group_size else 1
    entries = [Entry(f"{prefix}weight_scale", scales, (rows, groups))]
    if layout != "int-quantized":
        packed = math.ceil(columns * spec.bits / 32)
        entries.append(Entry(f"{prefix}weight_packed", torch.int32, (rows, packed)))
        entries.append(Entry(f"{prefix}weight_shape", torch.int64, (len(shape),)))
    else:
        entries.append(Entry(f"{prefix}weight", torch.int8, shape))
    if not spec.symmetric:
        entries.append(Entry(f"{prefix}weight_zero_point", torch.int8, (rows, groups)))
    return entries


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Return signed codes as int32 [O, ceil(I*bits/32)], shifted to be unsigned, the first in the lowest bits.

    Equal to compressed-tensors' `pack_to_int32`. Widths that divide a byte need no scattering of bits, which makes them
    ten times as fast: a byte holds 8 / bits codes, and four bytes are a word on every processor that torch runs on.
    """
    if 8 % bits or sys.byteorder != "little":
        scattered: Tensor = pack_to_int32(codes_OI, bits)
        return scattered
    per_word, num_rows = 32 // bits, codes_OI.shape[0]
    unsigned_OI = codes_OI.view(torch.uint8) ^ (1 << (bits - 1))  # adds 2^(bits-1) modulo 2^bits
    if bits < 8:
        unsigned_OI &= (1 << bits) - 1
    if missing := -codes_OI.shape[1] % per_word:
        unsigned_OI = torch.nn.functional.pad(unsigned_OI, (0, missing))
    packed = unsigned_OI[:, 0 :: 8 // bits].contiguous()
    for place in range(1, 8 // bits):
        packed |= unsigned_OI[:, place :: 8 // bits] << (bits * place)
    return packed.view(torch.int32).reshape(num_rows, -1)


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Return the signed codes int8 [O, I] that `pack_codes` packed."""
    codes: Tensor = unpack_from_int32(packed, bits, torch.Size(shape))
    return codes


def scale_dtype(of_codes: torch.dtype, dtype: torch.dtype, layout: Layout) -> torch.dtype:
    """Return what scales are stored as: as they are when they are float16, else as all floats of the file are.

    Those of experts are always as all floats are.
    """
    return of_codes if of_codes == torch.float16 and layout != "expert" else dtype


def layer_bytes(shape: tuple[int, ...], spec: QuantSpec, layout: Layout, copies: int = 1) -> int:
    """Return how many bytes `layer_tensors` takes for a weight [O, I]; `copies` counts the modules that share it."""
    if layout in floats.LAYOUTS.values():
        return floats.float_bytes(shape, spec, copies)
    rows, columns = shape[0], math.prod(shape[1:])
    groups = columns // spec.group_size if spec.group_size else 1
    if layout != "int-quantized":
        codes = rows * 4 * math.ceil(columns * spec.bits / 32) + 8 * len(shape)
    else:
        codes = rows * columns
    scale_bytes = EXPERT_SCALE_BYTES if layout == "expert" else SCALE_BYTES
    return codes + copies * rows * groups * (scale_bytes + (0 if spec.symmetric else 1))


def input_tensors(activation: ActivationSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a static input grid by local name; none for a dynamic one."""
    if activation.kind == "dynamic":
        return {}
    scale, zero_point = activation.static_grid()
    tensors = {"input_scale": torch.tensor([scale], dtype=dtype)}
    if not activation.symmetric:
        tensors["input_zero_point"] = torch.tensor([zero_point - 128], dtype=torch.int8)
    return tensors


def quantization_config(
    layers: Mapping[str, Setting], untouched: list[str], cache_scheme: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return `quantization_config` of config.json: one group of exact module names for every distinct setting."""
    members: dict[tuple[QuantSpec, str, Layout, int], dict[str, str]] = {}
    for name, (spec, activation, layout, columns) in layers.items():
        # layers with different static ranges share a group: the ranges are tensors, the group only says that there are
        kind = "" if activation is None else f"{activation.kind} {activation.scope} {activation.symmetric}"
        block = (spec.group_size or columns) if layout == "pack-quantized" and not spec.symmetric else 0
        target = _experts_of(name) if layout == "expert" else name
        inside = members.setdefault((spec, kind, layout, block), {})
        inside.setdefault(target, name)
    groups = {}
    for index, ((spec, _, layout, block), names) in enumerate(members.items()):
        activation = layers[next(iter(names.values()))][1]
        groups[f"group_{index}"] = QuantizationScheme(
            targets=list(names),
            weights=_weight_args(spec, block),
            input_activations=None if activation is None else _input_args(activation),
            format=_format(layout),
        )
    layouts = {_format(layout) for _, _, layout, _ in layers.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=untouched,
        kv_cache_scheme=cache_scheme,
    )
    return {**config.model_dump(mode="json"), "version": compressed_tensors_version}


def _format(layout: Layout) -> str:
    return "pack-quantized" if layout == "expert" else layout


def _experts_of(name: str) -> str:
    """Return the pattern for the layers of all experts beside one of them, `...experts.3.gate_proj`.

    transformers takes the grid of experts from the first pattern in which the word stands.
    """
    return rf"re:^{re.escape(name.rsplit('.', 2)[0])}\.\d+\..+$"


class Targets:
    """Say which settings of a `quantization_config` hold for a module, by its name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        groups = config.get("config_groups", {}).values()
        self._exact: dict[str, Mapping[str, Any]] = {
            target: group["weights"] for group in groups for target in group["targets"]
        }
        self._patterns = {
            re.compile(target[3:]): weights for target, weights in self._exact.items() if target.startswith("re:")
        }

    def of(self, module: str) -> Mapping[str, Any] | None:
        """Return the settings of a module's weight, or None when it is not quantized."""
        if module in self._exact:
            return self._exact[module]
        return next((weights for pattern, weights in self._patterns.items() if pattern.match(module)), None)


def _weight_args(spec: QuantSpec, block: int) -> QuantizationArgs:
    if spec.format != "int":
        return floats.weight_args(spec)
    if block:
        return QuantizationArgs(
            num_bits=spec.bits, type="int", symmetric=False, strategy="block", block_structure=[1, block]
        )
    strategy = "group" if spec.group_size else "channel"
    return QuantizationArgs(
        num_bits=spec.bits, type="int", symmetric=spec.symmetric, strategy=strategy, group_size=spec.group_size
    )


def _input_args(activation: ActivationSpec) -> QuantizationArgs:
    dynamic = activation.kind == "dynamic"
    strategy = activation.scope if dynamic else "tensor"
    return QuantizationArgs(num_bits=8, type="int", symmetric=activation.symmetric, strategy=strategy, dynamic=dynamic)
