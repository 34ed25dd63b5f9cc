"""The few moves with which an ONNX graph is rewritten: find the uses of a weight, add a node, replace a node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
UseKind = Literal["matmul", "gather", "conv", "other"]


class Rewriter:
    """Add nodes to a graph. Nodes that depend on stored tensors alone are kept apart and put in front at the end."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._front: list[ir.Node] = []
        self._made: dict[str, ir.Value] = {}

    def held(self, name: str) -> ir.Value:
        """Return an initializer."""
        return self.graph.initializers[name]

    def once(self, op: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Return the value `name`, computed from stored tensors by one node in front of the graph; made once."""
        import onnx_ir as ir

        if name not in self._made:
            made = ir.node(op, inputs, attributes=attributes or None, outputs=[ir.Value(name=name)])
            self._front.append(made)
            self._made[name] = made.outputs[0]
        return self._made[name]

    def unsigned(self, codes: ir.Value) -> ir.Value:
        """Return stored int8 codes plus 128 as uint8, shifted when the file is opened."""
        wider = self.once("Cast", [codes], f"{codes.name}.wider", to=6)
        shifted = self.once("Add", [wider, self.scalar(np.int32(128))], f"{codes.name}.shifted")
        return self.once("Cast", [shifted], f"{codes.name}.unsigned", to=2)

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """Return a constant shape."""
        label = "x".join(map(str, numbers)).replace("-", "m")
        return self.constant(f"shape.{label}", np.array(numbers, np.int64))

    def scalar(self, number: Any) -> ir.Value:
        """Return a constant numpy scalar, in its own type."""
        return self.constant(f"scalar.{number.dtype}.{number!s}", np.array(number))

    def constant(self, name: str, array: Any) -> ir.Value:
        """Return a constant array under a name."""
        import onnx_ir as ir

        if name not in self._made:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
            self.graph.initializers[name] = value
            self._made[name] = value
        return self._made[name]

    def before(
        self, node: ir.Node, op: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Insert a node before another and return its output."""
        import onnx_ir as ir

        made = ir.node(op, inputs, attributes=attributes or None, domain=domain)
        self.graph.insert_before(node, made)
        return made.outputs[0]

    def behind(
        self, value: ir.Value, op: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **attributes: Any
    ) -> ir.Value:
        """Insert a node right behind the maker of `value` (in front, for an input of the graph); return its output."""
        import onnx_ir as ir

        made = ir.node(op, inputs, attributes=attributes or None, num_outputs=outputs)
        maker = value.producer()
        if maker is None or maker in self._front:
            self._front.append(made)
        else:
            self.graph.insert_after(maker, made)
        return made.outputs[0]

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` take the place of a node's only output, its name and shape included, and remove the node."""
        old = node.outputs[0]
        name = old.name
        value.shape, value.type = old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name = f"{name}.replaced"
        value.name = name
        self.graph.remove(node, safe=True)

    def drop(self, name: str) -> None:
        """Remove a stored tensor together with the turns of it that nothing reads any more."""
        value = self.graph.initializers[name]
        for node, _ in list(value.uses()):
            assert not node.outputs[0].uses(), f"{name} is still read through {node.op_type}"
            self.graph.remove(node, safe=True)
        del self.graph.initializers[name]

    def finish(self) -> None:
        """Put the collected nodes in front of the graph, each behind what it reads."""
        if self._front and len(self.graph):
            self.graph.insert_before(self.graph[0], self._front)
            self.graph.sort()
        self._front = []


def uses_of(weight: ir.Value, transposed: bool) -> Iterator[tuple[UseKind, ir.Node, ir.Value | None]]:
    """Yield (kind, node, bias) for each node that computes with a weight, looking through its Transpose.

    `transposed` says that the parameter is stored [in, out]: then a MatMul takes it as it is. Consumers of a bias that
    is added right behind a MatMul are not touched; the bias of a Gemm is given back, its other settings must be plain.
    """
    for node, index in list(weight.uses()):
        if node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == (1, 0):
            for inner, position in list(node.outputs[0].uses()):
                fits = inner.op_type == "MatMul" and position == 1 and not transposed
                yield ("matmul", inner, None) if fits else ("other", node, None)
        elif node.op_type == "MatMul" and index == 1 and transposed:
            yield "matmul", node, None
        elif node.op_type == "Gemm" and index == 1 and _is_plain(node, 0 if transposed else 1):
            yield "matmul", node, node.inputs[2] if len(node.inputs) > 2 else None
        elif node.op_type == "Gather" and index == 0 and _int(node, "axis", 0) == 0 and not transposed:
            yield "gather", node, None
        elif node.op_type == "Conv" and index == 1:
            yield "conv", node, None
        else:
            yield "other", node, None


def _is_plain(gemm: ir.Node, turned: int) -> bool:
    unit = all(gemm.attributes[key].as_float() == 1.0 for key in ("alpha", "beta") if key in gemm.attributes)
    return unit and _int(gemm, "transA", 0) == 0 and _int(gemm, "transB", 0) == turned


def _int(node: ir.Node, key: str, default: int) -> int:
    return node.attributes[key].as_int() if key in node.attributes else default


def added_bias(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add that alone follows a node and adds a stored vector, with that vector; None when there is none."""
    followers = list(node.outputs[0].uses())
    if len(followers) != 1 or node.outputs[0].is_graph_output() or followers[0][0].op_type != "Add":
        return None
    add, index = followers[0]
    other = add.inputs[1 - index]
    if other is None or other.const_value is None or other.shape is None or len(other.shape) != 1:
        return None
    return add, other


def tidy(model: ir.Model) -> None:
    """Drop nodes and stored tensors that nothing uses, and sort those by name: same content, same bytes."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)
    initializers = model.graph.initializers
    for name in sorted(initializers):
        initializers[name] = initializers.pop(name)
