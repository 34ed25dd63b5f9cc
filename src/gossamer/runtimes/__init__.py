"""Runtimes: one file each. They write an artifact, open it, run it, and say what the file holds.

A runtime is looked up by name and imported only then, so that a missing extra costs nothing until it is asked for.
"""

from __future__ import annotations

from importlib import import_module

from gossamer.errors import RuntimeUnavailable
from gossamer.runtimes.base import Runtime

RUNTIMES: dict[str, str] = {
    "torch": "gossamer.runtimes.torch_folder:TorchFolder",
    "onnxruntime": "gossamer.runtimes.onnxruntime:OnnxRuntime",
    "openvino": "gossamer.runtimes.openvino:OpenVino",
    "gguf": "gossamer.runtimes.gguf:Gguf",
    "torch-export": "gossamer.runtimes.torch_export:TorchExport",
    "torchscript": "gossamer.runtimes.torchscript:TorchScript",
}


def get_runtime(name: str) -> Runtime:
    """Return the runtime called `name`, ready to write and open artifacts.

    Raises RuntimeUnavailable when no runtime has that name, or when a package that it needs is not installed.

    >>> get_runtime("torch").name
    'torch'
    """
    runtime = _load(name)
    package = runtime.missing()
    if package is not None:
        raise RuntimeUnavailable(f"runtime {name!r} needs {package}, which is not installed", install_hint(runtime))
    return runtime


def available_runtimes() -> dict[str, str | None]:
    """Return every runtime by name with the command that makes it usable here, or None when it is usable already.

    >>> available_runtimes()["torch"] is None
    True
    """
    runtimes = {name: _load(name) for name in RUNTIMES}
    return {name: install_hint(runtime) if runtime.missing() else None for name, runtime in runtimes.items()}


def install_hint(runtime: Runtime) -> str:
    """Return the pip command that brings what a runtime needs."""
    return f'pip install "gossamer[{runtime.extra}]"' if runtime.extra else "pip install gossamer"


def _load(name: str) -> Runtime:
    if name not in RUNTIMES:
        known = ", ".join(RUNTIMES)
        raise RuntimeUnavailable(f"unknown runtime {name!r}", f"known runtimes: {known}")
    module_name, class_name = RUNTIMES[name].split(":")
    runtime_class: type[Runtime] = getattr(import_module(module_name), class_name)
    return runtime_class()
