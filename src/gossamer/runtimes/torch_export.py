"""torch.export programs (.pt2): the graph and its float weights in one file that runs without the model's code.

For unquantized and cast (bfloat16, float16) candidates, and the way in which an original that is not from Hugging Face
is served in a process of its own. Codes have no place in the format: a quantized weight would be stored as the floats
that it stands for, which saves nothing, so it is refused.

Axes that may vary are exported as varying; an axis of length 1 in the example is doubled first, because torch.export
takes a length of 1 for a constant.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.runtimes.base import ExportRequest, Runtime, Session, StoredTensor
from gossamer.tasks.base import Arrays, Task

PROGRAM_FILE = "model.pt2"
NAMES_FILE = "gossamer.json"  # inside the archive: names of inputs and outputs, in order
FLOATS_ONLY = "{} stores floating-point weights only: a quantized one would take as many bytes as before"


class Served(nn.Module):
    """What is exported: named inputs in, a tuple of float32 outputs out, computed in the module's own dtype."""

    def __init__(self, candidate: Candidate, outputs: tuple[str, ...], inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = cast_copy(candidate.module, candidate.dtype)
        self._forward: Callable[..., Tensor] = candidate.source.forward
        self._dtype = candidate.dtype
        self._inputs = inputs
        self._outputs = outputs if candidate.source.config is not None else outputs[:1]  # a function gives one

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of their names; `arguments` are in the order of the inputs' names."""
        cast = [value.to(self._dtype) if value.is_floating_point() else value for value in arguments]
        inputs = dict(zip(self._inputs, cast, strict=True))
        return tuple(self._forward(self.model, inputs, name).float() for name in self._outputs)

    def names(self) -> str:
        """Return the names of inputs and outputs as JSON."""
        return json.dumps({"inputs": self._inputs, "outputs": self._outputs})


class ProgramSession(Session):
    """A program that takes its inputs in a fixed order."""

    def __init__(self, call: Callable[..., tuple[Tensor, ...]], names: str) -> None:
        found = json.loads(names)
        self._call = call
        self._inputs: list[str] = found["inputs"]
        self._outputs: list[str] = found["outputs"]

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs by name, float32."""
        if missing := [name for name in self._inputs if name not in inputs]:
            raise ArtifactError(f"the program wants inputs {self._inputs}, but {missing} are missing")
        with torch.inference_mode():
            found = self._call(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self._inputs))
        return {name: value.numpy() for name, value in zip(self._outputs, found, strict=True)}


class TorchExport(Runtime):
    """Write and open torch.export programs of unquantized and cast models."""

    name: ClassVar[str] = "torch-export"
    files: ClassVar[tuple[str, ...]] = ("*.pt2",)
    opens_with_task: ClassVar[bool] = False

    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        """Return why a layer cannot be held like this: floating point only."""
        return FLOATS_ONLY.format("torch.export") if spec or activation else None

    def stored_bytes(self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype_bytes: int) -> int:
        """Return the bytes of one parameter in the file."""
        return int(np.prod(shape, dtype=np.int64)) * dtype_bytes

    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        """Write model.pt2. Raises RuntimeUnavailable for a quantized candidate."""
        refuse_quantized(candidate, "torch.export")
        served = Served(candidate, request.outputs, tuple(request.example))
        arguments = tuple(torch.from_numpy(array) for array in varied_example(request).values())
        shapes = tuple(dict.fromkeys(request.axes.get(name, {}), Dim.DYNAMIC) for name in request.example)
        with torch.no_grad():
            program = torch.export.export(served, arguments, dynamic_shapes=(shapes,), strict=False)
        program.example_inputs = None  # the user's rows are no part of the artifact
        torch.export.save(program, folder / PROGRAM_FILE, extra_files={NAMES_FILE: served.names()})

    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> Session:
        """Open a program in this process."""
        torch.set_num_threads(threads)
        program, names = _load(folder)
        return ProgramSession(program.module(), names)

    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        """Read back the parameters and buffers of the program."""
        program, _ = _load(folder)
        return stored_floats(dict(program.state_dict))

    def load_snippet(self, task: Task) -> str:
        """Return the lines with which a user opens the program."""
        arguments = ", ".join(f'inputs["{name}"]' for name in task.input_axes)
        return (
            "import torch\n\n"
            f'program = torch.export.load("path/to/{PROGRAM_FILE}").module()\n'
            f"({task.output},) = program({arguments})\n"
        )


def cast_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose stored floating-point tensors are `dtype`.

    Tensors that are computed and not stored (the frequencies of rotary positions) keep their precision, as they do
    when transformers opens a model in `dtype`.
    """
    cast = copy.deepcopy(module).eval()
    for tensor in cast.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return cast


def refuse_quantized(candidate: Candidate, kind: str) -> None:
    """Raise RuntimeUnavailable when a candidate holds codes or rounds what goes into its layers or caches."""
    if decided := candidate.quantized or candidate.activations or candidate.caches:
        name = next(iter(decided))
        raise RuntimeUnavailable(
            f"{name} is quantized, but {FLOATS_ONLY.format(kind)}", "use the runtime torch, onnxruntime or openvino"
        )


def varied_example(request: ExportRequest) -> Arrays:
    """Return the example with every varying axis at least 2 long."""
    example = {}
    for name, array in request.example.items():
        for axis in request.axes.get(name, {}):
            if array.shape[axis] == 1:
                array = np.repeat(array, 2, axis=axis)
        example[name] = np.ascontiguousarray(array)
    return example


def stored_floats(tensors: dict[str, Tensor]) -> list[StoredTensor]:
    """Return how floating-point tensors are stored, names as in the model, tensors that share memory once."""
    stored, seen = [], set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        dtype, size = str(tensor.dtype).removeprefix("torch."), tensor.element_size()
        bits = 8 * size if tensor.is_floating_point() else 0
        shape = tuple(tensor.shape)
        stored.append(StoredTensor(name.removeprefix("model."), dtype, bits, None, True, shape, tensor.numel() * size))
    return sorted(stored, key=lambda tensor: tensor.name)


def _refuse_pickle(path: Path) -> None:
    """Raise ArtifactError when torch.export.load would unpickle anything: plain tensors and graphs never need it."""
    if not zipfile.is_zipfile(path):
        raise ArtifactError(f"{path} is no torch.export program", "write the artifact again")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            kind = entry.filename.rpartition("/")[2]
            unsafe = kind.startswith(("custom_obj_", "opaque_obj_"))
            if kind.endswith("_config.json"):
                payloads = json.loads(archive.read(entry)).get("config", {}).values()
                unsafe = any(payload.get("use_pickle") for payload in payloads)
            if unsafe:
                raise ArtifactError(f"{path} holds pickled objects ({entry.filename}), which are never loaded")


def _load(folder: Path) -> tuple[ExportedProgram, str]:
    _refuse_pickle(folder / PROGRAM_FILE)
    extra: dict[str, Any] = {NAMES_FILE: ""}
    program = torch.export.load(io.BytesIO((folder / PROGRAM_FILE).read_bytes()), extra_files=extra)
    return program, extra[NAMES_FILE]
