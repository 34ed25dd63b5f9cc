"""Codes that are no integers in OpenVINO's own types: the same answers, stored at their width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from gossamer.errors import ArtifactError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.openvino import MODEL_FILE, OpenVino
from gossamer.tasks import get_task
from gossamer.techniques.quantize.grid import quantize_weight

ov = pytest.importorskip("openvino")

SPECS = [
    QuantSpec(bits=8, format="fp8"),
    QuantSpec(bits=8, format="fp8", group_size=16),
    QuantSpec(bits=4, format="mxfp4", group_size=32),
    QuantSpec(bits=4, format="nvfp4", group_size=16),
    QuantSpec(bits=4, format="nf4", group_size=32),
    QuantSpec(bits=4, format="nf4"),
]
TYPES = {"fp8": "f8e4m3", "mxfp4": "f4e2m1", "nvfp4": "f4e2m1", "nf4": "nf4"}
IDS = np.random.default_rng(1).integers(1, 80, (2, 7))
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def written(spec: QuantSpec, folder: Path, cache: Path, kinds: tuple[type[nn.Module], ...]) -> Candidate:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96,
        initializer_range=0.2,
    )  # fmt: skip
    task = get_task("text-classification")
    source = Source.open(BertForSequenceClassification(config).eval(), name="bert")
    axes = {name: {0: "batch", 1: "tokens"} for name in TEXT}
    request = ExportRequest(task=task, example=TEXT, axes=axes, outputs=("logits",), cache=cache)
    candidate = Candidate(source=source, module=source.module(task))
    for name, module in candidate.module.named_modules():
        if isinstance(module, kinds) and name != "classifier":
            weight = module.get_parameter("weight").detach()
            candidate.set_quantized(f"{name}.weight", quantize_weight(weight, spec, scale="mse", name=name))
    OpenVino().write(candidate, folder, request)
    return candidate


def check(candidate: Candidate, folder: Path) -> None:
    found = OpenVino().open(folder, threads=1).run(TEXT)["logits"]
    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in TEXT.items()}
        wanted = candidate.source.forward(candidate.module, inputs).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    stored = {tensor.name: tensor for tensor in OpenVino().stored_tensors(folder)}
    model = ov.Core().read_model(folder / MODEL_FILE)
    constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
    for name, codes in candidate.quantized.items():
        tensor, spec = stored[name], codes.spec
        assert (tensor.dtype, tensor.bits, tensor.group_size) == (spec.format, spec.bits, spec.group_size)
        assert constants[name].get_element_type().get_type_name() == TYPES[spec.format]
        assert constants[name].get_byte_size() == codes.codes.numel() * spec.bits // 8
        assert tensor.bytes == OpenVino().stored_bytes("q", codes.shape, spec, 4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear_layers(spec: QuantSpec, tmp_path: Path, cache: Path) -> None:
    candidate = written(spec, tmp_path, cache, (nn.Linear,))
    assert len(candidate.quantized) == 7
    check(candidate, tmp_path)
    assert OpenVino().refusal("q", (32, 32), spec, None) is None


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]], ids=str)
def test_embeddings(spec: QuantSpec, tmp_path: Path, cache: Path) -> None:
    candidate = written(spec, tmp_path, cache, (nn.Embedding,))
    assert candidate.quantized
    check(candidate, tmp_path)


def test_a_format_that_the_file_does_not_hold_is_found(tmp_path: Path, cache: Path) -> None:
    written(SPECS[4], tmp_path, cache, (nn.Linear,))
    path = tmp_path / MODEL_FILE
    path.write_text(
        path.read_text().replace("&quot;format&quot;: &quot;nf4&quot;", "&quot;format&quot;: &quot;fp8&quot;")
    )
    with pytest.raises(ArtifactError, match="claims fp8"):
        OpenVino().stored_tensors(tmp_path)


def test_rounded_inputs_are_refused() -> None:
    static = ActivationSpec(kind="static", low=-1.0, high=1.0)
    assert "symmetric weights" in str(OpenVino().refusal("q", (32, 32), SPECS[0], static))
