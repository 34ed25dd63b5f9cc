"""Lower our codes into an OpenVINO graph: what replaces a float constant, and what stands before a layer's input.

A weight with codes q, scale s and zero point z becomes, in front of every consumer of the float constant,

    Constant(q) -> Convert(f32) [-> Subtract(Convert(z))] -> Multiply(s) [-> Reshape to [O, I...] when there are groups]

which is the pattern that the CPU plugin keeps compressed in memory for MatMul and Gather and, behind a FakeQuantize,
runs in integers. Symmetric codes are stored signed (i4, i8), asymmetric ones unsigned (u4, u8: codes and zero points
both moved up by 2^(c-1) for a container of c bits). Containers are 4 bits wide for codes of up to 4 bits, else 8.

Codes that are no integers (`models/levels.py`) have types of their own: f8e4m3, f4e2m1 (MXFP4, NVFP4) and nf4. The
plugin of 2026.4 keeps the 4-bit ones compressed as well, and multiplies f8e4m3 out to float32 when it compiles.

A static input grid becomes FakeQuantize with 256 levels whose range is the grid's own: from (low - z) * s to
(high - z) * s for codes low..high, so that rounding falls on the same points.

Left out: dynamic input grids (OpenVINO has its own, chosen when it runs, which is not the one that was judged).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset13 as ops

from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec

CONTAINERS: dict[tuple[int, bool], Any] = {
    (4, True): ov.Type.i4,
    (8, True): ov.Type.i8,
    (4, False): ov.Type.u4,
    (8, False): ov.Type.u8,
}
LEVEL_CONTAINERS: dict[str, Any] = {
    "fp8": ov.Type.f8e4m3,
    "mxfp4": ov.Type.f4e2m1,
    "nvfp4": ov.Type.f4e2m1,
    "nf4": ov.Type.nf4,
}
FLOATS: dict[torch.dtype, Any] = {torch.float32: ov.Type.f32, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}


def container_bits(spec: QuantSpec) -> int:
    """Return the width of the integers that hold the codes: 4 or 8."""
    return 4 if spec.bits <= 4 else 8


def weight_bytes(shape: tuple[int, ...], spec: QuantSpec, dtype_bytes: int) -> int:
    """Return the bytes of codes, scales and zero points of a weight [O, I...]."""
    rows, columns = shape[0], math.prod(shape[1:])
    bits = container_bits(spec)
    groups = rows * (columns // spec.group_size if spec.group_size else 1)
    zero_points = 0 if spec.symmetric else math.ceil(groups * bits / 8)
    return math.ceil(rows * columns * bits / 8) + groups * dtype_bytes + zero_points


class WeightConstants:
    """The constants of one quantized parameter, made once however many layers use it."""

    def __init__(self, name: str, quantized: Quantized, dtype: torch.dtype) -> None:
        bits = container_bits(quantized.spec)
        groups, group_size = quantized.num_groups, quantized.group_size
        rows = quantized.codes.shape[0]
        self._quantized = quantized
        grouped = quantized.spec.group_size is not None
        rest = (1,) * (len(quantized.shape) - 1)
        codes_shape = (rows, groups, group_size) if grouped else self._row_shape()
        scale_shape = (rows, groups, 1) if grouped else (rows, *rest)
        symmetric = quantized.zero_point is None
        shift = 0 if symmetric else 2 ** (bits - 1)
        container = CONTAINERS[bits, symmetric]
        if quantized.spec.format != "int":
            self._codes = _levels(quantized, codes_shape, name)
        else:
            codes = (quantized.codes.to(torch.int16) + shift).reshape(codes_shape)
            self._codes = _integers(codes, container, name)
        scale = quantized.scale.reshape(scale_shape).float().numpy()
        self._scale = ops.constant(scale, dtype=FLOATS[dtype], name=f"{name}/scale")
        self._zero_point = None
        if quantized.zero_point is not None:
            zero_point = (quantized.zero_point.to(torch.int16) + shift).reshape(scale_shape)
            self._zero_point = _integers(zero_point, container, f"{name}/zero_point")

    def _row_shape(self) -> tuple[int, ...]:
        """Return the parameter's shape with the output channels in front."""
        shape = self._quantized.shape
        return (shape[1], shape[0]) if self._quantized.transposed else shape

    def values(self) -> Any:
        """Return a new node that computes the weight [O, I...] in float32."""
        node = ops.convert(self._codes, ov.Type.f32)
        if self._zero_point is not None:
            node = ops.subtract(node, ops.convert(self._zero_point, ov.Type.f32))
        node = ops.multiply(node, as_float32(self._scale))
        if self._quantized.spec.group_size is not None:
            node = ops.reshape(node, np.array(self._row_shape(), dtype=np.int64), special_zero=False)
        return node


