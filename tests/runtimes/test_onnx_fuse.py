"""The attention that is recognised, the look-alikes that are left alone, and what both compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gossamer.runtimes.onnx_fuse import fuse_attention, keep_layer_norms_apart
from gossamer.runtimes.onnx_rewrite import tidy

EAGER = """
<ir_version: 10, opset_import: ["": 21]>
attend (float[B,S,8] q, float[B,S,8] k, float[B,S,8] v, float[B,1,S,S] mask, float[8] one) => (float[B,S,8] out)
<int64[4] cut = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, float factor = {0.4}, float[8] unit = {1,1,1,1,1,1,1,1}> {
    q1 = Reshape(q, cut)
    q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
    k1 = Reshape(k, cut)
    k2 = Transpose<perm = [0, 2, 3, 1]>(k1)
    v1 = Reshape(v, cut)
    v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
    product = MatMul(q2, k2)
    scaled = Mul(product, factor)
    masked = Add(scaled, mask)
    shares = Softmax<axis = -1>(masked)
    mixed = MatMul(shares, v2)
    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
    joined = Reshape(turned, join)
    residual = Add(joined, q)
    out = LayerNormalization<axis = -1>(residual, unit, one)
}
"""
SHAPES = {
    "q1": "B S 2 4", "k1": "B S 2 4", "v1": "B S 2 4", "q2": "B 2 S 4", "k2": "B 2 4 S", "v2": "B 2 S 4",
    "product": "B 2 S S", "scaled": "B 2 S S", "masked": "B 2 S S", "shares": "B 2 S S", "mixed": "B 2 S 4",
    "turned": "B S 2 4", "joined": "B S 8",
}  # fmt: skip


def graph(text: str = EAGER) -> ir.Model:
    model: ir.Model = ir.from_onnx_text(text)
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.FLOAT
            if value.name in SHAPES:
                value.shape = ir.Shape([int(dim) if dim.isdigit() else dim for dim in SHAPES[value.name].split()])
    for value in model.graph.initializers.values():
        assert value.const_value is not None
    return model


def run(model: ir.Model, batch: int, tokens: int) -> Any:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    inputs = {name: rng.normal(size=(batch, tokens, 8)).astype(np.float32) for name in "qkv"}
    mask = np.zeros((batch, 1, tokens, tokens), np.float32)
    mask[-1, :, :, (tokens + 1) // 2 :] = np.finfo(np.float32).min  # padding of the last row
    return session.run(None, {**inputs, "mask": mask, "one": rng.normal(size=8).astype(np.float32)})[0]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 6), (3, 6)])
def test_the_operator_computes_what_the_parts_computed(batch: int, tokens: int) -> None:
    model = graph()
    before = run(model, batch, tokens)
    assert fuse_attention(model) == 1
    keep_layer_norms_apart(model.graph)
    tidy(model)
    assert [node.op_type for node in model.graph] == ["Attention", "Sum", "LayerNormalization"]
    np.testing.assert_allclose(run(model, batch, tokens), before, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Softmax<axis = -1>", "Softmax<axis = 1>"),
        ("v2 = Transpose<perm = [0, 2, 1, 3]>", "v2 = Transpose<perm = [0, 1, 2, 3]>"),
        ("turned = Transpose<perm = [0, 2, 1, 3]>", "turned = Transpose<perm = [0, 1, 2, 3]>"),
        ("Mul(product, factor)", "Mul(product, mask)"),
        ("Mul(product, factor)", "Sub(product, factor)"),
        ("Add(scaled, mask)", "Add(scaled, scaled)"),
        ("float[B,1,S,S] mask", "float[B,1,1,S] mask"),
        ("float[B,1,S,S] mask", "float[S,S] mask"),
        (
            "residual = Add(joined, q)",
            "extra = ReduceSum(shares)\n    sum = Add(joined, extra)\n    residual = Add(sum, q)",
        ),
    ],
)
def test_what_differs_is_left_alone(old: str, new: str) -> None:
    assert old in EAGER
    model = graph(EAGER.replace(old, new))
    before = [node.op_type for node in model.graph]
    assert fuse_attention(model) == 0
    assert [node.op_type for node in model.graph] == before
