"""ONNX Runtime on the CPU: one `model.onnx`, small on disk, computed with integer kernels where the recipe says so."""

from __future__ import annotations

import errno
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gossamer.errors import ArtifactError
from gossamer.measure.machine import adds_in_pairs
from gossamer.models.roles import EXPERT_ROLES
from gossamer.runtimes.base import ExportRequest, Runtime, Session, StoredTensor
from gossamer.runtimes.onnx_storage import (
    INT8_DOT_PRODUCTS,
    NEEDS,
    block_layout,
    expert_bytes,
    expert_container,
    parameter_bytes,
    read_stored,
    row_layout,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from gossamer.models.candidate import Candidate
    from gossamer.models.quantized import ActivationSpec, QuantSpec
    from gossamer.models.roles import ModelMap
    from gossamer.tasks.base import Arrays, Task

FILE = "model.onnx"
WEIGHTS = "model.onnx.data"
ONE_FILE_LIMIT = 1_500_000_000  # protobuf ends at 2 GiB; beyond this, weights lie in a file of their own


class OnnxSession(Session):
    """An opened ONNX file."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs by name, float32. Inputs that the graph does not use are left out."""
        if gone := self._inputs - set(inputs):
            raise ArtifactError(f"the model needs the input {min(gone)}; it was given {sorted(inputs)}", "add it")
        given = {name: array for name, array in inputs.items() if name in self._inputs}
        found = self._session.run(self._outputs, given)
        return {
            name: array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
            for name, array in zip(self._outputs, found, strict=True)
        }


class OnnxRuntime(Runtime):
    """Write, open and run ONNX files with ONNX Runtime's CPU kernels.

    >>> OnnxRuntime().stored_bytes("q", (64, 128), QuantSpec(bits=4, group_size=32), 4)  # 4096 of codes, 1024 of scales
    5120
    """

    name: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = None
    files: ClassVar[tuple[str, ...]] = (FILE, WEIGHTS)
    opens_with_task: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Return the first of the needed packages that is not installed, or None."""
        needed = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
        return next((package for package in needed if find_spec(package) is None), None)

    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        """Return why ONNX Runtime cannot compute a layer like this on the CPU, or None when it can."""
        if spec is None:
            return None if activation is None else "rounded inputs need a quantized weight"
        inputs = math.prod(shape[1:])
        if spec.group_size is not None and inputs % spec.group_size:
            return f"group size {spec.group_size} does not divide {inputs} inputs"
        if role in EXPERT_ROLES:
            return _expert_refusal(inputs, spec, activation)
        if activation is None:
            return None
        if role in ("embedding", "positions"):
            return "an embedding has no input to round"
        if spec.format != "int":
            return f"rounded inputs are integers, which it does not multiply by {spec.format} weights"
        if activation.scope == "token":
            return "its integer matmul takes one scale for a whole input, not one per token"
        per_channel = spec.group_size in (None, inputs)
        if _is_conv(role, shape):
            return _conv_refusal(spec, per_channel)
        if per_channel and spec.bits > 4:
            return None
        if activation.kind == "static":
            return "rounded inputs with calibrated ranges need 5 to 8 bits and one scale per channel"
        return None if block_layout(inputs, spec) else f"no block of 16 to 256 divides groups of {spec.group_size}"

    def refusal_together(self, model: ModelMap, chosen: Mapping[str, QuantSpec]) -> str | None:
        """Return why one operator cannot hold the experts of a block with these grids, or None when it can."""
        from gossamer.runtimes.onnx_experts import refusal_of_experts

        return refusal_of_experts(model, chosen)

    def stored_bytes(self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype_bytes: int) -> int:
        """Return exactly how many bytes the file's tensors take for a parameter [O, I...]."""
        if spec is None:
            return math.prod(shape) * dtype_bytes
        if role in EXPERT_ROLES:
            return expert_bytes(shape, spec)
        inputs = math.prod(shape[1:])
        blocks = None if _is_conv(role, shape) or spec.format != "int" else block_layout(inputs, spec)
        return parameter_bytes(shape, spec, blocks or row_layout(spec))

    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        """Write `model.onnx`. Raises ArtifactError for what the graph cannot hold, or when the disk is full."""
        from gossamer.runtimes.onnx_graph import base_graph  # torch: a process that only serves does not need it
        from gossamer.runtimes.onnx_lowering import lower

        model = base_graph(candidate.module, candidate.source, request)
        lower(model, candidate)
        model.producer_name, model.producer_version = "gossamer", ""
        _save(model, folder)

    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> OnnxSession:
        """Open an artifact with `threads` threads of the CPU provider.

        Raises ArtifactError when it does not open, or would compute something else on this processor.
        """
        session = _session(folder / FILE, threads)
        needs = session.get_modelmeta().custom_metadata_map.get(NEEDS)
        if needs == INT8_DOT_PRODUCTS and adds_in_pairs():
            raise ArtifactError(
                f"{folder / FILE} multiplies 8-bit weights by 8-bit inputs, whose sums saturate on this processor: "
                f"it was written on one with {INT8_DOT_PRODUCTS}, this one has none",
                "write the artifact again on this machine, or with bits: 7, which is exact on every processor",
            )
        return OnnxSession(session)

    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        """Read from the file alone how each parameter is held; ArtifactError when the file contradicts itself."""
        return read_stored(_load(folder / FILE))

    def load_snippet(self, task: Task) -> str:
        """Return the lines with which a user opens the file without gossamer."""
        feeds = ", ".join(f'"{name}": {name}' for name in task.input_axes)
        return (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{FILE}", providers=["CPUExecutionProvider"])\n'
            f'({task.output},) = session.run(["{task.output}"], {{{feeds}}})\n'
        )


def _is_conv(role: str, shape: tuple[int, ...]) -> bool:
    return role == "convolution" or len(shape) > 2


def _expert_refusal(inputs: int, spec: QuantSpec, activation: ActivationSpec | None) -> str | None:
    if activation is not None:
        return "the operator for experts takes their inputs as they are"
    if spec.format != "int":
        return f"the operator for experts multiplies integers, not {spec.format}"
    if spec.group_size is not None and spec.bits > 4:
        return "the operator for experts rounds inputs where 8-bit weights have groups: leave group_size empty"
    if spec.group_size is not None and spec.group_size not in (16, 32, 64, 128, 256):
        return f"the operator for experts takes groups of 16, 32, 64, 128 or 256, not {spec.group_size}"
    return None if inputs * expert_container(spec) % 8 == 0 else f"{inputs} codes do not fill whole bytes"


def _conv_refusal(spec: QuantSpec, per_channel: bool) -> str | None:
    if not per_channel or spec.bits <= 4:
        return "a convolution with rounded inputs needs 5 to 8 bits and one scale per channel"
    return None if spec.symmetric else "its integer convolution takes symmetric weights only"


def _save(model: ir.Model, folder: Path) -> None:
    import onnx_ir as ir

    path = folder / FILE
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    try:
        if total > ONE_FILE_LIMIT:
            ir.save(model, path, external_data=WEIGHTS)
        else:
            path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    except OSError as error:
        why = f"no space is left for {total:,} bytes" if error.errno == errno.ENOSPC else error.strerror
        raise ArtifactError(f"cannot write {path}: {why}", "free space there, or choose another folder") from error


def _load(path: Path) -> ir.Model:
    import onnx_ir as ir

    try:
        return ir.load(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no {path}", "give the folder that holds the artifact") from error
    except Exception as error:  # protobuf and onnx_ir raise their own classes for a damaged file
        raise ArtifactError(f"{path} is not an ONNX file: {str(error)[:200]}", "write the artifact again") from error


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes for one thing: the file does not open
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} does not open {path}: {str(error).splitlines()[0][:300]}",
            "write the artifact again with this version of onnxruntime",
        ) from error
