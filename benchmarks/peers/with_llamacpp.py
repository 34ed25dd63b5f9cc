"""llama.cpp: its GGUF types, chosen with its importance matrix, made by its own tools and served by its own kernels.

Seconds are those of the importance matrix and of quantizing; converting to GGUF is loading. The matrix comes from the
calibration windows' text, which the tool cuts into tokens again. What is scored includes what the kernels do to
inputs (8-bit codes in blocks): llama.cpp has no other arithmetic for these types.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from script import Job, run

TYPES = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q3_K_M", "Q3_K_S", "Q2_K")
RECIPES = {
    "Q8_0": {"type": "Q8_0"},
    **{f"{name}-imatrix": {"type": name, "imatrix": True} for name in TYPES},
}
ENVIRONMENT = Path(sys.prefix)
TOOLS = ENVIRONMENT / "llama-build" / "bin"
FILE = "model.gguf"


def quantize(job: Job) -> None:
    """Write a GGUF file."""
    work = job.out.parent
    whole = work / "float32.gguf"
    converter = ENVIRONMENT / "llama.cpp" / "convert_hf_to_gguf.py"
    tool([sys.executable, converter, job.model, "--outfile", whole, "--outtype", "f32"])
    chosen = ["--imatrix", importance_matrix(job, whole)] if job.recipe.get("imatrix") else []
    with job.timed():
        peak = tool([TOOLS / "llama-quantize", *chosen, whole, job.out / FILE, job.recipe["type"], job.threads])
    job.child_peak_bytes = max(job.child_peak_bytes, peak)
    whole.unlink()


def importance_matrix(job: Job, whole: Path) -> Path:
    """Return the file of the importance matrix, which is made once for all types; each is charged with what it took."""
    key = hashlib.sha256(f"{job.model} {job.threads}".encode() + job.calibration_NT.tobytes()).hexdigest()[:12]
    matrix = job.out.parent.parent / f"imatrix-{key}.gguf"
    taken, text = matrix.with_suffix(".json"), job.out.parent / "calibration.txt"
    if not taken.exists():
        text.write_text(calibration_text(job), encoding="utf-8")
        windows, context = job.calibration_NT.shape
        asked = ["-m", whole, "-f", text, "-o", matrix, "-c", context, "-b", context, "-ub", context]
        began = time.monotonic()
        peak = tool([TOOLS / "llama-imatrix", *asked, "--chunks", windows, "-t", job.threads, "--no-ppl"])
        taken.write_text(json.dumps({"seconds": time.monotonic() - began, "peak": peak}))
        text.unlink()
    found = json.loads(taken.read_text())
    job.seconds["importance matrix"] = found["seconds"]
    job.seconds["quantizing"] = job.seconds.get("quantizing", 0.0) + found["seconds"]
    job.child_peak_bytes = max(job.child_peak_bytes, found["peak"])
    return matrix


def calibration_text(job: Job) -> str:
    """Return the text of the calibration windows, one after the other."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.model / "tokenizer.json"))
    return "".join(tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in job.calibration_NT)


def tool(command: list[Any]) -> int:
    """Run one of llama.cpp's programs; return the most bytes that it held. Raises RuntimeError with what it said."""
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed (status {process.returncode}): {said[-1500:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reopen(job: Job) -> Callable[[Any], Any]:
    """Open the file with llama.cpp, keys and values in float32."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(TOOLS)  # the package has no library of its own here
    import llama_cpp

    context = job.calibration_NT.shape[1]
    served = llama_cpp.Llama(
        str(job.out / FILE),
        n_ctx=context,
        n_batch=context,
        n_ubatch=context,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def logits(window: Any) -> Any:
        served.reset()
        served.eval(window.tolist())
        return np.array(served.scores[: len(window)], dtype=np.float32)

    return logits


if __name__ == "__main__":
    sys.exit(run(RECIPES, quantize, reopen, packages=("llama-cpp-python", "gguf"), with_torch=False))
