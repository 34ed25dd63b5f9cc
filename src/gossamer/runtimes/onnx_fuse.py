"""Give ONNX Runtime larger operators where they measured faster, and keep it from a fusion that measured slower.

Attention, as eager code writes it (Vaswani et al., "Attention Is All You Need", 2017, section 3.2),

    q, k, v [B, S, H d] -> Reshape [B, S, H, d] -> Transpose [B, H, S, d]
    softmax(scale * q k^T + mask) v -> Transpose [B, S, H, d] -> Reshape [B, S, H d]

becomes one Attention operator (ONNX opset 23) that reads and writes [B, S, H d]. It is recognised by structure alone:
every operator, permutation, head count and size must be the expected one, every value between must have no other
reader, and the mask must have the shape [1 or B, 1 or H, S, T]; otherwise the graph stays as it is. One difference
remains: a query whose keys are all masked (a row of nothing but padding) gets zeros, where eager code averages the
padding. MultiHeadAttention, ONNX Runtime's own operator, measured slower than the parts. Left out: grouped
heads and rotary embeddings, whose keys reach the product through other operators.

Residual sums in front of a LayerNormalization become Sum: ONNX Runtime joins Add and LayerNormalization into
SkipLayerNormalization, whose CPU kernel is four to five times slower than the two (298 us against 59 us on [128, 384]).

Shape suffixes: B batch, S queries, T keys, H heads, d size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gossamer.runtimes.onnx_rewrite import Rewriter

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTION_OPSET = 23  # the first with an Attention operator
HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, d] <-> [B, H, S, d]
KEYS_TURNED = (0, 2, 3, 1)  # [B, T, H, d] -> [B, H, d, T]


@dataclass(frozen=True)
class _Heads:
    """What a projection is before it is cut into heads, and the heads it is cut into."""

    whole: ir.Value  # [B, S, H d]
    num_heads: int
    size: int


def fuse_attention(model: ir.Model) -> int:
    """Replace eager attention by the Attention operator in place; return how many were found.

    >>> fuse_attention(model)  # a six-layer encoder  # doctest: +SKIP
    6
    """
    rewriter = Rewriter(model.graph)
    found = [node for node in list(model.graph) if node.op_type == "Softmax" and _fuse(node, rewriter)]
    if found:
        model.opset_imports[""] = max(model.opset_imports[""], ATTENTION_OPSET)
    return len(found)


def keep_layer_norms_apart(graph: ir.Graph) -> None:
    """Write the sum of two computed tensors that a LayerNormalization reads as Sum instead of Add."""
    for node in list(graph):
        if node.op_type != "LayerNormalization" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if (
            add is not None
            and add.op_type == "Add"
            and all(v is not None and v.const_value is None for v in add.inputs)
        ):
            add.op_type = "Sum"


def _fuse(softmax: ir.Node, rewriter: Rewriter) -> bool:
    """Replace the attention around one Softmax; False, and nothing touched, where anything differs."""
    scores = softmax.inputs[0]
    if scores is None or scores.shape is None or len(scores.shape) != 4 or _axis(softmax) not in (-1, 3):
        return False
    product, mask, scale = _scores(scores)
    if product is None:
        return False
    queries = _heads(product.inputs[0], HEADS_FIRST)
    keys = _heads(product.inputs[1], KEYS_TURNED)
    mixed = _only_reader(softmax.outputs[0], "MatMul", 0)
    values = _heads(mixed.inputs[1], HEADS_FIRST) if mixed is not None else None
    if mixed is None or queries is None or keys is None or values is None:
        return False
    turned = _only_reader(mixed.outputs[0], "Transpose", 0)
    last = (
        _only_reader(turned.outputs[0], "Reshape", 0) if turned is not None and _perm(turned) == HEADS_FIRST else None
    )
    if last is None or not (queries.num_heads == keys.num_heads == values.num_heads and queries.size == keys.size):
        return False
    wanted = [*_dims(queries.whole)[:2], str(values.num_heads * values.size)]
    if _dims(last.outputs[0]) != wanted or _dims(keys.whole)[:2] != _dims(values.whole)[:2]:
        return False
    if mask is not None and not _mask_fits(mask, scores):
        return False
    joined = rewriter.before(
        last, "Attention", [queries.whole, keys.whole, values.whole, *([mask] if mask is not None else [])],
        q_num_heads=queries.num_heads, kv_num_heads=keys.num_heads, scale=scale,
    )  # fmt: skip
    rewriter.replace(last, joined)
    return True


def _scores(scores: ir.Value) -> tuple[ir.Node | None, ir.Value | None, float]:
    """Return (the product of queries and keys, mask or None, scale) of what a Softmax reads."""
    node, mask, scale = _only_maker(scores), None, 1.0
    if node is not None and node.op_type == "Add":
        sides = [side for side in node.inputs if side is not None]
        scaled = [side for side in sides if (made := side.producer()) and made.op_type in ("Mul", "Div", "MatMul")]
        if len(sides) != 2 or len(scaled) != 1:
            return None, None, scale
        mask = sides[1] if scaled[0] is sides[0] else sides[0]
        node = _only_maker(scaled[0])
    if node is not None and node.op_type in ("Mul", "Div"):
        factor = node.inputs[1].const_value if node.inputs[1] is not None else None
        if factor is None or factor.size != 1 or node.inputs[0] is None:
            return None, None, scale
        number = float(factor.numpy().reshape(()))
        scale = number if node.op_type == "Mul" else 1.0 / number
        node = _only_maker(node.inputs[0])
    return (node if node is not None and node.op_type == "MatMul" else None), mask, scale


def _heads(value: ir.Value | None, perm: tuple[int, ...]) -> _Heads | None:
    """Return what `value` is the Transpose of a Reshape of, when both only cut a projection into heads."""
    turn = _only_maker(value)
    if turn is None or turn.op_type != "Transpose" or _perm(turn) != perm:
        return None
    cut = _only_maker(turn.inputs[0])
    if cut is None or cut.op_type != "Reshape" or cut.inputs[0] is None:
        return None
    before, after = _dims(cut.inputs[0]), _dims(cut.outputs[0])
    if len(before) != 3 or len(after) != 4 or before[:2] != after[:2]:
        return None
    num_heads, size = after[2:]
    if not (num_heads.isdigit() and size.isdigit() and before[2] == str(int(num_heads) * int(size))):
        return None
    return _Heads(cut.inputs[0], int(num_heads), int(size))


def _mask_fits(mask: ir.Value, scores: ir.Value) -> bool:
    dims, wanted = _dims(mask), _dims(scores)
    return (
        len(dims) == 4
        and mask.dtype == scores.dtype
        and dims[2:] == wanted[2:]
        and all(dim in ("1", full) for dim, full in zip(dims[:2], wanted[:2], strict=True))
    )


def _only_maker(value: ir.Value | None) -> ir.Node | None:
    """Return the node that makes a value which one node alone reads."""
    if value is None or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    return value.producer()


def _only_reader(value: ir.Value, op: str, index: int) -> ir.Node | None:
    """Return the node that alone reads a value, when it is an `op` that takes it as input `index`."""
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1 or uses[0][0].op_type != op or uses[0][1] != index:
        return None
    return uses[0][0]


def _dims(value: ir.Value) -> list[str]:
    return [] if value.shape is None else [str(dim) for dim in value.shape]


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else ()


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else -1
