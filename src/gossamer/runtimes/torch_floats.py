"""Lower codes that are no integers into the tensors that compressed-tensors reads, and read them back.

A layer `p` with codes c [O, I] (places of levels, see `models/levels.py`) and scales s [O, G] becomes one of

    float-quantized        p.weight               float8_e4m3fn [O, I]
                           p.weight_scale         float16 [O, G]
    mxfp4-pack-quantized   p.weight_packed        uint8 [O, I/2]     two E2M1 patterns a byte, the first in the low half
                           p.weight_scale         uint8 [O, G]       E8M0: s = 2^(byte - 127)
    nvfp4-pack-quantized   p.weight_packed        uint8 [O, I/2]
                           p.weight_scale         float8_e4m3fn [O, G]
                           p.weight_global_scale  float32 [1]        s = weight_scale / weight_global_scale

A pattern is |c|, with the sign bit set where c < 0. compressed-tensors (0.19 and 0.20) multiplies 4-bit floats out in
bfloat16 whatever the model is, so such a folder's other tensors must be bfloat16 too, or its first product would fail.
Level times scale is exact there. Left out: one weight_global_scale for layers that a server may fuse (queries, keys and
values), since codes are decided layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from gossamer.models.levels import Format, tensor_scale
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec
from gossamer.models.shards import Entry

FloatLayout = Literal["float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"]
LAYOUTS: dict[str, FloatLayout] = {
    "fp8": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
E8M0_BIAS = 127


def float_refusal(role: str, spec: QuantSpec, activation: ActivationSpec | None) -> str | None:
    """Return why compressed-tensors cannot hold codes that are no integers in a layer, or None when it can."""
    if spec.format == "int":
        return None
    if spec.format not in LAYOUTS:
        return f"compressed-tensors has no place for {spec.format}; use onnxruntime, or fp8, mxfp4, nvfp4 or integers"
    if spec.format != "fp8" and role == "embedding":
        return f"transformers opens no packed embedding, and {spec.format} is packed: use fp8 or integers for it"
    if activation is not None:
        return f"inputs are rounded to integers, which do not multiply {spec.format} weights"
    return None


def refusal_beside(spec: QuantSpec, floats: str) -> str | None:
    """Return why codes cannot lie in a folder whose other tensors are of a dtype, or None when they can."""
    if spec.format not in ("mxfp4", "nvfp4") or floats == "bf16":
        return None
    return (
        f"compressed-tensors multiplies {spec.format} codes out in bfloat16, and the rest of the model would be "
        f"{floats}: add `- cast: {{dtype: bf16}}` to the recipe"
    )


def float_tensors(quantized: Quantized) -> dict[str, Tensor]:
    """Return the tensors that hold one weight [O, I] by local name."""
    scale_OG = quantized.scale.contiguous()
    if quantized.spec.format == "fp8":
        weight_OI = patterns(quantized.codes, 8).view(torch.float8_e4m3fn).reshape(quantized.shape)
        return {"weight": weight_OI, "weight_scale": scale_OG}
    packed = pack_pairs(patterns(quantized.codes, 4))
    if quantized.spec.format == "mxfp4":
        exponent_OG = torch.frexp(scale_OG.float())[1] - 1  # of exact powers of two
        return {"weight_packed": packed, "weight_scale": (exponent_OG + E8M0_BIAS).to(torch.uint8)}
    unit = tensor_scale(float(scale_OG.max()))
    return {
        "weight_packed": packed,
        "weight_scale": (scale_OG.float() / unit).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([1.0 / unit]),
    }


def float_entries(prefix: str, shape: tuple[int, ...], spec: QuantSpec) -> list[Entry]:
    """Return what `float_tensors` will hold for a weight [O, I], before any code is made; names begin with `prefix`."""
    rows, columns = shape
    groups = columns // spec.group_size if spec.group_size else 1
    scales = {"fp8": torch.float16, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}[spec.format]
    entries = [Entry(f"{prefix}weight_scale", scales, (rows, groups))]
    if spec.format == "fp8":
        return [*entries, Entry(f"{prefix}weight", torch.float8_e4m3fn, shape)]
    entries.append(Entry(f"{prefix}weight_packed", torch.uint8, (rows, columns // 2)))
    if spec.format == "nvfp4":
        entries.append(Entry(f"{prefix}weight_global_scale", torch.float32, (1,)))
    return entries


def float_bytes(shape: tuple[int, ...], spec: QuantSpec, copies: int = 1) -> int:
    """Return how many bytes `float_tensors` takes for a weight [O, I]; `copies` counts the modules that share it."""
    entries = float_entries("", (shape[0], math.prod(shape[1:])), spec)
    return sum(entry.num_bytes * (copies if "scale" in entry.name else 1) for entry in entries)


def read_float(
    owner: str, weights: Mapping[str, Any], held: Mapping[str, object], read: Callable[[str], Tensor]
) -> Quantized:
    """Return the codes of a layer of a folder; `weights` are its settings, `held` the names of the folder's tensors."""
    name = format_of(weights)
    scale = read(f"{owner}.weight_scale")
    if f"{owner}.weight_packed" in held:
        codes_OI = codes_of(unpack_pairs(read(f"{owner}.weight_packed")), 4)
    else:
        codes_OI = codes_of(read(f"{owner}.weight").view(torch.uint8), 8)
    if name == "mxfp4":
        scale_OG = torch.ldexp(torch.ones(scale.shape), scale.to(torch.int32) - E8M0_BIAS)
    elif name == "nvfp4":
        scale_OG = scale.float() / read(f"{owner}.weight_global_scale")
    else:
        scale_OG = scale.float()
    grouped = weights["strategy"] != "channel"
    bits, group_size = int(weights["num_bits"]), weights["group_size"] if grouped else None
    spec = QuantSpec(bits=bits, group_size=group_size, format=name)
    return Quantized(codes_OI, scale_OG, None, spec, tuple(codes_OI.shape))


