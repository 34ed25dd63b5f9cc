"""torch.export programs and TorchScript archives: same answers on other shapes, same bytes, floats only."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest, Runtime
from gossamer.runtimes.torch_export import PROGRAM_FILE, TorchExport
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.runtimes.torchscript import SCRIPT_FILE, TorchScript
from gossamer.tasks import get_task

IDS = np.array([[1, 2, 3, 4, 5]])
EXAMPLE = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
AXES = {name: {0: "batch", 1: "tokens"} for name in EXAMPLE}
LONGER = {"input_ids": np.arange(21).reshape(3, 7), "attention_mask": np.ones((3, 7), dtype=np.int64)}
RUNTIMES = [TorchExport(), TorchScript()]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )


def make(build: Any, task_name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, ExportRequest]:
    torch.manual_seed(0)
    build().save_pretrained(folder / "source")
    source, task = Source.open(folder / "source"), get_task(task_name)
    request = ExportRequest(task=task, example=EXAMPLE, axes=AXES, outputs=("logits",), cache=folder / "cache")
    return Candidate(source=source, module=source.module(task), dtype=dtype), request


def written(runtime: Runtime, candidate: Candidate, request: ExportRequest, folder: Path) -> Path:
    folder.mkdir()
    runtime.write(candidate, folder, request)
    return folder


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
@pytest.mark.parametrize(("build", "task"), [(llama, "causal-lm"), (bert, "text-classification")])
def test_other_shapes_give_the_model_s_answers(build: Any, task: str, runtime: Runtime, tmp_path: Path) -> None:
    candidate, request = make(build, task, tmp_path)
    folder = written(runtime, candidate, request, tmp_path / "out")
    session = runtime.open(folder, threads=1, task=request.task)
    for inputs in (EXAMPLE, LONGER):
        with torch.no_grad():
            expected = candidate.module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits
        np.testing.assert_allclose(session.run(inputs)["logits"], expected.numpy(), atol=1e-5)
    stored = {tensor.name: tensor for tensor in runtime.stored_tensors(folder)}
    for name, parameter in candidate.module.named_parameters():
        assert (stored[name].bits, stored[name].bytes) == (32, runtime.stored_bytes("q", parameter.shape, None, 4))


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_cast_models(runtime: Runtime, tmp_path: Path) -> None:
    candidate, request = make(llama, "causal-lm", tmp_path, torch.bfloat16)
    folder = written(runtime, candidate, request, tmp_path / "out")
    found = runtime.open(folder, threads=1).run(LONGER)["logits"]
    inputs = {name: torch.from_numpy(array) for name, array in LONGER.items()}
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)(**inputs).logits.float()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference.detach().numpy(), atol=4e-3)
    parameters = dict(candidate.module.named_parameters())
    stored = {tensor.name: tensor for tensor in runtime.stored_tensors(folder)}
    assert {stored[name].bits for name in parameters} == {16}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}  # the candidate is as it was


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_same_candidate_same_bytes(runtime: Runtime, tmp_path: Path) -> None:
    candidate, request = make(llama, "causal-lm", tmp_path)
    one, two = (next(written(runtime, candidate, request, tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_codes_are_refused(runtime: Runtime, tmp_path: Path) -> None:
    spec = QuantSpec(bits=8)
    assert "floating-point" in str(runtime.refusal("q", (8, 8), spec, None))
    assert runtime.refusal("q", (8, 8), None, None) is None
    candidate, request = make(llama, "causal-lm", tmp_path)
    codes = torch.zeros((32, 32), dtype=torch.int8)
    name = "model.layers.0.self_attn.q_proj.weight"
    candidate.set_quantized(name, Quantized(codes, torch.ones((32, 1)), None, spec, (32, 32)))
    with pytest.raises(RuntimeUnavailable, match="q_proj"):
        written(runtime, candidate, request, tmp_path / "out")


def test_a_network_without_a_folder_is_served_by_the_runtime_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    source = Source.open(network, forward=lambda module, inputs: module(inputs["pixel_values"]))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    request = ExportRequest(
        get_task("image-classification"),
        {"pixel_values": pixels},
        {"pixel_values": {0: "batch"}},
        ("logits",),
        tmp_path,
    )
    folder = tmp_path / "out"
    folder.mkdir()
    TorchFolder().write_original(source, folder, request)
    assert [path.name for path in folder.iterdir()] == [PROGRAM_FILE]
    more = np.concatenate([pixels, 2 * pixels, 3 * pixels])
    found = TorchFolder().open(folder, threads=1, task=request.task).run({"pixel_values": more})["logits"]
    np.testing.assert_allclose(found, network(torch.from_numpy(more)).detach().numpy(), atol=1e-5)
    assert {tensor.name for tensor in TorchFolder().stored_tensors(folder)} >= {"0.weight", "4.bias"}


def test_a_trace_that_froze_a_choice_is_refused(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1) * len(x.tolist())  # Python's number, a constant in a trace

    source = Source.open(Counting(), forward=lambda module, inputs: module(inputs["x"]))
    example = {"x": np.ones((2, 3), dtype=np.float32)}
    request = ExportRequest(get_task("causal-lm"), example, {"x": {0: "batch"}}, ("logits",), tmp_path)
    with pytest.raises(ArtifactError, match="differently"):
        TorchScript().write(Candidate(source=source, module=source.module(request.task)), tmp_path, request)


def test_pickled_objects_in_a_program_are_not_loaded(tmp_path: Path) -> None:
    candidate, request = make(llama, "causal-lm", tmp_path)
    path = written(TorchExport(), candidate, request, tmp_path / "out") / PROGRAM_FILE
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/constants/opaque_obj_0", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ArtifactError, match="opaque_obj_0"):
        TorchExport().open(path.parent, threads=1)


def test_archives_hold_no_paths_of_this_machine(tmp_path: Path) -> None:
    candidate, request = make(llama, "causal-lm", tmp_path)
    path = written(TorchScript(), candidate, request, tmp_path / "out") / SCRIPT_FILE
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("gossamer.json"))))
    assert names == {"inputs": ["input_ids", "attention_mask"], "outputs": ["logits"]}
