"""The exported graph: names, tied weights, the cache, and new values in an old structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import ArtifactError, ModelError
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.onnx_graph import base_graph, fill_values, structure_key
from gossamer.tasks import get_task


class Tied(nn.Module):
    """An embedding whose weight is the head's too, with a normalisation between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.norm(self.words(ids)))
        return hidden


def tied_source() -> tuple[nn.Module, Source]:
    torch.manual_seed(0)
    source = Source.open(Tied(), forward=lambda module, inputs: module(inputs["ids"]), name="tied")
    return source.module(get_task("text-classification")), source


def request_for(cache: Path, **changes: Any) -> ExportRequest:
    settings: dict[str, Any] = {
        "task": get_task("text-classification"), "example": {"ids": np.arange(5)[None]},
        "axes": {"ids": {0: "batch", 1: "tokens"}}, "outputs": ("logits",), "cache": cache,
    }  # fmt: skip
    return ExportRequest(**{**settings, **changes})


def run(model: ir.Model, ids: Any) -> Any:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids})[0]


def test_names_axes_and_one_tensor_for_tied_weights(tmp_path: Path) -> None:
    module, source = tied_source()
    model = base_graph(module, source, request_for(tmp_path))
    parameters = {"words.weight", "norm.weight", "norm.bias"}
    assert parameters <= set(model.graph.initializers)
    assert "head.weight" not in model.graph.initializers
    assert [value.name for value in model.graph.inputs] == ["ids"]
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["batch", "tokens"]
    consumers = {node.op_type for node, _ in model.graph.initializers["words.weight"].uses()}
    assert consumers == {"Gather", "Transpose"}


def test_other_values_in_the_cached_structure(tmp_path: Path) -> None:
    module, source = tied_source()
    request = request_for(tmp_path)
    base_graph(module, source, request)
    (entry,) = tmp_path.glob("*.onnx")
    before = entry.stat().st_mtime_ns
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    model = base_graph(module, source, request)
    assert entry.stat().st_mtime_ns == before
    ids = np.array([[3, 1, 4, 1], [5, 9, 2, 6], [0, 0, 19, 7]])
    with torch.no_grad():
        np.testing.assert_allclose(run(model, ids), module(torch.from_numpy(ids)).numpy(), atol=1e-5)


def test_the_cache_holds_no_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Linear(256, 256)
    source = Source.open(network, forward=lambda module, inputs: module(inputs["ids"]), name="wide")
    example = {"ids": np.zeros((1, 256), np.float32)}
    base_graph(network, source, request_for(tmp_path, example=example, axes={"ids": {0: "batch"}}))
    (entry,) = tmp_path.glob("*.onnx")
    assert entry.stat().st_size < 256 * 256  # a quarter of the float weights


def test_the_key_sees_structure_and_not_values(tmp_path: Path) -> None:
    module, source = tied_source()
    request = request_for(tmp_path)
    key = structure_key(module, source, request)
    with torch.no_grad():
        module.get_parameter("norm.bias").add_(1.0)
    assert structure_key(module, source, request) == key
    assert structure_key(module, source, request_for(tmp_path, axes={"ids": {0: "batch"}})) != key
    module.add_module("extra", nn.Linear(2, 2))
    assert structure_key(module, source, request) != key


def test_a_structure_that_does_not_fit_the_values_is_named(tmp_path: Path) -> None:
    module, source = tied_source()
    base_graph(module, source, request_for(tmp_path))
    model = ir.load(next(tmp_path.glob("*.onnx")))
    with pytest.raises(ArtifactError, match=r"norm\.weight as \(8,\), in the model it is \(9,\)"):
        fill_values(model, {"words.weight": torch.zeros(20, 8), "norm.weight": torch.zeros(9)})


def test_a_network_that_cannot_be_traced_is_our_error(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids * 2 if float(ids.sum()) > 3 else ids

    source = Source.open(Branching(), forward=lambda module, inputs: module(inputs["ids"]), name="branching")
    with pytest.raises(ModelError, match="cannot export branching"):
        base_graph(source.module(get_task("text-classification")), source, request_for(tmp_path))
    assert list(tmp_path.iterdir()) == []
