"""Make one peer's files in a process of its own, so that seconds and peak memory are that peer's alone.

    python benchmarks/build.py REQUEST.json      # {"peer": {...}, "material": {...}, "out": FOLDER, "reply": FILE}

The process may belong to another environment than ours: it needs this folder and what the peer imports, no more.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer import Material, Peer

STDERR_TAIL = 2000


class BuildError(Exception):
    """Say that a peer did not make its files, with the end of what it said."""


@dataclass(frozen=True)
class Built:
    """Hold where a peer's files lie, and what making them took: seconds, and bytes resident at the peak."""

    folder: Path
    seconds: float
    peak_bytes: int


def build_in_child(
    peer: Peer,
    material: Material,
    out: Path,
    python: str = sys.executable,
    *,
    reuse: bool = False,
    limit: float | None = None,
) -> Built:
    """Return the peer's files in `out`, made anew, or kept with `reuse` when the same request was finished before.

    Raises BuildError when the peer fails, or is not done after `limit` seconds.
    """
    request, reply = out.with_suffix(".request.json"), out.with_suffix(".reply.json")
    named = {"peer": peer.described(), "material": asdict(material), "out": str(out), "reply": str(reply)}
    if peer.ours:  # a peer's version is part of its environment
        from gossamer.run.fingerprint import code_version

        named["code"] = code_version()
    asked = json.dumps(named, indent=1)
    if reuse and reply.exists() and request.read_text() == asked:
        return Built(out, **json.loads(reply.read_text()))
    reply.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    request.write_text(asked)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, str(Path(__file__).resolve()), str(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{peer.label} was not done after {limit:g} s") from error
    if done.returncode:
        raise BuildError(f"{peer.label} failed (status {done.returncode}):\n{done.stderr[-STDERR_TAIL:].strip()}")
    return Built(out, **json.loads(reply.read_text()))


def main() -> None:
    """Carry out the request named on the command line."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    peer = remade(asked["peer"])
    began = time.monotonic()
    own_seconds = peer.quantize(Material(**asked["material"]), Path(asked["out"]))
    seconds = time.monotonic() - began if own_seconds is None else own_seconds
    kibibytes = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes
    Path(asked["reply"]).write_text(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def remade(described: dict[str, Any]) -> Peer:
    """Return the peer that `Peer.described` described."""
    module, _, name = described["class"].partition(":")
    peer: Peer = getattr(importlib.import_module(module), name)(**described["settings"])
    return peer


if __name__ == "__main__":
    main()
