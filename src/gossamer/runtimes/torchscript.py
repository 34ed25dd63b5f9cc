"""TorchScript archives (.pt): a traced graph with its float weights, for C++ and older PyTorch installations.

torch.jit is deprecated in favour of torch.export (torch_export.py) but still what many servers load. A trace records
one run: values that Python computes from shapes become constants, so the archive is run on a second shape before it is
kept, and refused if it answers differently from the model there.

Byte-identical archives need two measures. TorchScript numbers class names (`___torch_mangle_7`) with a counter that
lives as long as the process, except for names that it sees for the first time: so the model is traced twice, the
second trace numbers every class, and the numbers are counted anew from 0. Debug records hold paths of this machine's
source files and are left out.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from gossamer.errors import ArtifactError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.runtimes.base import ExportRequest, Runtime, Session, StoredTensor
from gossamer.runtimes.torch_export import (
    FLOATS_ONLY,
    NAMES_FILE,
    ProgramSession,
    Served,
    refuse_quantized,
    stored_floats,
    varied_example,
)
from gossamer.tasks.base import Arrays, Task

SCRIPT_FILE = "model.pt"
MANGLED = re.compile(rb"___torch_mangle_(\d+)")


class TorchScript(Runtime):
    """Write and open TorchScript archives of unquantized and cast models."""

    name: ClassVar[str] = "torchscript"
    files: ClassVar[tuple[str, ...]] = (SCRIPT_FILE,)
    opens_with_task: ClassVar[bool] = False

    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        """Return why a layer cannot be held like this: floating point only."""
        return FLOATS_ONLY.format("TorchScript") if spec or activation else None

    def stored_bytes(self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype_bytes: int) -> int:
        """Return the bytes of one parameter in the file."""
        return int(np.prod(shape, dtype=np.int64)) * dtype_bytes

    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        """Write model.pt. Raises ArtifactError when the trace answers differently on another shape."""
        refuse_quantized(candidate, "TorchScript")
        served = Served(candidate, request.outputs, tuple(request.example))
        example = varied_example(request)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, and one line for each shape that becomes a constant
            for _ in range(2):
                traced = torch.jit.trace(served, _tensors(example), check_trace=False)  # type: ignore[no-untyped-call]
        _check_other_shape(served, traced, _longer(example, request))
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files={NAMES_FILE: served.names()})
        (folder / SCRIPT_FILE).write_bytes(canonical_archive(buffer.getvalue()))

    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> Session:
        """Open an archive in this process."""
        torch.set_num_threads(threads)
        module, names = _load(folder)
        return ProgramSession(module, names)

    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        """Read back the parameters and buffers of the archive."""
        return stored_floats(_load(folder)[0].state_dict())

    def load_snippet(self, task: Task) -> str:
        """Return the lines with which a user opens the archive."""
        arguments = ", ".join(f'inputs["{name}"]' for name in task.input_axes)
        return (
            f'import torch\n\nmodel = torch.jit.load("path/to/{SCRIPT_FILE}")\n({task.output},) = model({arguments})\n'
        )


def canonical_archive(archive: bytes) -> bytes:
    """Return a TorchScript archive with classes numbered from 0, and without debug records and clock times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        names = [name for name in source.namelist() if not name.endswith((".debug_pkl", "serialization_id"))]
        numbers = sorted({int(number) for name in names for number in MANGLED.findall(name.encode())})
        order = {number: index for index, number in enumerate(numbers)}
        for name in sorted(names, key=lambda name: (not name.endswith("/version"), _renumber(name.encode(), order))):
            content = source.read(name)
            if name.endswith((".py", "/data.pkl")):
                content = _renumber(content, order)
            target.writestr(zipfile.ZipInfo(_renumber(name.encode(), order).decode()), content)
    return buffer.getvalue()


def _renumber(text: bytes, order: dict[int, int]) -> bytes:
    return MANGLED.sub(lambda match: b"___torch_mangle_%d" % order[int(match[1])], text)


def _tensors(arrays: Arrays) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays.values())


def _longer(example: Arrays, request: ExportRequest) -> Arrays:
    """Return the example with one more entry along every varying axis: its first one again."""
    longer = dict(example)
    for name, axes in request.axes.items():
        for axis in axes if name in longer else ():
            first = np.take(longer[name], [0], axis=axis)
            longer[name] = np.ascontiguousarray(np.concatenate([longer[name], first], axis=axis))
    return longer


def _check_other_shape(served: Served, traced: Any, inputs: Arrays) -> None:
    with torch.no_grad():
        expected, found = served(*_tensors(inputs)), traced(*_tensors(inputs))
    for want, got in zip(expected, found, strict=True):
        difference = float((want - got).abs().max()) if want.shape == got.shape else float("inf")
        if not difference <= 1e-3 * max(1.0, float(want.abs().max())):
            shapes = {name: array.shape for name, array in inputs.items()}
            raise ArtifactError(
                f"the trace answers differently from the model on inputs {shapes}: by {difference:.3g}",
                "use the runtime torch-export, which keeps varying shapes",
            )


def _load(folder: Path) -> tuple[torch.jit.ScriptModule, str]:
    extra: dict[str, Any] = {NAMES_FILE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(folder / SCRIPT_FILE), _extra_files=extra)  # type: ignore[no-untyped-call]
    names = extra[NAMES_FILE]
    return module, names.decode() if isinstance(names, bytes) else names
