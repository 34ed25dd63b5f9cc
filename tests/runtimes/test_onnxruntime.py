"""Each lowering computes what the in-memory model computes, from the codes alone, and says truly what it stores.

Tolerances, relative to the largest output: 1e-4 for float32 arithmetic in another order; 2e-3 where inputs are rounded
to 8 bits, since a value within float noise of the middle between two codes may fall to either side, which moves it by
1/255 of the input's range (1e-2 for 7-bit static convolutions, whose bias is a whole number of
products: of 12 inputs the worst was off by 8e-3, and all agreed to 1e-5 with a simulation that rounds its bias alike);
5 % for accuracy_level 4, whose input grid is one per block instead of the one asked for.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from gossamer.errors import ArtifactError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec, rows_of
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.onnxruntime import OnnxRuntime
from gossamer.tasks import get_task

WORDS = {"vocab_size": 80}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**SMALL, **WORDS, attn_implementation="eager"))


def llama() -> PreTrainedModel:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **WORDS, **heads}, attn_implementation="eager"))


def gpt2() -> PreTrainedModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, **WORDS, **ends, attn_implementation="eager")
    )


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(**SMALL, image_size=16, patch_size=8, num_channels=1, attn_implementation="eager")
    )


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": bert, "llama": llama, "gpt2": gpt2, "vit": vit, "resnet": resnet,
}  # fmt: skip
TASK = get_task("text-classification")


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests: a graph is exported once for each of the five models."""
    return tmp_path_factory.mktemp("graphs")


def build(name: str, graphs: Path) -> tuple[Candidate, ExportRequest]:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    with torch.no_grad():  # trained models have neither unit norms nor zero biases
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if name in ("vit", "resnet"):
        example: dict[str, Any] = {"pixel_values": np.random.default_rng(1).normal(size=(1, 1, 16, 16))}
        example = {key: value.astype(np.float32) for key, value in example.items()}
        axes = {"pixel_values": {0: "batch"}}
    else:
        ids = np.random.default_rng(1).integers(1, 80, (1, 9))
        example = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        axes = {key: {0: "batch", 1: "tokens"} for key in example}
    request = ExportRequest(task=TASK, example=example, axes=axes, outputs=("logits",), cache=graphs)
    source = Source.open(module, name=name)
    return Candidate(source=source, module=source.module(TASK)), request


def other_inputs(request: ExportRequest) -> dict[str, Any]:
    """Inputs of another batch size and length than the example, with padding."""
    rng = np.random.default_rng(2)
    if "pixel_values" in request.example:
        return {"pixel_values": rng.normal(size=(3, 1, 16, 16)).astype(np.float32)}
    ids = rng.integers(1, 80, (2, 7))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def round_to_nearest(weight: Tensor, spec: QuantSpec, transposed: bool) -> Quantized:
    rows = rows_of(weight.detach(), transposed)
    group = spec.group_size or rows.shape[1]
    if rows.shape[1] % group:
        group, spec = rows.shape[1], spec.model_copy(update={"group_size": None})
    grouped = rows.unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if spec.symmetric:
        scale, zero = torch.maximum(-low, high) / spec.high, None
        codes = (grouped / scale[..., None]).round()
    else:
        scale = (high - low) / (spec.high - spec.low)
        zero = (spec.low - low / scale).round().clamp(spec.low, spec.high)
        codes = (grouped / scale[..., None]).round() + zero[..., None]
    codes = codes.clamp(spec.low, spec.high).flatten(1).to(torch.int8)
    zero = None if zero is None else zero.to(torch.int8)
    return Quantized(codes, scale, zero, spec, tuple(weight.shape), transposed)


def quantize(
    candidate: Candidate,
    request: ExportRequest,
    spec: QuantSpec,
    activation: ActivationSpec | None = None,
    embedding: QuantSpec | None = None,
) -> None:
    names = dict(candidate.module.named_parameters())
    for name, module in candidate.module.named_modules():
        wanted = embedding if isinstance(module, nn.Embedding) else spec
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | Conv1D) or wanted is None:
            continue
        parameter = f"{name}.weight"
        if parameter in names:
            candidate.set_quantized(
                parameter, round_to_nearest(names[parameter], wanted, transposed=isinstance(module, Conv1D))
            )
            if activation is not None and not isinstance(module, nn.Embedding):
                candidate.activations[name] = activation
    if activation is not None and activation.kind == "static":
        calibrate(candidate, other_inputs(request))


def calibrate(candidate: Candidate, inputs: dict[str, Any]) -> None:
    for name, spec in list(candidate.activations.items()):
        seen: list[Tensor] = []
        handle = candidate.module.get_submodule(name).register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].detach())
        )
        expected(candidate, inputs, simulated=False)
        handle.remove()
        bounds = {"low": float(seen[0].min()), "high": float(seen[0].max())}
        candidate.activations[name] = spec.model_copy(update=bounds)


