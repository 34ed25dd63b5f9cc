"""Integer convolutions against the simulation in torch: which operators appear, and that 8 bits are exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.onnxruntime import OnnxRuntime
from gossamer.tasks import get_task

TASK = get_task("image-classification")


class Branch(nn.Module):
    """Two convolutions, the second reading the first through a batch norm and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(image)))
        return torch.relu(self.second(hidden))


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("low", "writers"), [(0.0, 1), (-1.0, 0)], ids=["zero point 0", "zero point above 0"])
def test_a_convolution_writes_codes_where_only_a_rounding_reads_it(
    bits: int, low: float, writers: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Branch().eval()
    with torch.no_grad():
        network.norm.running_mean.normal_()
        network.norm.running_var.uniform_(0.5, 2.0)
        network.norm.bias.normal_()
    source = Source.open(network, forward=lambda module, inputs: module(inputs["image"]), name="branch")
    candidate = Candidate(source=source, module=source.module(TASK))
    spec = QuantSpec(bits=bits)
    for name in ("first", "second"):
        shape = tuple(candidate.module.get_parameter(f"{name}.weight").shape)
        codes = torch.randint(spec.low, spec.high + 1, (8, shape[1] * 9), dtype=torch.int8)  # full range: saturates
        scale = torch.rand(8, 1) * 0.002 + 0.001
        candidate.set_quantized(f"{name}.weight", Quantized(codes, scale, None, spec, shape))
    candidate.activations["first"] = ActivationSpec(kind="static", low=-3.0, high=3.0)
    candidate.activations["second"] = ActivationSpec(kind="static", low=low, high=4.0)
    image = np.random.default_rng(0).uniform(-3, 3, (2, 3, 8, 8)).astype(np.float32)
    request = ExportRequest(TASK, {"image": image[:1]}, {"image": {0: "batch"}}, ("logits",), tmp_path / "cache")
    (tmp_path / "out").mkdir()
    OnnxRuntime().write(candidate, tmp_path / "out", request)
    found = OnnxRuntime().open(tmp_path / "out", threads=1).run({"image": image})["logits"]
    with torch.no_grad(), candidate.simulated() as module:
        wanted = module(torch.from_numpy(image)).numpy()
    # a value in the middle between two codes may fall to either side: one step of 1/255 times one weight
    assert np.abs(found - wanted).max() <= 5e-3 * np.abs(wanted).max()
    operators = [node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph]
    assert operators.count("QLinearConv") == writers
    assert operators.count("ConvInteger") == 2 - writers
    assert "BatchNormalization" not in operators
    stored = {tensor.name for tensor in OnnxRuntime().stored_tensors(tmp_path / "out")}
    assert {"norm.weight", "norm.bias", "first.bias", "first.weight", "second.weight"} <= stored
