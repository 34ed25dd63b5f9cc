"""Integer convolutions: what follows one (bias, batch norm, ReLU, the next rounding) is taken into it.

With input codes a on scale s_a, weight codes w on scales s_w and, behind the convolution, a bias b and a batch norm in
eval mode, factor f = gamma / sqrt(var + eps) and shift beta - f * mean, for each output channel c:

    y_c = f_c * (s_a * s_w_c * sum (a - z_a) w + b_c) + beta_c - f_c * mean_c  =  m_c * sum + shift_c

- All that reads y (through a ReLU at most) rounds it to one static grid: QLinearConv writes those codes. Its bias is
  round(shift / m) as int32, an error of at most m / 2, where m is a small part of an output step. A ReLU costs nothing:
  a grid whose zero point is 0 cuts at zero itself; in front of any other grid the ReLU stays, in float.
- Otherwise ConvInteger, one Mul and one Add in float32 (a residual sum reads y: no grid was decided for it).

m and shift are computed from the stored parameters when the file is opened, so that every parameter stays in the file
under its own name. Weights are given to ConvInteger as uint8 around 128, which measured four times faster than int8
(2.4 ms against 10.1, 64 channels at 56 x 56); QLinearConv gets int8 where 7 bits suffice, since that is faster there
(1.5 ms against 2.8) and exact. Jacob et al., 2018, section 2.2; left out: a grid for the sums of residual branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.runtimes.onnx_rewrite import Rewriter

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Convolution:
    """Hold a float Conv, the codes of its input, and its weight codes [O, I, ...]; `wide`: must be shifted to uint8."""

    node: ir.Node
    name: str
    codes: ir.Value
    scale: ir.Value
    zero: ir.Value
    kernel: ir.Value
    rank: int
    wide: bool


def lower_convolution(rewriter: Rewriter, convolution: Convolution) -> None:
    """Replace a Conv, and the batch norm that alone reads it, by an integer convolution."""
    norm = _norm_behind(convolution.node)
    last = norm if norm is not None else convolution.node
    rounding = _rounding_behind(last.outputs[0]) if convolution.scale.const_value is not None else None
    if rounding is not None:
        _write_codes(rewriter, convolution, norm, rounding)
    else:
        _write_floats(rewriter, convolution, norm)


def _write_codes(rewriter: Rewriter, convolution: Convolution, norm: ir.Node | None, rounding: ir.Node) -> None:
    name = convolution.name
    scale_O = _weight_scale(rewriter, convolution, norm)
    kernel, zero = convolution.kernel, rewriter.scalar(np.int8(0))
    if convolution.wide:
        kernel, zero = rewriter.unsigned(kernel), rewriter.scalar(np.uint8(128))
    operands = [convolution.codes, convolution.scale, convolution.zero, kernel, scale_O, zero, *rounding.inputs[1:]]
    shift_O = _shift(rewriter, convolution, norm)
    if shift_O is not None:
        unit_O = rewriter.once("Mul", [scale_O, convolution.scale], f"{name}.unit")
        steps_O = rewriter.once("Div", [shift_O, unit_O], f"{name}.shift.steps")
        rounded_O = rewriter.once("Round", [steps_O], f"{name}.shift.rounded")
        operands.append(rewriter.once("Cast", [rounded_O], f"{name}.shift.codes", to=6))
    codes = rewriter.before(convolution.node, "QLinearConv", operands, **_settings(convolution.node))
    between = _between(convolution.node, rounding)
    rewriter.replace(rounding, codes)
    for unread in between:
        rewriter.graph.remove(unread, safe=True)


def _write_floats(rewriter: Rewriter, convolution: Convolution, norm: ir.Node | None) -> None:
    node, name = convolution.node, convolution.name
    column = rewriter.ints([1, -1] + [1] * (convolution.rank - 2))
    sums = rewriter.before(
        node, "ConvInteger",
        [convolution.codes, rewriter.unsigned(convolution.kernel), convolution.zero, rewriter.scalar(np.uint8(128))],
        **_settings(node),
    )  # fmt: skip
    scale_O = _weight_scale(rewriter, convolution, norm)
    scale = rewriter.once("Reshape", [scale_O, column], f"{name}.scale.channel")
    unit = (
        rewriter.once("Mul", [scale, convolution.scale], f"{name}.unit.channel")
        if convolution.scale.const_value is not None
        else rewriter.before(node, "Mul", [scale, convolution.scale])
    )
    result = rewriter.before(node, "Mul", [rewriter.before(node, "Cast", [sums], to=1), unit])
    shift_O = _shift(rewriter, convolution, norm)
    if shift_O is not None:
        shift = rewriter.once("Reshape", [shift_O, column], f"{name}.shift.channel")
        result = rewriter.before(node, "Add", [result, shift])
    last = norm if norm is not None else node
    rewriter.replace(last, result)
    if last is not node:
        rewriter.graph.remove(node, safe=True)


def _norm_behind(node: ir.Node) -> ir.Node | None:
    """Return the batch norm on stored parameters that alone reads a convolution."""
    reader = _only_reader(node.outputs[0])
    if reader is None or reader.op_type != "BatchNormalization" or len(reader.outputs) != 1:
        return None
    training = reader.attributes["training_mode"].as_int() if "training_mode" in reader.attributes else 0
    stored = all(value is not None and value.const_value is not None for value in reader.inputs[1:])
    return reader if stored and not training and reader.inputs[0] is node.outputs[0] else None


def _rounding_behind(value: ir.Value) -> ir.Node | None:
    """Return the rounding to a static grid that alone reads a value, through a ReLU that the grid makes needless."""
    reader = _only_reader(value)
    rectified = reader is not None and reader.op_type == "Relu"
    if rectified and reader is not None:
        reader = _only_reader(reader.outputs[0])
    if reader is None or reader.op_type != "QuantizeLinear" or len(reader.inputs) != 3:
        return None
    scale, zero = (value.const_value if value is not None else None for value in reader.inputs[1:])
    if scale is None or zero is None or scale.size != 1:
        return None
    return None if rectified and int(zero.numpy()) != 0 else reader


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _between(first: ir.Node, last: ir.Node) -> list[ir.Node]:
    """Return the nodes from the one in front of `last` back to `first`, each the only reader of the next."""
    nodes: list[ir.Node] = []
    while not nodes or nodes[-1] is not first:
        value = (nodes[-1] if nodes else last).inputs[0]
        maker = value.producer() if value is not None else None
        assert maker is not None
        nodes.append(maker)
    return nodes


def _factor(rewriter: Rewriter, name: str, norm: ir.Node) -> ir.Value:
    """Return gamma / sqrt(var + eps) [O] of a batch norm, folded when the file is opened."""
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    spread = rewriter.once("Add", [norm.inputs[4], rewriter.scalar(np.float32(epsilon))], f"{name}.norm.variance")
    deviation = rewriter.once("Sqrt", [spread], f"{name}.norm.deviation")
    return rewriter.once("Div", [norm.inputs[1], deviation], f"{name}.norm.factor")


def _weight_scale(rewriter: Rewriter, convolution: Convolution, norm: ir.Node | None) -> ir.Value:
    """Return the scales [O] of the weights, times the factor of the norm."""
    name = convolution.name
    scale = rewriter.once("Reshape", [rewriter.held(f"{name}.scale"), rewriter.ints([-1])], f"{name}.scale.row")
    if norm is None:
        return scale
    return rewriter.once("Mul", [scale, _factor(rewriter, name, norm)], f"{name}.scale.normed")


def _shift(rewriter: Rewriter, convolution: Convolution, norm: ir.Node | None) -> ir.Value | None:
    """Return what is added to each channel [O]: the bias, or the norm's shift with the bias in it; None for nothing."""
    name = convolution.name
    bias = convolution.node.inputs[2] if len(convolution.node.inputs) > 2 else None
    if norm is None:
        return bias
    mean = norm.inputs[3]
    centre = rewriter.once("Sub", [bias, mean], f"{name}.norm.centre") if bias is not None else None
    moved = rewriter.once("Mul", [centre or mean, _factor(rewriter, name, norm)], f"{name}.norm.moved")
    return rewriter.once("Add" if bias is not None else "Sub", [norm.inputs[2], moved], f"{name}.norm.shift")


def _settings(node: ir.Node) -> dict[str, Any]:
    """Return a convolution's strides, pads and so on, for the integer convolution that takes its place."""
    return {name: attribute.value for name, attribute in node.attributes.items()}
