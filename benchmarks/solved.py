"""GPTQ beside rounding to the nearest on a model of any task, scored on the task: text, vision, speech.

    python benchmarks/solved.py --model DIR --task text-classification --data train.jsonl --eval test.jsonl
    python benchmarks/solved.py --model DIR --task speech-recognition --data FOLDER [--set name=value ...]
    python benchmarks/solved.py ... --recipe 'NAME: {technique: {...}}, {technique: {...}}' [--recipe ...]

Linear layers in 8 and in 4 bits, embeddings in 8, or other recipes that are given; files for PyTorch. Without --eval a
part of --data is held out. Each artifact is opened in a process of its own, scored on the same held-out rows as the
original, in pairs, and timed in turns with it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from build import Built, build_in_child
from contest import Contest, Entry, make_contest, megabytes, say, share, wanted
from ours import Gossamer
from peer import Material
from results import table, write_section

from gossamer.cli.options import read_settings
from gossamer.measure.latency import time_in_turns
from gossamer.measure.machine import usable_cores
from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import paired_quality, score_interval
from gossamer.measure.types import Interval
from gossamer.runtimes.manifest import artifact_files, copy_companions
from gossamer.tasks.base import Evaluation

GRIDS: tuple[dict[str, Any], ...] = ({"bits": 8}, {"bits": 4, "group_size": 64, "symmetric": False})
EMBEDDING = {"quantize": {"bits": 8, "targets": ["embedding"]}}
HEADINGS = ("", "files MB", "of the original's time", "score", "quality kept", "KL, nats", "same answer", "made in s")


@dataclass(frozen=True)
class Found:
    """Hold an artifact with what was measured of it; `files` in bytes."""

    built: Built
    label: str
    files: int
    evaluation: Evaluation
    time: Interval  # of the original's


def recipes(texts: Sequence[str]) -> list[Gossamer]:
    """Return the recipes that are given as `NAME: {technique: {...}}, ...`."""
    named = (text.partition(":") for text in texts)
    return [Gossamer("torch", tuple(yaml.safe_load(f"[{steps}]")), name) for name, _, steps in named]


def contenders() -> list[Gossamer]:
    """Return each grid rounded to the nearest and solved."""
    found = []
    for grid in GRIDS:
        name = f"int{grid['bits']}" + (f" g{grid['group_size']}" if "group_size" in grid else "")
        linear = {**grid, "targets": ["linear"]}
        found.append(Gossamer("torch", ({"quantize": linear}, EMBEDDING), f"{name}, nearest", rows=False))
        found.append(Gossamer("torch", ({"gptq": linear}, EMBEDDING), f"{name}, gptq"))
    return found


def measured(contest: Contest, peer: Gossamer, material: Material, reference: Evaluation) -> Found:
    """Return one recipe's artifact with its scores on all held-out rows. Raises BuildError."""
    say(f"building {peer.label}")
    folder = (contest.out / peer.name.replace(", ", "-").replace(" ", "-")).resolve()
    built = build_in_child(peer, material, folder)
    prepared = contest.prepared
    batches = prepared.task.batches(prepared.evaluation, prepared.source)
    request = prepared.task.latency_inputs(batches)
    with contest.serve(Entry(peer, built)) as served:
        evaluation = prepared.task.evaluate(served.run_all, batches, reference)
        with contest.serve_original() as original:
            pair = time_in_turns(served, original, request, request)
    copy_companions(prepared.source, built.folder)
    files = [path for path in artifact_files(built.folder) if path.parent == built.folder]
    return Found(built, peer.label, shipped_bytes(files), evaluation, pair.ratio_of("p50"))


def row_of(found: Found, reference: Evaluation, contest: Contest) -> list[str]:
    """Return an artifact's row of the table."""
    metric, evaluation = contest.prepared.task.metric, found.evaluation
    assert evaluation.divergence is not None
    divergence = score_interval(evaluation.divergence)
    return [
        found.label,
        megabytes(found.files),
        share(found.time),
        share(score_interval(evaluation.scores, metric.figure)),
        share(paired_quality(evaluation.scores, reference.scores, metric), 2),
        f"{divergence.value:.5f} ({divergence.low:.5f} to {divergence.high:.5f})",
        "" if evaluation.agreement is None else share(score_interval(evaluation.agreement)),
        f"{found.built.seconds:.0f}",
    ]


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face model")
    parser.add_argument("--task", required=True, help="what it is for, as `gossamer apply --task` takes it")
    parser.add_argument("--data", type=Path, required=True, help="rows to calibrate on")
    parser.add_argument("--eval", type=Path, dest="evaluation", help="held-out rows (default: a part of --data)")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting of the task")
    parser.add_argument("--recipe", action="append", metavar="NAME: STEPS", help="recipes instead of GPTQ's")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=Path(".demo/bench-solved"), help="where artifacts are made")
    parser.add_argument("--no-results", action="store_true", help="print the table, leave RESULTS.md as it is")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark."""
    arguments = parsed()
    began, settings = time.monotonic(), read_settings(arguments.set)
    contest = make_contest(arguments, arguments.task, settings, None)
    prepared = contest.prepared
    material = Material(
        model=str(arguments.model.resolve()),
        graph=None,
        inputs="",
        data=str(arguments.data.resolve()),
        evaluation=arguments.evaluation and str(arguments.evaluation.resolve()),
        task=prepared.task.name,
        task_settings=settings,
        calibration_rows=arguments.calibration_rows,
    )
    say("scoring the original")
    with contest.serve_original() as original:
        reference = prepared.task.evaluate(
            original.run_all, prepared.task.batches(prepared.evaluation, prepared.source)
        )
    asked = recipes(arguments.recipe) if arguments.recipe else contenders()
    peers = [peer for peer in asked if wanted(peer, arguments.only)]
    rows = [row_of(measured(contest, peer, material, reference), reference, contest) for peer in peers]
    first = [
        "the original in float32",
        megabytes(shipped_bytes(prepared.source.shipped_files())),
        "100 %",
        share(score_interval(reference.scores, prepared.task.metric.figure)),
        "", "", "", "",
    ]  # fmt: skip
    text = table(HEADINGS, [first, *rows])
    print(text)
    if not arguments.no_results:
        what = ", ".join(peer.name for peer in asked) if arguments.recipe else "GPTQ"
        title = f"{what} on {arguments.model.name}, {prepared.task.name}, {len(prepared.evaluation)} held-out rows"
        key, seconds = f"solved {arguments.model.name}", time.monotonic() - began
        key += f": {what}" if arguments.recipe else ""
        write_section(key, title, text, threads=arguments.threads, seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
