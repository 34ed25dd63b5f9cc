"""What a teacher is worth to a model with fewer blocks: one student trained beside the original, and on labels alone.

    python benchmarks/students.py [--model DIR --data train.jsonl --eval test.jsonl] [--tokens 128] [--labelled 128]

The student is the original without some of its blocks (those that its predictions miss least). It is trained for the
same steps on the same rows, once following the original's predictions and blocks besides the labels, once on labels
alone, for several seeds. With --labelled only so many rows have one: the teacher needs none and is followed on all
rows without, labels alone are learned from those, seen as much more often. Rows are compared in pairs: right answers
of one, mean over seeds, against the other's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from contest import Entry, build_all, calibration_inputs, make_contest, say, share
from encoder import batches_of, parsed
from onnx_export import OnnxFloat32
from ours import Gossamer
from peer import Peer
from pruning import OF_ENCODERS, Cut, Steps, measure, row_of
from results import table, write_section

from gossamer.measure.statistics import paired_quality
from gossamer.tasks.base import Metric, Scores

TAUGHT, ALONE = "distilled", "labels alone"


def students(stays: str, epochs: float, seeds: int, rows: int, labelled: int | None) -> list[Gossamer]:
    """Return the student as it is cut, and trained in both ways with each seed; of `rows` so many are labelled."""
    cut = {"prune": {"what": "layers", "to": stays, "by": "divergence"}}
    ways: dict[str, Mapping[str, Any]] = {
        TAUGHT: {"epochs": epochs},
        ALONE: {"epochs": epochs, "logits": 0, "hidden": 0, "labels": 1},
    }
    if labelled is not None:
        ways[TAUGHT] = {"epochs": epochs, "labels": 0}
        ways[ALONE] = {**ways[ALONE], "rows": labelled, "epochs": epochs * max(1.0, rows / labelled)}
    found = [Gossamer("onnxruntime", (cut,), f"blocks to {stays}, not trained")]
    for seed in range(seeds):
        for way, settings in ways.items():
            steps: Steps = (cut, {"distill": dict(settings)})
            found.append(Gossamer("onnxruntime", steps, f"blocks to {stays}, {way}, seed {seed}", seed=seed))
    return found


def compared(found: Sequence[Cut], original: Scores, metric: Metric) -> str:
    """Return what the teacher is worth, and what is left of the original's right answers, mean over seeds."""
    kinds = [[one.evaluation for one in found if f", {way}, " in one.entry.peer.label] for way in (TAUGHT, ALONE)]
    taught, alone = (mean_of([one.scores for one in kind]) for kind in kinds)
    same = [mean_of([one.agreement for one in kind if one.agreement is not None]) for kind in kinds]
    return (
        f"Right answers, row by row, mean over seeds: {TAUGHT} "
        f"{share(paired_quality(taught, alone, metric), 2)} of those of {ALONE}; "
        f"{share(paired_quality(taught, original, metric), 2)} of the original's. "
        f"The original's answers: {TAUGHT} {share(paired_quality(same[0], same[1], metric), 2)} of those of {ALONE}."
    )


def mean_of(found: Sequence[Scores]) -> Scores:
    """Return the scores of each row, mean over students."""
    return Scores(np.mean([one.sums for one in found], axis=0), found[0].weights)


def add_own(parser: argparse.ArgumentParser) -> None:
    """Add what only this benchmark asks."""
    parser.add_argument("--stays", default="50%", help="what stays of the blocks")
    parser.add_argument("--epochs", type=float, default=4.0, help="how often each row is seen")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--labelled", type=int, metavar="N", help="rows that have a label (default: all)")


def main() -> int:
    """Run the benchmark."""
    arguments = parsed(__doc__, add_own)
    began = time.monotonic()
    settings = {"max_length": arguments.tokens, "latency_tokens": arguments.tokens}
    contest = make_contest(arguments, "text-classification", settings, arguments.rows)
    task = contest.prepared.task
    rows, labelled = len(contest.prepared.others), arguments.labelled
    peers: list[Peer] = [
        OnnxFloat32(), *students(arguments.stays, arguments.epochs, arguments.seeds, rows, labelled)
    ]  # fmt: skip
    entries, skipped = build_all(contest, peers, arguments, calibration_inputs(contest, arguments.calibration_rows))
    if len(entries) < len(peers):
        print("students.py: not all could be made:\n" + "\n".join(skipped), file=sys.stderr)
        return 1
    say("scoring the original")
    with contest.serve_original() as original:
        reference = task.evaluate(original.run_all, batches_of(contest))
    uncut: Entry = entries[0]
    found = [measure(contest, entry, uncut, reference, arguments.seconds) for entry in entries[1:]]
    text = table(OF_ENCODERS, [row_of(one, task.metric) for one in found])
    text += "\n\n" + compared(found, reference.scores, task.metric)
    print(text)
    if not arguments.no_results:
        name, part = arguments.model.name, "" if labelled is None else f", {labelled} of {rows} rows labelled"
        write_section(
            f"students {name}{part}", f"Students of {name} with fewer blocks{part}", text, threads=contest.threads,
            seconds=time.monotonic() - began,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
