"""Make one virtual environment for each peer: these tools pin each other's dependencies away, so none shares ours.

    python benchmarks/peers/make_envs.py --envs .demo/peers [--only hqq torchao]

torch comes first and alone (pip then takes the build that its configuration prefers), and stays: it is a constraint on
all that follows. A finished environment has `made.json` (requirements, versions found, seconds); one that could not be
made has `failed.txt` with the reason, which the benchmark puts into its table. Either is kept until `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"
COMMON = ("numpy", "safetensors", "setuptools", "wheel")
TRANSFORMERS = "transformers==5.23.0"
ACCELERATE = "accelerate==1.15.0"
LLAMA = "llama-cpp-python==0.3.36"
MADE, FAILED = "made.json", "failed.txt"
LOG_TAIL = 1500


class EnvironmentFailed(Exception):
    """Say which command failed, with the end of what it said."""


@dataclass(frozen=True)
class Environment:
    """List what pip installs, in order: each tuple is one call. `finish` does what pip cannot."""

    calls: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[Path, int], None] | None = None


def build_llama_tools(folder: Path, jobs: int) -> None:
    """Build llama.cpp's own tools and shared libraries from the source package of llama-cpp-python.

    The Python package is installed without a library of its own (one build, not two): scoring names the folder.
    """
    source = folder / "source"
    source.mkdir(exist_ok=True)
    # only this package from source, with the build tools that are here: pip would compile those too
    given = ("--no-deps", "--no-build-isolation", "--no-binary", LLAMA.partition("==")[0])
    _python(folder, "-m", "pip", "download", "-q", *given, "-d", str(source), LLAMA)
    archive = next(source.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(source, filter="data")
    llama = next(source.glob("*/vendor/llama.cpp"))
    (folder / "llama.cpp").unlink(missing_ok=True)
    (folder / "llama.cpp").symlink_to(llama.resolve())
    build = folder / "llama-build"
    switches = ("LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF")
    switches += ("LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_TOOLS=ON", "BUILD_SHARED_LIBS=ON", "CMAKE_BUILD_TYPE=Release")
    _run(folder, ["cmake", "-S", str(llama), "-B", str(build), *(f"-D{switch}" for switch in switches)])
    wanted = ("llama-quantize", "llama-imatrix")
    _run(folder, ["cmake", "--build", str(build), "-j", str(jobs), "--target", *wanted])


ENVIRONMENTS: Mapping[str, Environment] = {
    "torchao": Environment(((TRANSFORMERS, ACCELERATE, "torchao==0.18.0"),)),
    "hqq": Environment(((TRANSFORMERS, ACCELERATE, "hqq==0.2.8.post1"),)),
    "openvino": Environment(((TRANSFORMERS, ACCELERATE, "openvino==2026.4.1", "nncf==3.4.0"),)),
    "autoround": Environment(((ACCELERATE, "auto-round==0.16.1"),)),
    "llmcompressor": Environment((("llmcompressor==0.14.0.1",),)),
    "gptqmodel": Environment((("gptqmodel==7.6.0",),)),
    "llamacpp": Environment(
        (
            (TRANSFORMERS, "gguf==0.19.0", "sentencepiece", "scikit-build-core", "cmake"),
            ("--no-build-isolation", LLAMA),
        ),
        {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"},
        build_llama_tools,
    ),
}


def python_of(folder: Path) -> Path:
    """Return an environment's interpreter."""
    return folder / "bin" / "python"


def asked_of(name: str) -> dict[str, Any]:
    """Return what the environment `name` is made from, as JSON values."""
    return {"torch": TORCH, "calls": [list(call) for call in ENVIRONMENTS[name].calls]}


def make(name: str, folder: Path, jobs: int, *, again: bool = False) -> None:
    """Make the environment `name` in `folder`, unless an earlier call did. Raises EnvironmentFailed."""
    environment = ENVIRONMENTS[name]
    asked = asked_of(name)
    made, failed = folder / MADE, folder / FAILED
    if not again and made.exists() and json.loads(made.read_text())["asked"] == asked:
        return
    if not again and failed.exists():
        raise EnvironmentFailed(failed.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        _run(folder, [sys.executable, "-m", "venv", str(folder)])
        constraints = folder / "constraints.txt"
        constraints.write_text(TORCH + "\n")
        _pip(folder, {}, TORCH)
        _pip(folder, {}, *COMMON)
        for call in environment.calls:
            _pip(folder, environment.variables, "-c", str(constraints), *call)
        if environment.finish is not None:
            environment.finish(folder, jobs)
    except EnvironmentFailed as error:
        failed.write_text(str(error))
        raise
    frozen = _python(folder, "-m", "pip", "list", "--format", "json")
    versions = {entry["name"]: entry["version"] for entry in json.loads(frozen)}
    made.write_text(json.dumps({"asked": asked, "seconds": time.monotonic() - began, "versions": versions}, indent=1))


def _pip(folder: Path, variables: Mapping[str, str], *arguments: str) -> None:
    quiet = ("--disable-pip-version-check", "--no-input", "install", "-q", "--progress-bar", "off", "--no-compile")
    _python(folder, "-m", "pip", *quiet, *arguments, variables=variables)


def _python(folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    return _run(folder, [str(python_of(folder)), *arguments], variables or {})


def _run(folder: Path, command: list[str], variables: Mapping[str, str] | None = None) -> str:
    """Run a command; return its standard output. What it says is also in the environment's `log.txt`."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(variables or {})})
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        shown = " ".join(command[-3:])
        raise EnvironmentFailed(f"`{shown}` failed (status {done.returncode}): {done.stderr.strip()[-LOG_TAIL:]}")
    return done.stdout


def main() -> int:
    """Make the environments that are asked for; return 1 when one of them could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", type=Path, default=Path(".demo/peers"), help="where the environments are made")
    parser.add_argument("--only", nargs="+", choices=sorted(ENVIRONMENTS), default=list(ENVIRONMENTS), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="make anew what is there, failures too")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    arguments = parser.parse_args()
    failures = 0
    for name in arguments.only:
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        try:
            make(name, arguments.envs.resolve() / name, arguments.jobs, again=arguments.again)
        except EnvironmentFailed as error:
            failures += 1
            print(f"{name}: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