def expected(candidate: Candidate, inputs: dict[str, Any], *, simulated: bool = True) -> Any:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        if not simulated:
            return candidate.source.forward(candidate.module, tensors).numpy()
        with candidate.simulated() as module:
            return candidate.source.forward(module, tensors).numpy()


def check(candidate: Candidate, request: ExportRequest, folder: Path, tolerance: float) -> None:
    runtime = OnnxRuntime()
    runtime.write(candidate, folder, request)
    inputs = other_inputs(request)
    found = runtime.open(folder, threads=1).run(inputs)["logits"]
    wanted = expected(candidate, inputs)
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
    check_stored(candidate, folder)


def check_stored(candidate: Candidate, folder: Path) -> None:
    """What the file says of itself agrees with the candidate, with the prediction, and with its raw tensors."""
    runtime = OnnxRuntime()
    stored = {tensor.name: tensor for tensor in runtime.stored_tensors(folder)}
    file = ir.load(folder / "model.onnx")
    held = {name: value.const_value for name, value in file.graph.initializers.items() if value.const_value}
    for name, quantized in candidate.quantized.items():
        assert (stored[name].bits, stored[name].symmetric) == (quantized.spec.bits, quantized.spec.symmetric)
        assert stored[name].group_size == quantized.spec.group_size
        raw = sum(held[key].nbytes for key in held if key.startswith(f"{name}."))
        shape = quantized.shape[::-1] if quantized.transposed else quantized.shape
        assert stored[name].bytes == raw == runtime.stored_bytes("linear", shape, quantized.spec, 4)
        assert name not in held
    floats = {name for name, _ in candidate.module.named_parameters()} - set(candidate.quantized)
    for name in floats:
        assert stored[name].bytes == runtime.stored_bytes("norm", stored[name].shape, None, 4)
    biggest = max((q.codes.numel() for q in candidate.quantized.values()), default=math.inf)
    copies = [
        key for key, t in held.items() if t.dtype == ir.DataType.FLOAT and t.size >= biggest and key not in floats
    ]
    assert copies == []


DYNAMIC = ActivationSpec(kind="dynamic")
STATIC = ActivationSpec(kind="static", low=0.0, high=1.0)


