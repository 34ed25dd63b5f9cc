"""What both benchmarks share: rows and material prepared once, peers built one by one, artifacts opened alike."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from build import BuildError, Built, build_in_child
from onnx_export import OnnxFloat32
from peer import Material, Peer

from gossamer.measure.machine import usable_cores
from gossamer.measure.types import Interval
from gossamer.plan.prepare import Inputs, Prepared, prepare
from gossamer.runtimes.process import Served


@dataclass(frozen=True)
class Entry:
    """Hold a peer with the files it made."""

    peer: Peer
    built: Built


@dataclass(frozen=True)
class Contest:
    """Hold what every entry is measured on: the original's folder, rows, task settings, threads."""

    prepared: Prepared
    task_settings: Mapping[str, Any]
    threads: int
    out: Path

    def serve(self, entry: Entry) -> Served:
        """Open an entry's files in a child process of its own."""
        return self._serve(entry.peer.runtime, entry.built.folder)

    def serve_original(self) -> Served:
        """Open the original in PyTorch, float32, as its owner runs it."""
        assert self.prepared.source.path is not None
        return self._serve("torch", self.prepared.source.path)

    def _serve(self, runtime: str, folder: Path) -> Served:
        needs_task = "torch" in runtime.lower()  # to know which class opens the model; the others stay lighter without
        return Served(
            runtime,
            folder,
            threads=self.threads,
            task_name=self.prepared.task.name if needs_task else None,
            task_settings=self.task_settings if needs_task else None,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both benchmarks have."""
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--data", type=Path, help="rows to calibrate on")
    parser.add_argument("--eval", type=Path, dest="evaluation", help="held-out rows to score on")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only peers whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path(".demo/bench"), help="where artifacts are made")
    parser.add_argument("--reuse", action="store_true", help="keep artifacts that an earlier run made the same way")
    parser.add_argument("--limit", type=float, help="a peer that is not done after so many seconds is left out")
    parser.add_argument("--no-results", action="store_true", help="print the table, leave RESULTS.md as it is")
    parser.add_argument(
        "--python",
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help="quantize peers whose name contains NAME with another environment's interpreter",
    )


def make_contest(arguments: argparse.Namespace, task: str, settings: Mapping[str, Any], rows: int | None) -> Contest:
    """Read and split the rows as `gossamer apply` will, so that every peer calibrates on the same ones."""
    inputs = Inputs(
        model=arguments.model,
        task=task,
        data=arguments.data,
        evaluation=arguments.evaluation,
        task_settings=settings,
        calibration_rows=arguments.calibration_rows,
        evaluation_rows=rows,
    )
    out = arguments.out / arguments.model.name
    out.mkdir(parents=True, exist_ok=True)
    return Contest(prepare(inputs), settings, arguments.threads, out)


def calibration_inputs(contest: Contest, count: int) -> list[Mapping[str, Any]]:
    """Return the inputs, one sample each, that gossamer's own recipes calibrate on."""
    prepared = contest.prepared
    return [batch.inputs for batch in prepared.task.calibration(prepared.calibration, prepared.source, count)]


def build_all(
    contest: Contest, peers: Sequence[Peer], arguments: argparse.Namespace, calibration: Sequence[Mapping[str, Any]]
) -> tuple[list[Entry], list[str]]:
    """Return the entries that could be built, the exported graph first, and a line for each peer that was left out."""
    inputs = contest.out / "calibration.npz"
    np.savez(inputs, **{f"{i}.{name}": array for i, row in enumerate(calibration) for name, array in row.items()})
    material = Material(
        model=str(arguments.model.resolve()),
        graph=None,
        inputs=str(inputs.resolve()),
        data=str(arguments.data.resolve()),
        evaluation=str(arguments.evaluation.resolve()),
        task=contest.prepared.task.name,
        task_settings=contest.task_settings,
        calibration_rows=arguments.calibration_rows,
    )
    chosen = [peer for peer in peers if wanted(peer, arguments.only)]
    pythons = dict(pair.split("=", 1) for pair in arguments.python)
    entries: list[Entry] = []
    skipped: list[str] = []
    export: Built | None = None
    if any(peer.uses_graph or isinstance(peer, OnnxFloat32) for peer in chosen):
        say("exporting the float32 graph")
        export = build_in_child(
            OnnxFloat32(), material, (contest.out / "onnx-float32").resolve(), reuse=arguments.reuse
        )
        material = replace(material, graph=str(export.folder))
    for index, peer in enumerate(chosen):
        if isinstance(peer, OnnxFloat32):
            assert export is not None
            entries.append(Entry(peer, export))
            continue
        python = next((path for name, path in pythons.items() if name.lower() in peer.label.lower()), sys.executable)
        if python == sys.executable and not peer.available():
            skipped.append(f"{peer.label}: not installed ({', '.join(peer.missing())})")
            say(f"skipped {skipped[-1]}")
            continue
        say(f"building {peer.label}")
        try:
            folder = (contest.out / f"{index:02d}").resolve()
            built = build_in_child(peer, material, folder, python, reuse=arguments.reuse, limit=arguments.limit)
        except BuildError as error:  # one tool's failure is a finding, not the end of the comparison
            lines = str(error).splitlines()
            skipped.append(" ".join(dict.fromkeys((lines[0], lines[-1][:200]))))
            say(str(error))
            continue
        if peer.uses_graph and export is not None:
            built = replace(built, seconds=built.seconds + export.seconds)
        entries.append(Entry(peer, built))
    return entries, skipped


def wanted(peer: Peer, only: Sequence[str] | None) -> bool:
    """Say whether a peer was asked for."""
    return only is None or any(named(peer.label, part) for part in only)


def named(label: str, part: str) -> bool:
    """Say whether a label contains what was asked for; with a `$` behind it, whether it ends so."""
    label, part = label.lower(), part.lower()
    return label.endswith(part[:-1]) if part.endswith("$") else part in label


def say(message: str) -> None:
    """Tell progress on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def share(interval: Interval, digits: int = 1) -> str:
    """Write a ratio with its bounds in percent: `31.2 % (30.8 to 31.9)`."""
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{value:.{digits}f} % ({low:.{digits}f} to {high:.{digits}f})"


def megabytes(count: float, digits: int = 1) -> str:
    """Write bytes in decimal megabytes."""
    return f"{count / 1e6:.{digits}f}"