def format_of(weights: Mapping[str, Any]) -> Format:
    """Return which format the settings of a config group mean."""
    if weights["type"] != "float":
        return "int"
    if weights["num_bits"] == 8:
        return "fp8"
    return "nvfp4" if weights["strategy"] == "tensor_group" else "mxfp4"


def weight_args(spec: QuantSpec) -> QuantizationArgs:
    """Return what config.json says of a grid."""
    if spec.format == "fp8":
        strategy = "group" if spec.group_size else "channel"
        return QuantizationArgs(num_bits=8, type="float", strategy=strategy, group_size=spec.group_size)
    strategy, scales = ("group", torch.uint8) if spec.format == "mxfp4" else ("tensor_group", torch.float8_e4m3fn)
    return QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=spec.group_size, scale_dtype=scales)


def patterns(codes: Tensor, bits: int) -> Tensor:
    """Return codes as bit patterns with the sign on top, uint8.

    >>> patterns(torch.tensor([0, 7, -1], dtype=torch.int8), 4).tolist()
    [0, 7, 9]
    """
    return codes.abs().view(torch.uint8) | ((codes < 0).to(torch.uint8) << (bits - 1))


def codes_of(pattern: Tensor, bits: int) -> Tensor:
    """Return the codes int8 of bit patterns; both zeros are 0."""
    sign = 1 << (bits - 1)
    magnitude = (pattern & (sign - 1)).to(torch.int8)
    return torch.where(pattern & sign != 0, -magnitude, magnitude)


def pack_pairs(values: Tensor) -> Tensor:
    """Return values below 16 [O, I] two a byte [O, I/2], the first in the low half."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def unpack_pairs(packed: Tensor) -> Tensor:
    """Return the values [O, I] that `pack_pairs` packed."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(1)