@pytest.mark.parametrize("name", MODELS)
def test_unquantized_equals_the_module(name: str, graphs: Path, tmp_path: Path) -> None:
    candidate, request = build(name, graphs)
    check(candidate, request, tmp_path, 1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("spec", "embedding"),
    [
        (QuantSpec(bits=8), QuantSpec(bits=8)),
        (QuantSpec(bits=4, group_size=16), QuantSpec(bits=4, group_size=16)),
        (QuantSpec(bits=4, group_size=16, symmetric=False), QuantSpec(bits=4, symmetric=False)),
        (QuantSpec(bits=3, group_size=8, symmetric=False), QuantSpec(bits=3, group_size=8)),
        (QuantSpec(bits=2, group_size=32), QuantSpec(bits=8, group_size=16, symmetric=False)),
        (QuantSpec(bits=6, symmetric=False), QuantSpec(bits=8, symmetric=False)),
    ],
    ids=str,
)
def test_weight_only_equals_the_module(
    name: str, spec: QuantSpec, embedding: QuantSpec, graphs: Path, tmp_path: Path
) -> None:
    candidate, request = build(name, graphs)
    quantize(candidate, request, spec, embedding=embedding)
    check(candidate, request, tmp_path, 1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("activation", [DYNAMIC, STATIC], ids=str)
def test_rounded_inputs_equal_the_simulation(
    name: str, bits: int, activation: ActivationSpec, graphs: Path, tmp_path: Path
) -> None:
    candidate, request = build(name, graphs)
    quantize(candidate, request, QuantSpec(bits=bits), activation, QuantSpec(bits=8))
    check(candidate, request, tmp_path, 1e-2 if name == "resnet" and activation is STATIC and bits == 7 else 2e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_signed_input_grids_and_weights_with_zero_points(kind: Any, graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("bert", graphs)
    spec = QuantSpec(bits=8, symmetric=False)
    quantize(candidate, request, spec, ActivationSpec(kind=kind, symmetric=True, low=0.0, high=1.0))
    check(candidate, request, tmp_path, 2e-3)


def test_four_bits_with_rounded_inputs_come_close(graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("llama", graphs)
    quantize(candidate, request, QuantSpec(bits=4, group_size=16), DYNAMIC)
    check(candidate, request, tmp_path, 5e-2)
    nodes = ir.load(tmp_path / "model.onnx").graph
    assert {node.attributes["accuracy_level"].as_int() for node in nodes if node.op_type == "MatMulNBits"} == {4}


def test_layers_that_read_one_tensor_share_its_rounding(graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("bert", graphs)
    quantize(candidate, request, QuantSpec(bits=7), DYNAMIC)
    OnnxRuntime().write(candidate, tmp_path, request)
    operators = [node.op_type for node in ir.load(tmp_path / "model.onnx").graph]
    assert operators.count("MatMulIntegerToFloat") == 8  # q k v o up down pooler classifier
    assert operators.count("DynamicQuantizeLinear") == 6  # q, k and v share one


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_tied_embedding_is_stored_once(bits: int, graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("llama", graphs)
    spec = QuantSpec(bits=bits, group_size=16)
    quantize(candidate, request, spec, embedding=spec)
    check(candidate, request, tmp_path, 1e-4)
    file = ir.load(tmp_path / "model.onnx")
    copies = [
        name
        for name, value in file.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= 80 * 32 * bits // 8
        and not name.endswith(".scale")
    ]
    assert copies == ["model.embed_tokens.weight.codes"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_halves_the_file_and_computes_in_float32(dtype: torch.dtype, graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("llama", graphs)
    candidate.module.to(dtype).float()  # what a cast technique leaves behind: values that fit, in float32
    candidate.dtype = dtype
    OnnxRuntime().write(candidate, tmp_path, request)
    inputs = other_inputs(request)
    found = OnnxRuntime().open(tmp_path, threads=1).run(inputs)["logits"]
    np.testing.assert_allclose(found, expected(candidate, inputs), atol=1e-5)
    stored = OnnxRuntime().stored_tensors(tmp_path)
    assert {tensor.bits for tensor in stored if tensor.name in dict(candidate.module.named_parameters())} == {16}
    assert sum(tensor.bytes for tensor in stored) == 2 * sum(math.prod(tensor.shape) for tensor in stored)


def test_the_same_candidate_gives_the_same_bytes(graphs: Path, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        candidate, request = build("llama", graphs)
        quantize(candidate, request, QuantSpec(bits=4, group_size=16), embedding=QuantSpec(bits=4, group_size=16))
        (tmp_path / name).mkdir()
        OnnxRuntime().write(candidate, tmp_path / name, request)
        written.append((tmp_path / name / "model.onnx").read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
def test_the_same_candidate_gives_the_same_bytes_in_another_process(graphs: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_onnxruntime import *\n"
        "candidate, request = build('bert', Path(sys.argv[2]))\n"
        "quantize(candidate, request, QuantSpec(bits=7), DYNAMIC, QuantSpec(bits=8))\n"
        "OnnxRuntime().write(candidate, Path(sys.argv[3]), request)\n"
    )
    written = []
    for cache in ("one", "two"):  # exported afresh in each: neither the process nor the cache may show
        folder = tmp_path / cache / "out"
        folder.mkdir(parents=True)
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / cache), str(folder)]
        subprocess.run(command, check=True, capture_output=True)
        written.append((folder / "model.onnx").read_bytes())
    assert written[0] == written[1]


def test_an_ordinary_network_with_its_forward_function(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    source = Source.open(network, forward=lambda module, inputs: module(inputs["x"]), name="plain")
    module = source.module(TASK)
    rng = np.random.default_rng(0)
    example = {"x": rng.normal(size=(1, 16)).astype(np.float32)}
    (tmp_path / "out").mkdir()
    request = ExportRequest(TASK, example, {"x": {0: "batch"}}, ("logits",), tmp_path / "cache")
    candidate = Candidate(source=source, module=module)
    candidate.set_quantized("0.weight", round_to_nearest(module.get_parameter("0.weight"), QuantSpec(bits=8), False))
    OnnxRuntime().write(candidate, tmp_path / "out", request)
    inputs = {"x": rng.normal(size=(5, 16)).astype(np.float32)}
    found = OnnxRuntime().open(tmp_path / "out", threads=1).run(inputs)["logits"]
    np.testing.assert_allclose(found, expected(candidate, inputs), atol=1e-5)


def test_a_parameter_that_the_graph_does_not_use_is_named(graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("bert", graphs)
    candidate.quantized["bert.nowhere.weight"] = round_to_nearest(torch.randn(4, 16), QuantSpec(bits=8), False)
    with pytest.raises(ArtifactError, match=r"bert\.nowhere\.weight"):
        OnnxRuntime().write(candidate, tmp_path, request)


def test_rounded_inputs_without_a_quantized_weight_are_named(graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("bert", graphs)
    candidate.activations["classifier"] = DYNAMIC
    with pytest.raises(ArtifactError, match="classifier"):
        OnnxRuntime().write(candidate, tmp_path, request)


def test_a_file_whose_codes_leave_their_grid_is_refused(graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("bert", graphs)
    wide = round_to_nearest(candidate.module.get_parameter("classifier.weight"), QuantSpec(bits=8), False)
    candidate.set_quantized("classifier.weight", replace(wide, spec=QuantSpec(bits=6)))
    OnnxRuntime().write(candidate, tmp_path, request)
    with pytest.raises(ArtifactError, match=r"classifier\.weight.*do not fit 6 bits"):
        OnnxRuntime().stored_tensors(tmp_path)


def test_a_damaged_and_a_missing_file_are_our_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not open"):
        OnnxRuntime().open(tmp_path, threads=1)
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="does not open"):
        OnnxRuntime().open(tmp_path, threads=1)
    with pytest.raises(ArtifactError):
        OnnxRuntime().stored_tensors(tmp_path)


def test_a_full_disk_is_our_error(graphs: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    candidate, request = build("bert", graphs)
    runtime = OnnxRuntime()
    folder = graphs / "full"
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").unlink(missing_ok=True)
    (folder / "model.onnx").symlink_to("/dev/full")
    with pytest.raises(ArtifactError, match="no space is left"):
        runtime.write(candidate, folder, request)


@pytest.mark.parametrize(
    ("role", "shape", "spec", "activation", "why"),
    [
        ("q", (32, 48), QuantSpec(bits=4, group_size=64), None, "does not divide 48"),
        ("q", (32, 64), QuantSpec(bits=8), ActivationSpec(kind="dynamic", scope="token"), "per token"),
        ("q", (32, 64), QuantSpec(bits=4, group_size=32), STATIC, "5 to 8 bits"),
        ("embedding", (80, 32), QuantSpec(bits=8), DYNAMIC, "no input"),
        ("convolution", (8, 1, 3, 3), QuantSpec(bits=8, symmetric=False), DYNAMIC, "symmetric"),
        ("q", (32, 64), None, DYNAMIC, "quantized weight"),
    ],
)
def test_what_cannot_be_computed_is_refused(role: str, shape: Any, spec: Any, activation: Any, why: str) -> None:
    reason = OnnxRuntime().refusal(role, shape, spec, activation)
    assert reason is not None
    assert why in reason


def test_what_can_be_computed_is_not_refused() -> None:
    runtime = OnnxRuntime()
    assert runtime.refusal("q", (32, 64), QuantSpec(bits=8), DYNAMIC) is None
    assert runtime.refusal("q", (32, 64), QuantSpec(bits=3, group_size=24 // 3), None) is None
    assert runtime.refusal("embedding", (80, 32), QuantSpec(bits=4, group_size=16), None) is None
    assert runtime.refusal("norm", (32,), None, None) is None


def test_the_snippet_runs_without_gossamer(graphs: Path, tmp_path: Path) -> None:
    candidate, request = build("bert", graphs)
    quantize(candidate, request, QuantSpec(bits=8), DYNAMIC)
    OnnxRuntime().write(candidate, tmp_path, request)
    inputs = other_inputs(request)
    snippet = OnnxRuntime().load_snippet(TASK)
    names = {name: inputs.get(name) for name in TASK.input_axes}
    snippet = snippet.replace('"model.onnx"', repr(str(tmp_path / "model.onnx")))
    snippet = snippet.replace('"token_type_ids": token_type_ids', "")  # this graph was exported without them
    scope: dict[str, Any] = dict(names)
    exec(compile(snippet, "snippet", "exec"), scope)  # noqa: S102 - it is our own text
    opened = OnnxRuntime().open(tmp_path, threads=1).run(inputs)["logits"]
    np.testing.assert_array_equal(scope["logits"], opened)


def test_wide_codes_are_written_for_the_processor_and_say_so(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate, request = build("bert", graphs)
    for name in ("bert.encoder.layer.0.intermediate.dense", "classifier"):
        weight = candidate.module.get_parameter(f"{name}.weight")
        candidate.set_quantized(f"{name}.weight", round_to_nearest(weight, QuantSpec(bits=8), False))
        candidate.activations[name] = DYNAMIC
    old, new = ("old", ("avx2", "fma")), ("new", ("avx2", "avx512_vnni"))
    for kind, processor in (("shifted", old), ("signed", new)):
        monkeypatch.setattr("gossamer.measure.machine.processor", lambda processor=processor: processor)
        (tmp_path / kind).mkdir()
        OnnxRuntime().write(candidate, tmp_path / kind, request)
    OnnxRuntime().open(tmp_path / "signed", threads=1)
    monkeypatch.setattr("gossamer.measure.machine.processor", lambda: old)
    OnnxRuntime().open(tmp_path / "shifted", threads=1)
    with pytest.raises(ArtifactError, match="int8 dot products") as caught:
        OnnxRuntime().open(tmp_path / "signed", threads=1)
    assert "bits: 7" in caught.value.hint
