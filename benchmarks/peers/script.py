"""What every peer's script does around its own tool: arguments, a timed part, opening again, scoring, one line of JSON.

    python benchmarks/peers/NAME.py --model DIR --calibration FILE.npy --eval FILE.npz --recipe RECIPE --work DIR

`--calibration` holds token ids [N, tokens] int64, `--eval` an array `windows` [N, tokens] of them. The script makes its
files under WORK/made, then replaces itself by a fresh process that opens them, recomputes the original's logits beside
theirs, and prints the result, which is also WORK/result.json. Needs numpy, and torch and transformers for scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data"}
MADE, HALF, RESULT = "made", "made.json", "result.json"
SEED = 0
MIB = 2**20


@dataclass
class Job:
    """Hold what a script is given, and what it measures of itself.

    `calibration_NT` are token ids, `out` the empty folder for its files, `threads` what its runtime may use.
    """

    model: Path
    calibration_NT: NDArray[np.int64]
    recipe: Mapping[str, Any]
    out: Path
    threads: int
    quick: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    child_peak_bytes: int = 0

    @contextmanager
    def timed(self, part: str = "quantizing") -> Iterator[None]:
        """Add the seconds inside to what this part took: loading and saving stay outside."""
        began = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began

    def iterations(self, asked: int) -> int:
        """Return how many iterations to make: as asked, or one to see whether the script works at all."""
        return 1 if self.quick else asked


Recipes = Mapping[str, Mapping[str, Any]]
Reopen = Callable[[Job], Callable[[NDArray[np.int64]], Any]]


def run(
    recipes: Recipes,
    quantize: Callable[[Job], None],
    reopen: Reopen,
    *,
    packages: Sequence[str],
    with_torch: bool = True,
) -> int:
    """Carry out the command line with one tool's functions; return the exit status.

    `quantize` makes files and times itself with `job.timed()`; `reopen` returns token ids [tokens] -> logits
    [tokens, V] from the files alone. `packages` are those whose versions the result names. `with_torch` False:
    quantizing goes without torch, whose memory would count.
    """
    arguments = _arguments(recipes)
    work: Path = arguments.work
    job = Job(
        model=arguments.model,
        calibration_NT=np.load(arguments.calibration),
        recipe=recipes[arguments.recipe],
        out=work / MADE,
        threads=arguments.threads,
        quick=arguments.quick,
    )
    if not arguments.score:
        shutil.rmtree(job.out, ignore_errors=True)
        job.out.mkdir(parents=True)
        if with_torch:
            _settle_torch(job.threads)
        quantize(job)
        half = {"seconds": job.seconds["quantizing"], "parts": job.seconds}
        half |= {"peak_mib": max(_peak_bytes(), job.child_peak_bytes) / MIB}
        (work / HALF).write_text(json.dumps(half))
        sys.stdout.flush()
        # a fresh process: what is scored comes from the files, not from what is still in memory
        os.execv(sys.executable, [sys.executable, *sys.argv, "--score"])
    _settle_torch(job.threads)
    from scoring import score

    windows = np.load(arguments.evaluation)["windows"]
    scores = score(original_logits(job.model), reopen(job), windows)
    result = {
        "recipe": arguments.recipe,
        "bytes": weight_bytes(job.out),
        **json.loads((work / HALF).read_text()),
        **scores.figures(),
        "by_window": vars(scores),
        "calibration": list(job.calibration_NT.shape),
        "versions": {"python": platform.python_version(), **_versions(("torch", "transformers", *packages))},
    }
    line = json.dumps(result)
    (work / RESULT).write_text(line)
    print(line)
    return 0


def faster_dtype() -> Any:
    """Return bfloat16, or float32 where this processor multiplies that at least as fast (it has no bf16 units)."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        taken = []
        for _ in range(5):
            began = time.monotonic()
            left @ right
            taken.append(time.monotonic() - began)
        return min(taken)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def original_logits(model: Path) -> Callable[[NDArray[np.int64]], Any]:
    """Return token ids [tokens] -> logits [tokens, V] of the original, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return torch_logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))


def torch_logits(network: Any) -> Callable[[NDArray[np.int64]], Any]:
    """Return token ids [tokens] -> logits [tokens, V] of a transformers model."""
    import torch

    network.eval()

    @torch.inference_mode()
    def logits(window: NDArray[np.int64]) -> Any:
        return network(input_ids=torch.from_numpy(window)[None], use_cache=False).logits[0]

    return logits


def weight_bytes(folder: Path) -> int:
    """Count the bytes of files that hold weights (OpenVINO's .bin included)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix in WEIGHTS)


def _arguments(recipes: Recipes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help=".npy, token ids [N, tokens] int64")
    parser.add_argument("--eval", type=Path, required=True, dest="evaluation", help=".npz with `windows` [N, tokens]")
    parser.add_argument("--recipe", required=True, choices=sorted(recipes))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one iteration: does the script work at all?")
    parser.add_argument("--score", action="store_true", help="only open and score what was made")
    return parser.parse_args()


def _settle_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    np.random.seed(SEED)


def _peak_bytes() -> int:
    """Return the most bytes of this process that were ever resident."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss there begins with what the parent held when it made this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