def _integers(values: torch.Tensor, container: Any, name: str) -> Any:
    array = np.ascontiguousarray(values.to(torch.int16).numpy())
    if container in (ov.Type.i8, ov.Type.u8):
        dtype = np.int8 if container == ov.Type.i8 else np.uint8
        return ops.constant(array.astype(dtype), dtype=container, name=name)
    return _bytes(_pairs((array & 0xF).astype(np.uint8)), array.shape, container, name)


def _levels(quantized: Quantized, shape: tuple[int, ...], name: str) -> Any:
    """Return the constant of codes that are no integers: E4M3's and E2M1's bit patterns, or NF4's places from 0 on."""
    codes, spec = quantized.codes.numpy(), quantized.spec
    if spec.format == "nf4":
        values = (codes.astype(np.int16) - spec.low).astype(np.uint8)
    else:
        values = np.abs(codes).astype(np.uint8) | ((codes < 0).astype(np.uint8) << np.uint8(spec.bits - 1))
    return _bytes(values.reshape(-1) if spec.bits == 8 else _pairs(values), shape, LEVEL_CONTAINERS[spec.format], name)


def _pairs(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return values below 16 two a byte, the first in the low half."""
    flat = nibbles.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << np.uint8(4))


def _bytes(packed: NDArray[np.uint8], shape: tuple[int, ...], container: Any, name: str) -> Any:
    """Return a constant whose values are these bytes."""
    constant = ov.op.Constant(ov.Tensor(packed, list(shape), container), shared_memory=False)
    constant.set_friendly_name(name)
    return constant


def as_float32(constant: Any) -> Any:
    """Return the node itself, or its conversion when it is stored in 16 bits."""
    return constant if constant.get_element_type() == ov.Type.f32 else ops.convert(constant, ov.Type.f32)


def cast_constant(constant: Any, dtype: torch.dtype) -> Any:
    """Return a node that computes a float constant's values from a copy stored as `dtype`, under the same name."""
    stored = ops.constant(constant.get_data(), dtype=FLOATS[dtype], name=constant.get_friendly_name())
    return as_float32(stored)


def replace_weight(constant: Any, weights: WeightConstants, transposed: bool) -> list[Any]:
    """Put codes where a float constant was; return the layers (MatMul, Convolution, Gather) that consume it.

    A Transpose between weight and MatMul is absorbed into the MatMul, so that the codes lie [O, I] as kernels want.
    """
    layers = []
    for target in list(constant.output(0).get_target_inputs()):
        node = target.get_node()
        if node.get_type_name() == "Transpose" and _is_swap(node):
            if transposed:  # stored [I, O] and turned by the graph: our rows already are [O, I]
                node.output(0).replace(weights.values().output(0))
                layers += [use.get_node() for use in node.output(0).get_target_inputs()]
                continue
            for use in list(node.output(0).get_target_inputs()):
                layers.append(_feed(use, weights, node))
        elif transposed:
            layers.append(_feed(target, weights, None))
        else:
            target.replace_source_output(weights.values().output(0))
            layers.append(node)
    return layers


def _feed(use: Any, weights: WeightConstants, swap: Any) -> Any:
    """Give a consumer of a turned weight the rows [O, I]: by turning its MatMul, or by a Transpose."""
    node = use.get_node()
    if node.get_type_name() == "MatMul" and use.get_index() == 1:
        settings = node.get_attributes()
        turned = ops.matmul(node.input_value(0), weights.values(), settings["transpose_a"], not settings["transpose_b"])
        turned.set_friendly_name(node.get_friendly_name())
        for output_use in list(node.output(0).get_target_inputs()):
            output_use.replace_source_output(turned.output(0))
        return turned
    use.replace_source_output(ops.transpose(weights.values(), np.array([1, 0], dtype=np.int64)).output(0))
    return node


def _is_swap(node: Any) -> bool:
    order = node.input_value(1).get_node()
    return order.get_type_name() == "Constant" and list(order.get_data()) == [1, 0]


def round_input(layer: Any, activation: ActivationSpec, made: dict[tuple[Any, ...], Any]) -> None:
    """Put a static grid before a layer's first input; layers that share input and grid share the node (`made`)."""
    scale, zero_point = activation.static_grid()
    low, high = (-128, 127) if activation.symmetric else (0, 255)
    bounds = (np.float32((low - zero_point) * scale), np.float32((high - zero_point) * scale))
    source = layer.input_value(0)
    key = (source.get_node().get_friendly_name(), source.get_index(), *bounds)
    if key not in made:
        made[key] = ops.fake_quantize(source, *(ops.constant(bound) for bound in (*bounds, *bounds)), levels=256)
    layer.input(0).replace_source_output(made[key].output(0))
