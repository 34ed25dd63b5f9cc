"""A small real runtime for tests of the child process: one linear layer in a safetensors file, run by numpy."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from gossamer.errors import ArtifactError
from gossamer.runtimes.base import ExportRequest, Runtime, Session, StoredTensor

if TYPE_CHECKING:
    from gossamer.models.candidate import Candidate
    from gossamer.models.quantized import ActivationSpec, QuantSpec
    from gossamer.tasks.base import Arrays, Task


class LinearSession(Session):
    def __init__(self, weight: NDArray[Any], threads: int) -> None:
        self.weight = weight
        self.threads = threads

    def run(self, inputs: Arrays) -> Arrays:
        if "sleep" in inputs:
            time.sleep(float(inputs["sleep"]))
        if "crash" in inputs:
            sys.stderr.write("about to crash\n")
            sys.stderr.flush()
            os.abort()
        if "allocate" in inputs:
            ballast = np.ones(int(inputs["allocate"]), dtype=np.uint8)
            return {"bytes": np.array([int(ballast.sum())])}
        print("a library prints to standard output")  # noqa: T201 - this is what must not reach the pipe
        os.write(1, b"and so does C code\n")
        return {
            "logits": inputs["x"] @ self.weight.T,
            "threads": np.array([self.threads, int(os.environ["OMP_NUM_THREADS"])]),
            "cpus": np.array(sorted(os.sched_getaffinity(0))),
            "torch": np.array(["torch" in sys.modules]),
            "offline": np.array([int(os.environ["HF_HUB_OFFLINE"])]),
        }


class LinearRuntime(Runtime):
    name = "linear"
    files = ("model.safetensors",)

    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        return None

    def stored_bytes(self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype_bytes: int) -> int:
        return int(np.prod(shape)) * dtype_bytes

    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        raise NotImplementedError("the tests write the file themselves")

    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> Session:
        if not (folder / "model.safetensors").exists():
            raise ArtifactError(f"no model.safetensors in {folder}", "write the artifact first")
        return LinearSession(load_file(folder / "model.safetensors")["weight"], threads)

    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        return []

    def load_snippet(self, task: Task) -> str:
        return ""
