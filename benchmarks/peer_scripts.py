"""Run the scripts in peers/, one recipe after another, each tool in its own environment, and keep what they found.

A result is WORK/TOOL-RECIPE/result.json with the request that it answers beside it: the same request is not carried
out twice, a failure is tried again. A tool whose environment cannot be made is a failure of all its recipes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import named, say

SCRIPTS = Path(__file__).resolve().parent / "peers"
sys.path.append(str(SCRIPTS))  # its modules stand alone, to be imported by any interpreter

import make_envs  # noqa: E402

TITLES = {
    "llmcompressor": "llm-compressor",
    "gptqmodel": "GPTQModel",
    "autoround": "AutoRound",
    "hqq": "HQQ",
    "torchao": "torchao",
    "openvino": "OpenVINO + NNCF",
    "llamacpp": "llama.cpp",
}
REASON = 300  # characters of a failure that the table shows
KEEP_LOG = 20_000


@dataclass(frozen=True)
class Outcome:
    """Hold a recipe's result as its script printed it, or why there is none."""

    label: str
    result: Mapping[str, Any] | None = None
    failure: str = ""


@dataclass(frozen=True)
class Inputs:
    """Hold what every script is given: `calibration` is an .npy of token ids, `evaluation` an .npz with `windows`."""

    model: Path
    fingerprint: str
    calibration: Path
    evaluation: Path
    envs: Path
    work: Path
    threads: int
    quick: bool

    def request(self, tool: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a result depends on."""
        return {
            "model": self.fingerprint,
            "calibration": hashlib.sha256(self.calibration.read_bytes()).hexdigest(),
            "evaluation": hashlib.sha256(self.evaluation.read_bytes()).hexdigest(),
            "environment": make_envs.asked_of(tool),
            "recipe": dict(recipe),
            "threads": self.threads,
            "quick": self.quick,
        }


def recipes_of(tool: str) -> Mapping[str, Mapping[str, Any]]:
    """Return a tool's recipes by name, from its script."""
    found: Mapping[str, Mapping[str, Any]] = importlib.import_module(f"with_{tool}").RECIPES
    return found


def run_tool(tool: str, inputs: Inputs, only: list[str] | None) -> list[Outcome]:
    """Return one outcome for each of a tool's recipes whose label contains one of `only` (None: all)."""
    labels = {name: f"{TITLES[tool]} {name}" for name in recipes_of(tool)}
    chosen = [name for name, label in labels.items() if only is None or any(named(label, part) for part in only)]
    if not chosen:
        return []
    try:
        say(f"environment of {tool}")
        make_envs.make(tool, inputs.envs / tool, inputs.threads)
    except make_envs.EnvironmentFailed as error:
        say(f"{tool}: {error}")
        return [Outcome(labels[name], failure=f"no environment: {short(str(error))}") for name in chosen]
    return [run_recipe(tool, name, labels[name], inputs) for name in chosen]


def run_recipe(tool: str, name: str, label: str, inputs: Inputs) -> Outcome:
    """Return a recipe's outcome, from an earlier run of the same request where there is one."""
    work = inputs.work / f"{tool}-{name}"
    asked, found = work / "request.json", work / "result.json"
    request = json.dumps(inputs.request(tool, recipes_of(tool)[name]), indent=1, sort_keys=True)
    if found.exists() and asked.exists() and asked.read_text() == request:
        say(f"kept {label}")
        return Outcome(label, json.loads(found.read_text()))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say(f"running {label}")
    command: list[object] = [make_envs.python_of(inputs.envs / tool), SCRIPTS / f"with_{tool}.py"]
    command += ["--model", inputs.model, "--calibration", inputs.calibration, "--eval", inputs.evaluation]
    command += ["--recipe", name, "--work", work, "--threads", inputs.threads, *(["--quick"] if inputs.quick else [])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(inputs.threads))
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)  # what lies there is for our interpreter
    # in its own folder: a tool may leave logs where it is started
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, cwd=work)
    (work / "log.txt").write_text(done.stdout[-KEEP_LOG:] + done.stderr[-KEEP_LOG:], encoding="utf-8")
    if done.returncode or not found.exists():
        reason = short(done.stderr) or f"status {done.returncode}"
        say(f"{label} failed: {reason}")
        return Outcome(label, failure=reason)
    asked.write_text(request)
    return Outcome(label, json.loads(found.read_text()))


def short(message: str) -> str:
    """Return the last line that says something, fit for a cell of a table."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][-REASON:].replace("|", "/") if lines else ""
