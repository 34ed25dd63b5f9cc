"""What is compared: a peer makes files from a model, and a runtime class opens them in a child process of its own.

A peer is one frozen dataclass: its fields are its settings, `needs` the packages it imports, `runtime` what serves its
files (a name that gossamer knows, or `module:Class` of a class with `open`, as here). `quantize` runs in a process of
its own (build.py), which may belong to another environment: it imports what it needs inside and reads only `Material`.
The classes that open files are as plain as a user's own code would be, and import their library only when they open.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

GRAPH = "model.onnx"
EXPORTED = "exported"  # the folder beside it with the graph before constants were folded
IR = "openvino_model.xml"
INT8_DOT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")


@dataclass(frozen=True)
class Material:
    """Hold what a peer may use: the model's folder, its float32 ONNX graph, calibration inputs, and where rows lie.

    `graph` is a folder with `model.onnx` (None while it is being made); `inputs` an .npz with arrays
    `INDEX.NAME` [1, tokens]; `data` and `evaluation` the row files that the inputs were read from (`evaluation` None:
    held out from `data`).
    """

    model: str
    graph: str | None
    inputs: str
    data: str
    evaluation: str | None
    task: str
    task_settings: Mapping[str, Any]
    calibration_rows: int

    def calibration(self) -> list[dict[str, Any]]:
        """Return the calibration inputs in order: name -> int64 array [1, tokens]."""
        import numpy as np

        found: dict[int, dict[str, Any]] = {}
        with np.load(self.inputs) as arrays:
            for key in arrays.files:
                index, _, name = key.partition(".")
                found.setdefault(int(index), {})[name] = arrays[key]
        return [found[index] for index in sorted(found)]

    def graph_file(self, *, folded: bool = True) -> Path:
        """Return the path of the float32 ONNX file: with constants folded, or as it was exported."""
        assert self.graph is not None  # only the peer that makes it goes without
        return Path(self.graph) / GRAPH if folded else Path(self.graph) / EXPORTED / GRAPH


class Peer(ABC):
    """Make small files from a model the way one tool does. Subclasses are frozen dataclasses."""

    needs: ClassVar[tuple[str, ...]]
    uses_graph: ClassVar[bool] = False  # the export's seconds count as this peer's too
    ours: ClassVar[bool] = False

    @property
    @abstractmethod
    def label(self) -> str:
        """Return what the table calls it."""

    @property
    @abstractmethod
    def runtime(self) -> str:
        """Return what serves its files."""

    @abstractmethod
    def quantize(self, material: Material, out: Path) -> float | None:
        """Write the files into `out` (there, and empty); return the seconds if they are not those of the whole call."""

    def available(self) -> bool:
        """Say whether its packages are installed here."""
        return not self.missing()

    def missing(self) -> list[str]:
        """Return the packages that are not installed here."""
        return [package for package in self.needs if find_spec(package) is None]

    def described(self) -> dict[str, Any]:
        """Return what build.py makes this object from again."""
        kind = type(self)
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "settings": asdict(self)}  # type: ignore[call-overload]


def has_int8_dot() -> bool:
    """Say whether this processor adds products of 8-bit numbers exactly (VNNI and its kin): if not, 7 bits are safe."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & set(INT8_DOT))


class OnnxFile:
    """Open `model.onnx` with ONNX Runtime's defaults."""

    def open(self, folder: Path, *, threads: int, task: Any = None) -> OnnxFileSession:
        """Open the file with `threads` threads."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
        return OnnxFileSession(session)


class OnnxFileSession:
    """Run an ONNX Runtime session on arrays."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outputs by name."""
        found = self._session.run(self._outputs, {name: inputs[name] for name in self._inputs})
        return dict(zip(self._outputs, found, strict=True))


class OpenVinoFile:
    """Open an IR with OpenVINO's CPU plugin and its latency hint."""

    settings: ClassVar[dict[str, Any]] = {}

    def open(self, folder: Path, *, threads: int, task: Any = None) -> OpenVinoFileSession:
        """Compile the model for `threads` threads."""
        import openvino as ov

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **self.settings}
        return OpenVinoFileSession(ov.Core().compile_model(folder / IR, "CPU", settings))


class OpenVinoFloat32File(OpenVinoFile):
    """The same, computing in float32 where the processor would take bfloat16 of its own accord."""

    settings: ClassVar[dict[str, Any]] = {"INFERENCE_PRECISION_HINT": "f32"}


class OpenVinoFileSession:
    """Run a compiled OpenVINO model on arrays."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._inputs = [port.any_name for port in compiled.inputs]
        self._outputs = [(port.any_name, port) for port in compiled.outputs]

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outputs by name, as copies: the request's own memory is used again."""
        found = self._request.infer({name: inputs[name] for name in self._inputs}, share_inputs=True)
        return {name: found[port].copy() for name, port in self._outputs}


class TorchDynamicInt8:
    """Open a Hugging Face folder in PyTorch and let it round its linear layers: int8 weights, dynamic int8 inputs.

    It has no file format but pickle, so the folder is the original's, and rounding is part of opening.
    """

    def open(self, folder: Path, *, threads: int, task: Any) -> TorchModuleSession:
        """Open and round the model of the task's class."""
        import warnings

        import torch
        import transformers

        torch.set_num_threads(threads)
        module = getattr(transformers, task.auto_class).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch points to torchao, which is not this peer
            rounded = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
                module.eval(), {torch.nn.Linear}, dtype=torch.qint8
            )
        return TorchModuleSession(rounded, task.output)


class TorchModuleSession:
    """Run a module of transformers on arrays."""

    def __init__(self, module: Any, output: str) -> None:
        self._module = module
        self._output = output

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scored output."""
        import torch

        with torch.inference_mode():
            found = self._module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {self._output: found[self._output].float().numpy()}
