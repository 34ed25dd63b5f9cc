"""OpenVINO IR (.xml and .bin): our codes in OpenVINO's graph, run by its CPU plugin.

The graph is the same float32 ONNX graph that the ONNX Runtime artifact starts from; codes go in as openvino_lowering.py
tells. Nothing is left to the plugin's own choice: computation is float32 unless the recipe cast the model to bfloat16
and the processor has it, and the plugin's own input rounding is switched off. Both are written into the file
(`runtime_options`), so that a user who just opens it gets what was judged.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.measure.machine import adds_in_pairs
from gossamer.runtimes.base import ExportRequest, Runtime, Session, StoredTensor

# types only, as in base.py
if TYPE_CHECKING:
    from collections.abc import Mapping

    from gossamer.models.candidate import Candidate
    from gossamer.models.quantized import ActivationSpec, QuantSpec
    from gossamer.tasks.base import Arrays, Task

MODEL_FILE = "openvino_model.xml"
BITS = {"f32": 32, "f16": 16, "bf16": 16, "u8": 8, "i8": 8, "u4": 4, "i4": 4}
LEVEL_TYPES = {"fp8": "f8e4m3", "mxfp4": "f4e2m1", "nvfp4": "f4e2m1", "nf4": "nf4"}
INTEGER_LAYERS = ("MatMul", "Convolution", "GroupConvolution")


class OpenVinoSession(Session):
    """A compiled model with one request that is used again and again."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = {name: port.get_element_type().to_dtype() for port in compiled.inputs for name in port.names}
        self._outputs = [(port.any_name, port) for port in compiled.outputs]

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs by name; floating-point outputs as float32."""
        wanted = {name: np.ascontiguousarray(inputs[name], dtype=dtype) for name, dtype in self._inputs.items()}
        found = self._request.infer(wanted, share_inputs=True)
        return {name: _float32(found[port]) for name, port in self._outputs}


def _float32(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else np.array(array)


class OpenVino(Runtime):
    """Write and open OpenVINO IR for the CPU."""

    name: ClassVar[str] = "openvino"
    extra: ClassVar[str | None] = "openvino"
    files: ClassVar[tuple[str, ...]] = ("*.xml", "*.bin")
    opens_with_task: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Return the package that is not installed, or None."""
        packages = ("openvino", "onnx", "onnxscript")
        return next((name for name in packages if importlib.util.find_spec(name) is None), None)

    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        """Return why a layer cannot be held like this, or None when it can."""
        columns = int(np.prod(shape[1:], dtype=np.int64))
        if spec is not None and spec.group_size and columns % spec.group_size:
            return f"group_size {spec.group_size} does not divide the {columns} inputs of a row"
        if activation is None:
            return None
        if spec is None:
            return "a layer's inputs can be rounded only together with its weight"
        if role in ("embedding", "positions"):
            return "the inputs of an embedding are row numbers: there is nothing to round"
        if activation.kind == "dynamic":
            return (
                "OpenVINO chooses its own grid for dynamic inputs, per token and symmetric, and only on some "
                "processors: it would not be the one that was judged; use static inputs"
            )
        if not spec.symmetric or spec.group_size or spec.format != "int":
            return "OpenVINO computes in integers only with symmetric weights of one scale per channel"
        if spec.bits == 8 and adds_in_pairs():
            return (
                "this processor adds two 8-bit products in 16 bits, and 8-bit weights overflow there: "
                "7-bit weights give the judged results"
            )
        return None

    def stored_bytes(self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype_bytes: int) -> int:
        """Return the bytes of one parameter in the .bin file: 4 bits a code up to 4 bits, else 8."""
        if spec is None:
            return int(np.prod(shape, dtype=np.int64)) * dtype_bytes
        from gossamer.runtimes.openvino_lowering import weight_bytes

        return weight_bytes(shape, spec, dtype_bytes)

    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        """Write the IR. Raises RuntimeUnavailable when a layer's inputs are rounded in a way that it cannot hold."""
        import openvino as ov

        _refuse(self, candidate)
        model = _float_model(candidate, request)
        tensors = _lower(model, candidate)
        _name_nodes(model)
        model.set_rt_info(json.dumps(tensors, sort_keys=True), ["gossamer", "tensors"])
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        ov.save_model(model, folder / MODEL_FILE, compress_to_fp16=False)

    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> Session:
        """Compile the IR for the CPU with `threads` threads and the lowest latency."""
        import openvino as ov

        core = ov.Core()
        model = _read(core, folder)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": _precision(model, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        return OpenVinoSession(core.compile_model(model, "CPU", settings))

    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        """Read back from the IR's constants how each parameter is held."""
        import openvino as ov

        model = _read(ov.Core(), folder)
        constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
        tensors = json.loads(model.get_rt_info(["gossamer", "tensors"]).astype(str))
        return [_stored(name, settings, constants) for name, settings in sorted(tensors.items()) if name in constants]

    def load_snippet(self, task: Task) -> str:
        """Return the lines with which a user opens the IR."""
        return (
            "import openvino as ov\n\n"
            f'model = ov.compile_model("path/to/{MODEL_FILE}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})\n'
            f'{task.output} = model(inputs)["{task.output}"]\n'
        )


def _refuse(runtime: OpenVino, candidate: Candidate) -> None:
    for owner, activation in candidate.activations.items():
        quantized = _codes_of(candidate, owner)
        spec = None if quantized is None else quantized.spec
        shape = tuple(quantized.shape) if quantized is not None else (1, 1)
        reason = runtime.refusal("linear", shape, spec, activation)
        if reason:
            raise RuntimeUnavailable(f"{owner}: {reason}", f"name {owner} under `ignore`, or choose another runtime")


