"""Codes that are no integers in ONNX files: what is computed, by which operators, and how many bytes they take."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

from gossamer.errors import ArtifactError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.onnx_storage import level_layout
from gossamer.runtimes.onnxruntime import OnnxRuntime
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

FP8, MXFP4 = QuantSpec(bits=8, format="fp8"), QuantSpec(bits=4, format="mxfp4", group_size=32)
NVFP4, NF4 = QuantSpec(bits=4, format="nvfp4", group_size=16), QuantSpec(bits=4, format="nf4", group_size=32)
NF4_ROWS = QuantSpec(bits=4, format="nf4")
TASK = get_task("text-classification")
IDS = np.random.default_rng(1).integers(1, 80, (2, 7))
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def bert(graphs: Path) -> tuple[Candidate, ExportRequest]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    module = BertForSequenceClassification(config).eval()
    axes = {name: {0: "batch", 1: "tokens"} for name in TEXT}
    request = ExportRequest(task=TASK, example=TEXT, axes=axes, outputs=("logits",), cache=graphs)
    source = Source.open(module, name="bert")
    return Candidate(source=source, module=source.module(TASK)), request


def quantize(candidate: Candidate, spec: QuantSpec, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    for name, module in candidate.module.named_modules():
        if isinstance(module, kinds) and name != "classifier":
            weight = module.get_parameter("weight").detach()
            candidate.set_quantized(f"{name}.weight", quantize_weight(weight, spec, scale="mse", name=name))


def check(candidate: Candidate, request: ExportRequest, folder: Path) -> Counter[str]:
    """Assert that outputs and bytes are as decided; return how often each operator is there."""
    runtime = OnnxRuntime()
    runtime.write(candidate, folder, request)
    found = runtime.open(folder, threads=1).run(request.example)["logits"]
    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in request.example.items()}
        wanted = candidate.source.forward(candidate.module, inputs).numpy()
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    stored = {tensor.name: tensor for tensor in runtime.stored_tensors(folder)}
    file = ir.load(folder / "model.onnx")
    held = {name: value.const_value for name, value in file.graph.initializers.items() if value.const_value}
    for name, codes in candidate.quantized.items():
        tensor, spec = stored[name], codes.spec
        assert (tensor.dtype, tensor.bits, tensor.group_size) == (spec.format, spec.bits, spec.group_size)
        assert tensor.bytes == sum(held[key].nbytes for key in held if key.startswith(f"{name}."))
        assert tensor.bytes == runtime.stored_bytes("linear", codes.shape, spec, 4)
        assert name not in held
    return Counter(node.op_type for node in file.graph)


@pytest.mark.parametrize("spec", [FP8, MXFP4, NVFP4, NF4, NF4_ROWS], ids=str)
def test_linear_layers(spec: QuantSpec, graphs: Path, tmp_path: Path) -> None:
    candidate, request = bert(graphs)
    quantize(candidate, spec)
    assert len(candidate.quantized) == 7
    operators = check(candidate, request, tmp_path)
    assert operators["MatMulBnb4"] == (7 if spec.format == "nf4" else 0)
    assert OnnxRuntime().refusal("q", (32, 32), spec, None) is None


@pytest.mark.parametrize("spec", [FP8, NF4], ids=str)
def test_embeddings_are_multiplied_out(spec: QuantSpec, graphs: Path, tmp_path: Path) -> None:
    candidate, request = bert(graphs)
    quantize(candidate, spec, (nn.Embedding,))
    assert check(candidate, request, tmp_path)["MatMulBnb4"] == 0


def test_convolutions_are_multiplied_out(graphs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    source = Source.open(ResNetForImageClassification(config).eval(), name="resnet")
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((1, 1, 16, 16)).astype(np.float32)}
    request = ExportRequest(TASK, pixels, {"pixel_values": {0: "batch"}}, ("logits",), graphs)
    candidate = Candidate(source=source, module=source.module(TASK))
    quantize(candidate, FP8, (nn.Conv2d,))
    assert len(candidate.quantized) == sum(isinstance(part, nn.Conv2d) for part in candidate.module.modules())
    check(candidate, request, tmp_path)


@pytest.mark.parametrize("block", [16, 64, 128])
def test_matmulbnb4_decodes_as_we_do(block: int) -> None:
    """The operator alone, on the identity: what comes out is the weight itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    codes = quantize_weight(weight, QuantSpec(bits=4, format="nf4", group_size=block))
    places = (codes.codes - codes.spec.low).to(torch.uint8).numpy().reshape(-1, 2)
    node = helper.make_node(
        "MatMulBnb4", ["a", "b", "absmax"], ["y"], domain="com.microsoft", K=128, N=24, block_size=block, quant_type=1
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [
            value("a", TensorProto.FLOAT, [128, 128]),
            value("b", TensorProto.UINT8, [24 * 64]),
            value("absmax", TensorProto.FLOAT, [24 * 128 // block]),
        ],
        [value("y", TensorProto.FLOAT, [128, 24])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    packed = places[:, 0] << np.uint8(4) | places[:, 1]
    absmax = codes.scale.float().numpy().reshape(-1)
    (found,) = session.run(None, {"a": np.eye(128, dtype=np.float32), "b": packed, "absmax": absmax})
    np.testing.assert_allclose(found.T, codes.dequantize().numpy(), atol=1e-6)


def test_rounded_inputs_are_refused(graphs: Path, tmp_path: Path) -> None:
    activation = ActivationSpec(kind="dynamic")
    assert "does not multiply by fp8" in str(OnnxRuntime().refusal("q", (32, 32), FP8, activation))
    candidate, request = bert(graphs)
    quantize(candidate, FP8)
    candidate.activations["bert.pooler.dense"] = activation
    with pytest.raises(ArtifactError, match="cannot compute"):
        OnnxRuntime().write(candidate, tmp_path, request)


def test_layouts() -> None:
    assert level_layout(576, QuantSpec(bits=4, format="nf4"), True).block == 64
    assert level_layout(576, QuantSpec(bits=4, format="nf4"), False).kind == "rows"
    assert level_layout(72, QuantSpec(bits=4, format="nf4", group_size=24), True).kind == "rows"
    assert level_layout(64, FP8, True).bits == 8
