"""Store one parameter's codes in a graph, and rewrite every node that used its floats. Nothing is rounded here.

Every quantized parameter is found by following its initializer to the nodes that use it:

- MatMul and Gemm, weight only: com.microsoft MatMulNBits, computing in float32 (accuracy_level 1), so the output
  equals the in-memory model's. With dynamic int8 inputs and grids of at most 4 bits or several groups:
  accuracy_level 4, where the kernel rounds each block of the input to int8 on its own.
- MatMul and Gemm, int8 per channel with int8 inputs: QuantizeLinear (static) or DynamicQuantizeLinear (dynamic), once
  for all layers that read one tensor, then com.microsoft MatMulIntegerToFloat with the bias in it: the operators that
  ONNX Runtime's own fusions make of QDQ pairs and of MatMulInteger chains, without depending on those fusions.
  (Where one layer alone reads a tensor, ONNX Runtime joins the two into DynamicQuantizeMatMul.)
- Conv with int8 inputs: QLinearConv where all that reads its output rounds it to one static grid (the convolution then
  writes those codes itself), else ConvInteger, one multiplication and one addition in float32 (`onnx_convolution.py`).
- Gather (embeddings): GatherBlockQuantized on blocks; int8 per row gathers codes and scales and multiplies.
- experts: one QMoE or MoE for each block (`onnx_experts.py`).
- NF4 in MatMul and Gemm: com.microsoft MatMulBnb4, in float32.
- anything else (a weight-only Conv, groups that no block divides, FP8 and FP4): codes and scales are stored, and ONNX
  Runtime multiplies them out when it opens the file: small on disk, float32 in memory and in speed.

Signs: processors with AVX2 but no VNNI multiply uint8 inputs by int8 weights in pairs, add two products in 16 bits and
saturate beyond 7-bit weights (an error of 15 to 20 % of the output on random full-range codes). There, weights with
codes beyond +-64 are shifted to uint8 when the file is opened, codes and zero point by 128: the sums are the same, and
exact on every processor (15 to 20 % slower than 7 bits). With VNNI the sums are exact as they are, and the shift would
cost more than half of the speed (16.1 against 8.5 ms for MiniLM at 128 tokens): codes stay int8, and the file says
that it needs int8 dot products (NEEDS), which is checked when it is opened. Signed input grids are written as uint8
around 128: int8 times int8 is exact as well, but measured four times slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gossamer.errors import ArtifactError
from gossamer.measure.machine import adds_in_pairs
from gossamer.models.quantized import ActivationSpec, Quantized
from gossamer.runtimes.onnx_convolution import Convolution
from gossamer.runtimes.onnx_rewrite import CONTRIB, Rewriter, UseKind, added_bias, uses_of
from gossamer.runtimes.onnx_storage import (
    Layout,
    block_layout,
    level_layout,
    row_layout,
    store,
)

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_IN_PAIRS = 64  # two products of such codes with uint8 inputs fit 16 bits


class Parameters:
    """Rewrite the uses of one parameter after another; remembers inputs that were already rounded to a grid."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.graph = rewriter.graph
        self.rounded: dict[tuple[Any, ...], tuple[ir.Value, ir.Value, ir.Value]] = {}
        self.convolutions: list[Convolution] = []
        self.stored: list[str] = []  # parameters whose floats nothing will read
        self.needs_dot_products = False  # codes beyond 7 bits were left as they are

    def parameter(self, name: str, quantized: Quantized, activation: ActivationSpec | None) -> dict[str, Any]:
        """Store the codes of one parameter, rewrite every node that used its floats; return the ledger's entry."""
        weight = self.graph.initializers.get(name)
        if weight is None:
            raise ArtifactError(
                f"{name} was quantized, but the exported graph does not use it",
                "name it under `ignore`: a part that the task does not need holds no bytes in the file",
            )
        uses = list(uses_of(weight, quantized.transposed))
        if quantized.spec.format != "int":
            return self._levels(weight, name, quantized, uses, activation)
        blocks = block_layout(quantized.codes.shape[1], quantized.spec)
        integer = activation is not None and quantized.num_groups == 1 and quantized.spec.bits > 4
        kinds = {kind for kind, _, _ in uses}
        in_rows = (
            integer
            or "other" in kinds
            or "conv" in kinds
            or (kinds == {"gather"} and quantized.num_groups == 1 and quantized.spec.bits > 4)
        )
        layout = row_layout(quantized.spec) if in_rows or blocks is None else blocks
        if activation is not None and not integer and (layout.kind == "rows" or activation.kind != "dynamic"):
            raise ArtifactError(
                f"{name} is {quantized.spec} with {activation} inputs, which ONNX Runtime cannot compute",
                "use 5 to 8 bits per channel with rounded inputs, or leave the inputs in float",
            )
        entry = store(self.graph, name, quantized, layout)
        folded = False
        for kind, node, bias in uses:
            if kind == "matmul" and layout.kind == "blocks":
                self._matmul_blocks(node, name, quantized, layout, 4 if activation else 1, bias)
            elif kind == "matmul" and integer and activation is not None:
                self._matmul_integer(node, name, quantized, activation, bias)
            elif kind == "conv" and integer and activation is not None:
                self.convolutions.append(self._convolution(node, name, quantized, activation))
            elif kind == "gather" and layout.kind == "blocks":
                self._gather_blocks(node, name, quantized, layout)
            elif kind == "gather" and quantized.num_groups == 1 and layout.bits == 8:
                self._gather_rows(node, name, quantized)
            else:
                folded = True
        if folded:
            weight.replace_all_uses_with(self._multiply_out(name, quantized))
        self.stored.append(name)
        return entry

    def _levels(
        self,
        weight: ir.Value,
        name: str,
        quantized: Quantized,
        uses: Sequence[tuple[UseKind, ir.Node, ir.Value | None]],
        activation: ActivationSpec | None,
    ) -> dict[str, Any]:
        """Store codes that are no integers, and rewrite what used the floats; return the ledger's entry."""
        if activation is not None:
            raise ArtifactError(
                f"{name} is {quantized.spec} with {activation} inputs, which ONNX Runtime cannot compute",
                "use integers of 5 to 8 bits with rounded inputs, or leave the inputs in float",
            )
        multiplied = {kind for kind, _, _ in uses} == {"matmul"}
        layout = level_layout(quantized.codes.shape[1], quantized.spec, multiplied)
        entry = store(self.graph, name, quantized, layout)
        self.stored.append(name)
        if layout.kind == "rows":
            weight.replace_all_uses_with(self._multiply_out(name, quantized))
            return entry
        rows, inputs = quantized.codes.shape
        scales = self._block_grid(name, quantized, layout)[0]
        scales = self.rewriter.once("Reshape", [scales, self.rewriter.ints([-1])], f"{name}.scale.flat")
        for _, node, bias in uses:
            operands = [node.inputs[0], self.graph.initializers[f"{name}.codes"], scales]
            product = self.rewriter.before(
                node, "MatMulBnb4", operands, CONTRIB, K=inputs, N=rows, block_size=layout.block, quant_type=1
            )
            self.rewriter.replace(
                node, self.rewriter.before(node, "Add", [product, bias]) if bias is not None else product
            )
        return entry

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Store a float tensor as `dtype`; a Cast in front gives its users float32 again."""
        import onnx_ir as ir

        value = self.graph.initializers.pop(name)
        assert value.const_value is not None
        kind = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]
        array = value.const_value.numpy().astype(kind.numpy())
        small = ir.Value(
            name=name, const_value=ir.tensor(array, dtype=kind, name=name), shape=value.shape, type=ir.TensorType(kind)
        )
        value.name = f"{name}.replaced"
        self.graph.initializers[name] = small
        value.replace_all_uses_with(self.rewriter.once("Cast", [small], f"{name}.float32", to=ir.DataType.FLOAT.value))

    # -- one method for each way to compute with a stored parameter

    def _matmul_blocks(
        self, node: ir.Node, name: str, quantized: Quantized, layout: Layout, accuracy: int, bias: ir.Value | None
    ) -> None:
        rows, inputs = quantized.codes.shape
        operands = [
            node.inputs[0],
            self.graph.initializers[f"{name}.codes"],
            *self._block_grid(name, quantized, layout),
        ]
        product = self.rewriter.before(
            node, "MatMulNBits", operands, CONTRIB, K=inputs, N=rows, bits=layout.bits, block_size=layout.block,
            accuracy_level=accuracy,
        )  # fmt: skip
        self.rewriter.replace(node, self.rewriter.before(node, "Add", [product, bias]) if bias is not None else product)

    def _block_grid(self, name: str, quantized: Quantized, layout: Layout) -> list[ir.Value]:
        """Return scales [O, B] and, for an asymmetric grid, packed zero points, repeated to one a block."""
        rows, inputs = quantized.codes.shape
        blocks, groups = inputs // layout.block, quantized.num_groups
        scale = self.graph.initializers[f"{name}.scale"]
        if groups == 1 and blocks > 1:
            scale = self.rewriter.once("Expand", [scale, self.rewriter.ints([rows, blocks])], f"{name}.scale.blocks")
        elif blocks != groups:
            columns = self.rewriter.once(
                "Reshape", [scale, self.rewriter.ints([rows, groups, 1])], f"{name}.scale.column"
            )
            wide = self.rewriter.ints([rows, groups, blocks // groups])
            repeated = self.rewriter.once("Expand", [columns, wide], f"{name}.scale.repeated")
            scale = self.rewriter.once(
                "Reshape", [repeated, self.rewriter.ints([rows, blocks])], f"{name}.scale.blocks"
            )
        if quantized.zero_point is None:
            return [scale]
        zero = self.graph.initializers[f"{name}.zero_point"]
        num_bytes = math.ceil(blocks * layout.bits / 8)
        if groups == 1 and num_bytes > 1:
            zero = self.rewriter.once(
                "Expand", [zero, self.rewriter.ints([rows, num_bytes])], f"{name}.zero_point.blocks"
            )
        return [scale, zero]

    def _gather_blocks(self, node: ir.Node, name: str, quantized: Quantized, layout: Layout) -> None:
        rows, inputs = quantized.codes.shape
        flat = self.rewriter.ints([rows, inputs * layout.bits // 8])
        codes = self.rewriter.once("Reshape", [self.graph.initializers[f"{name}.codes"], flat], f"{name}.codes.flat")
        operands = [codes, node.inputs[1], *self._block_grid(name, quantized, layout)]
        rows_out = self.rewriter.before(
            node, "GatherBlockQuantized", operands, CONTRIB, bits=layout.bits, block_size=layout.block, gather_axis=0,
            quantize_axis=1,
        )  # fmt: skip
        self.rewriter.replace(node, rows_out)

    def _gather_rows(self, node: ir.Node, name: str, quantized: Quantized) -> None:
        indices, held = node.inputs[1], self.graph.initializers
        codes = self.rewriter.before(node, "Gather", [held[f"{name}.codes"], indices], axis=0)
        values = self.rewriter.before(node, "Cast", [codes], to=1)
        if quantized.zero_point is not None:
            zero = self.rewriter.before(node, "Gather", [held[f"{name}.zero_point"], indices], axis=0)
            values = self.rewriter.before(node, "Sub", [values, self.rewriter.before(node, "Cast", [zero], to=1)])
        scale = self.rewriter.before(node, "Gather", [held[f"{name}.scale"], indices], axis=0)
        self.rewriter.replace(node, self.rewriter.before(node, "Mul", [values, scale]))

    def _matmul_integer(
        self, node: ir.Node, name: str, quantized: Quantized, activation: ActivationSpec, bias: ir.Value | None
    ) -> None:
        assert node.inputs[0] is not None
        codes, scale, zero = self._rounded(node.inputs[0], activation)
        held = self.graph.initializers
        columns = self.rewriter.once("Transpose", [held[f"{name}.codes"]], f"{name}.codes.columns", perm=[1, 0])
        wide = self._shifted(quantized)
        if wide:
            columns = self.rewriter.unsigned(columns)
        per_row = self.rewriter.once("Reshape", [held[f"{name}.scale"], self.rewriter.ints([-1])], f"{name}.scale.row")
        weight_zero = None
        if quantized.zero_point is not None:
            flat = [held[f"{name}.zero_point"], self.rewriter.ints([-1])]
            weight_zero = self.rewriter.once("Reshape", flat, f"{name}.zero_point.row")
            weight_zero = self.rewriter.unsigned(weight_zero) if wide else weight_zero
        elif wide:
            weight_zero = self.rewriter.scalar(np.uint8(128))
        last = node
        if bias is None and (following := added_bias(node)) is not None:
            last, bias = following
        operands = [codes, columns, scale, per_row, zero, weight_zero, bias]
        product = self.rewriter.before(last, "MatMulIntegerToFloat", operands, CONTRIB)
        self.rewriter.replace(last, product)
        if last is not node:
            self.graph.remove(node, safe=True)

    def _convolution(self, node: ir.Node, name: str, quantized: Quantized, activation: ActivationSpec) -> Convolution:
        assert node.inputs[0] is not None
        if quantized.zero_point is not None:
            raise ArtifactError(
                f"{name} is {quantized.spec} with {activation} inputs; ONNX Runtime's integer convolution is symmetric",
                "use a symmetric weight grid for convolutions",
            )
        codes, scale, zero = self._rounded(node.inputs[0], activation)
        kernel = self.rewriter.once(
            "Reshape", [self.graph.initializers[f"{name}.codes"], self.rewriter.ints(quantized.shape)],
            f"{name}.codes.kernel",
        )  # fmt: skip
        return Convolution(node, name, codes, scale, zero, kernel, len(quantized.shape), self._shifted(quantized))

    def _multiply_out(self, name: str, quantized: Quantized) -> ir.Value:
        """Return the float weight in the parameter's own shape, computed from stored tensors alone (folded at load)."""
        rows, inputs = quantized.codes.shape
        groups, held = quantized.num_groups, self.graph.initializers
        values = self.rewriter.once(
            "Reshape",
            [self._decoded(name, quantized), self.rewriter.ints([rows, groups, inputs // groups])],
            f"{name}.grouped",
        )
        if quantized.zero_point is not None:
            zero = self.rewriter.once("Cast", [held[f"{name}.zero_point"]], f"{name}.zero_point.values", to=1)
            zero = self.rewriter.once(
                "Reshape", [zero, self.rewriter.ints([rows, groups, 1])], f"{name}.zero_point.column"
            )
            values = self.rewriter.once("Sub", [values, zero], f"{name}.centred")
        scale = self.rewriter.once(
            "Reshape", [held[f"{name}.scale"], self.rewriter.ints([rows, groups, 1])], f"{name}.scale.column"
        )
        values = self.rewriter.once("Mul", [values, scale], f"{name}.scaled")
        if not quantized.transposed:
            return self.rewriter.once("Reshape", [values, self.rewriter.ints(quantized.shape)], f"{name}.float")
        matrix = self.rewriter.once("Reshape", [values, self.rewriter.ints([rows, inputs])], f"{name}.matrix")
        return self.rewriter.once("Transpose", [matrix], f"{name}.float", perm=[1, 0])

    def _decoded(self, name: str, quantized: Quantized) -> ir.Value:
        """Return what the stored codes stand for in units of the scale, float32 [O, I]."""
        codes, form = self.graph.initializers[f"{name}.codes"], quantized.spec.number_format
        if form is None or quantized.spec.format == "fp8":
            return self.rewriter.once("Cast", [codes], f"{name}.values", to=1)
        levels = self.rewriter.constant(f"levels.{quantized.spec.format}", form.codebook.levels_K.numpy())
        places = self.rewriter.once("Cast", [codes], f"{name}.places", to=6)
        return self.rewriter.once("Gather", [levels, places], f"{name}.values", axis=0)

    # -- small parts

    def _shifted(self, quantized: Quantized) -> bool:
        """Return whether codes must be multiplied as uint8 here; notes what the file needs where they need not."""
        if not bool(quantized.codes.abs().max() > LARGEST_IN_PAIRS):
            return False
        if adds_in_pairs():
            return True
        self.needs_dot_products = True
        return False

    def _rounded(self, value: ir.Value, spec: ActivationSpec) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return codes, scale and zero point of an input; layers that read one tensor on one grid share them."""
        grid = spec.static_grid() if spec.kind == "static" else None
        key = (value, spec.symmetric, grid)
        if key not in self.rounded:
            self.rounded[key] = self._round(value, spec, grid)
        return self.rounded[key]

    def _round(
        self, value: ir.Value, spec: ActivationSpec, grid: tuple[float, int] | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        behind, scalar = self.rewriter.behind, self.rewriter.scalar
        if grid is not None:
            zero = scalar(np.uint8(grid[1] + 128 if spec.symmetric else grid[1]))
            scale = scalar(np.float32(grid[0]))
            return behind(value, "QuantizeLinear", [value, scale, zero]), scale, zero
        if not spec.symmetric:
            codes = behind(value, "DynamicQuantizeLinear", [value], outputs=3)
            maker = codes.producer()
            assert maker is not None
            return codes, maker.outputs[1], maker.outputs[2]
        size = behind(value, "Abs", [value])
        largest = behind(size, "ReduceMax", [size], keepdims=0)
        step = behind(largest, "Div", [largest, scalar(np.float32(127.0))])
        scale = behind(step, "Max", [step, scalar(np.finfo(np.float32).tiny)])
        zero = scalar(np.uint8(128))
        return behind(scale, "QuantizeLinear", [value, scale, zero]), scale, zero