def _codes_of(candidate: Candidate, owner: str) -> Any:
    """Return the codes of a module's weight, also when they are recorded under a tied parameter's other name."""
    weight = getattr(candidate.module.get_submodule(owner), "weight", None)
    for name, quantized in candidate.quantized.items():
        if candidate.module.get_parameter(name) is weight:
            return quantized
    return None


def _float_model(candidate: Candidate, request: ExportRequest) -> Any:
    """Return the float32 OpenVINO model whose constants bear the parameters' names."""
    import onnx_ir as ir
    import openvino as ov

    from gossamer.runtimes.onnx_graph import base_graph

    graph = base_graph(candidate.module, candidate.source, request)
    request.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=request.cache) as scratch:
        path = Path(scratch) / "model.onnx"
        ir.save(graph, path, external_data="model.data")
        return ov.Core().read_model(path).clone()


def _lower(model: Any, candidate: Candidate) -> dict[str, dict[str, Any]]:
    """Put codes and cast constants into the graph; return what was put there, by parameter name."""
    import torch

    from gossamer.runtimes import openvino_lowering as lowering

    known = {**dict(candidate.module.named_parameters()), **dict(candidate.module.named_buffers())}
    constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
    tensors: dict[str, dict[str, Any]] = {}
    rounded: dict[tuple[Any, ...], Any] = {}
    for name, quantized in candidate.quantized.items():
        if name not in constants:
            raise ArtifactError(f"{name} is quantized, but the exported graph has no constant of that name")
        weights = lowering.WeightConstants(name, quantized, candidate.dtype)
        layers = lowering.replace_weight(constants[name], weights, quantized.transposed)
        tensors[name] = {"bits": quantized.spec.bits, "shape": list(quantized.shape)}
        if quantized.spec.format != "int":
            tensors[name]["format"] = quantized.spec.format
        for activation in _activations_of(candidate, name):
            for layer in layers:
                if layer.get_type_name() in INTEGER_LAYERS:
                    lowering.round_input(layer, activation, rounded)
    for name, constant in constants.items():
        if name in known and name not in tensors and constant.get_element_type().is_real():
            tensors[name] = {"shape": list(known[name].shape)}
            if candidate.dtype != torch.float32:
                cast = lowering.cast_constant(constant, candidate.dtype)
                for use in list(constant.output(0).get_target_inputs()):
                    use.replace_source_output(cast.output(0))
    model.validate_nodes_and_infer_types()
    return tensors


def _activations_of(candidate: Candidate, parameter: str) -> list[ActivationSpec]:
    target = candidate.module.get_parameter(parameter)
    owners = [
        name.rpartition(".")[0]
        for name, other in candidate.module.named_parameters(remove_duplicate=False)
        if other is target
    ]
    return list({candidate.activations[owner] for owner in owners if owner in candidate.activations})


def _name_nodes(model: Any) -> None:
    """Number the nodes that OpenVINO named itself: its own counter goes on for as long as the process lives."""
    for index, node in enumerate(model.get_ordered_ops()):
        kind = node.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{kind}_{index}")


def _precision(model: Any, capabilities: list[str]) -> str:
    stored_bf16 = any(
        op.get_type_name() == "Constant" and op.get_element_type().get_type_name() == "bf16" for op in model.get_ops()
    )
    return "bf16" if stored_bf16 and "BF16" in capabilities else "f32"


def _read(core: Any, folder: Path) -> Any:
    path = folder / MODEL_FILE
    if not path.exists() or not path.with_suffix(".bin").exists():
        raise ArtifactError(f"{folder} holds no {MODEL_FILE} with its .bin file", "write the artifact again")
    return core.read_model(path)


def _stored(name: str, settings: Mapping[str, Any], constants: Mapping[str, Any]) -> StoredTensor:
    codes = constants[name]
    dtype = codes.get_element_type().get_type_name()
    scale, zero_point = constants.get(f"{name}/scale"), constants.get(f"{name}/zero_point")
    parts = [constant for constant in (codes, scale, zero_point) if constant is not None]
    size = sum(constant.get_byte_size() for constant in parts)
    lying = list(codes.get_output_shape(0))
    grouped = scale is not None and len(lying) == 3 and lying != settings["shape"]
    group_size = lying[2] if grouped else None
    if "format" in settings:
        if dtype != LEVEL_TYPES[settings["format"]]:
            raise ArtifactError(f"{name} claims {settings['format']}, but its codes are {dtype}")
        dtype, bits = settings["format"], int(settings["bits"])
    else:
        bits = BITS.get(dtype, 0) if scale is None else _checked_bits(name, settings, codes)
    return StoredTensor(name, dtype, bits, group_size, zero_point is None, tuple(settings["shape"]), size)


def _checked_bits(name: str, settings: Mapping[str, Any], codes: Any) -> int:
    """Return the logical width of codes that may lie in a wider container, after looking whether they fit it."""
    bits, container = int(settings["bits"]), codes.get_element_type()
    values = codes.get_data(dtype=np.int16)
    shift = 0 if container.is_signed() else 2 ** (container.size * 8 - 1 if container.bitwidth == 8 else 3)
    low, high = int(values.min()) - shift, int(values.max()) - shift
    if low < -(2 ** (bits - 1)) or high > 2 ** (bits - 1) - 1:
        raise ArtifactError(f"{name} claims {bits} bits, but its codes reach from {low} to {high}")
    return bits
