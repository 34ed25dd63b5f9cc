"""Text encoders: this tool beside PyTorch, ONNX Runtime and OpenVINO/NNCF, on one model, one machine, the same rows.

    python benchmarks/encoder.py                                   # the demo's model, 64 tokens
    python benchmarks/encoder.py --model DIR --data train.jsonl --eval test.jsonl --tokens 128 [--rows 500]

Every artifact is opened in a child process of its own, scored on the same rows, and timed in turns with the original
in PyTorch float32 on a request of `--tokens` tokens. Then each of ours is timed against the fastest other artifact of
the same runtime. The table goes to standard output and into RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from contest import Contest, Entry, add_arguments, build_all, make_contest, megabytes, say, share
from encoder_peers import NncfQuantize, OnnxDynamic, OnnxStatic, OpenVinoFloat32, TorchDynamic
from onnx_export import OnnxFloat32
from ours import GossamerOnGraph
from peer import Peer, has_int8_dot
from results import table, write_section

from gossamer.measure.latency import LatencyPair, time_in_turns
from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import paired_quality, score_interval
from gossamer.measure.types import Interval
from gossamer.runtimes.manifest import artifact_files, copy_companions
from gossamer.tasks.base import Arrays, Batch, Evaluation

DEMO = Path(".demo/minilm-era")
DEMO_ROWS = Path("examples/era")
HEADINGS = (
    "", "files MB", "p50 ms", "of the original", "accuracy", "quality kept", "same answer", "memory MB", "made in s",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Hold what was measured of one artifact; `memory` is its child's peak above the bare interpreter, in bytes."""

    entry: Entry
    files: int
    pair: LatencyPair
    accuracy: Interval
    quality: Interval
    agreement: Interval
    memory: int


def contenders() -> list[Peer]:
    """Return what is compared: other tools first, then ours on the same two runtimes."""
    bits = 8 if has_int8_dot() else 7  # 7-bit codes cannot overflow where 8-bit products are added in 16 bits
    embedding = {"quantize": {"bits": 8, "targets": ["embedding"]}}
    dynamic = ({"quantize": {"bits": bits, "activations": "dynamic"}}, embedding)
    static = ({"quantize": {"bits": bits, "activations": "static"}}, embedding)
    smaller = ({"prune": {"what": "heads", "to": "50%"}}, {"prune": {"what": "ffn", "to": "62%"}}, {"distill": {}})
    return [
        TorchDynamic(),
        OnnxFloat32(),
        OnnxDynamic(),
        OnnxDynamic(optimizer=True),
        OnnxStatic(),
        OnnxStatic(operators=("MatMul", "Gemm", "Gather")),
        GossamerOnGraph("onnxruntime", dynamic, f"int{bits} dynamic, embeddings int8"),
        OpenVinoFloat32(),
        NncfQuantize(),
        GossamerOnGraph("openvino", static, f"int{bits} static, embeddings int8"),
        GossamerOnGraph("openvino", (*smaller, *static), f"heads 50%, ffn 62%, distilled, int{bits} static"),
    ]


def measure(contest: Contest, entry: Entry, reference: Evaluation, request: Arrays, seconds: float) -> Found:
    """Score an artifact on all rows, then time it in turns with the original."""
    say(f"measuring {entry.peer.label}")
    prepared = contest.prepared
    with contest.serve(entry) as served:
        evaluation = prepared.task.evaluate(served.run_all, batches_of(contest), reference)
        with contest.serve_original() as original:
            pair = time_in_turns(served, original, request, request, budget_seconds=seconds)
        memory = served.memory().own_peak
    assert evaluation.agreement is not None
    return Found(
        entry=entry,
        files=shipped_bytes(files_of(contest, entry)),
        pair=pair,
        accuracy=score_interval(evaluation.scores, prepared.task.metric.figure),
        quality=paired_quality(evaluation.scores, reference.scores, prepared.task.metric),
        agreement=score_interval(evaluation.agreement),
        memory=memory,
    )


def batches_of(contest: Contest) -> list[Batch]:
    """Return the held-out rows, one a batch."""
    return list(contest.prepared.task.batches(contest.prepared.evaluation, contest.prepared.source, batch_size=1))


def files_of(contest: Contest, entry: Entry) -> list[Path]:
    """Return what a user ships: the peer's files with config and tokenizer beside them."""
    copy_companions(contest.prepared.source, entry.built.folder)
    return [path for path in artifact_files(entry.built.folder) if path.parent == entry.built.folder]


def row_of(found: Found) -> list[str]:
    """Return an artifact's row of the table."""
    ratio = found.pair.ratio_of("p50")
    return [
        found.entry.peer.label,
        megabytes(found.files),
        f"{1e3 * found.pair.a.p50:.2f}",
        share(ratio),
        share(found.accuracy),
        share(found.quality, 2),
        f"{100 * found.agreement.value:.2f} %",
        megabytes(found.memory, 0),
        f"{found.entry.built.seconds:.0f}",
    ]


def duels(contest: Contest, found: Sequence[Found], request: Arrays, seconds: float) -> list[list[str]]:
    """Time each of ours against the fastest other artifact of the same library; one row a duel."""
    rows = []
    for mine in (one for one in found if one.entry.peer.ours):
        rivals = [one for one in found if not one.entry.peer.ours and library(one) == library(mine)]
        if not rivals:
            continue
        rival = min(rivals, key=lambda one: one.pair.ratio_of("p50").value)
        say(f"timing {mine.entry.peer.label} against {rival.entry.peer.label}")
        with contest.serve(mine.entry) as first, contest.serve(rival.entry) as second:
            pair = time_in_turns(first, second, request, request, budget_seconds=seconds)
        rows.append(
            [
                mine.entry.peer.label,
                rival.entry.peer.label,
                share(pair.ratio_of("p50")),
                share(pair.ratio_of("p95")),
                f"{mine.files / rival.files:.3f}",
                f"{100 * (mine.accuracy.value - rival.accuracy.value):+.2f} points",
            ]
        )
    return rows


def library(found: Found) -> str:
    """Return which library runs an artifact."""
    runtime = found.entry.peer.runtime.lower()
    return next(name for name in ("onnx", "openvino", "torch") if name in runtime)


def parsed(about: str, more: Callable[[argparse.ArgumentParser], None] = lambda parser: None) -> argparse.Namespace:
    """Return the command line's arguments; the demo's model and rows where none are named. `more` adds others."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, help="texts are cut to so many tokens, and a timed request has as many")
    parser.add_argument("--rows", type=int, help="score on so many held-out rows (default: all)")
    parser.add_argument("--seconds", type=float, default=16.0, help="time spent on each pair that is timed in turns")
    more(parser)
    arguments = parser.parse_args()
    if arguments.model is None:
        arguments.model, arguments.tokens = DEMO, arguments.tokens or 64
        arguments.data, arguments.evaluation = DEMO_ROWS / "train.jsonl", DEMO_ROWS / "test.jsonl"
    if arguments.data is None or arguments.evaluation is None:
        parser.error("--model needs --data and --eval")
    arguments.tokens = arguments.tokens or 128
    return arguments


def compare(arguments: argparse.Namespace, peers: Sequence[Peer], kind: str, notes: Sequence[str] = ()) -> int:
    """Build, score and time the peers beside the original, print the table, and write it into RESULTS.md."""
    if not arguments.model.is_dir():
        print(f"there is no {arguments.model}\nhint: `make demo` makes it", file=sys.stderr)
        return 1
    began, tokens = time.monotonic(), arguments.tokens
    settings = {"max_length": tokens, "latency_tokens": tokens}
    contest = make_contest(arguments, "text-classification", settings, arguments.rows)
    prepared = contest.prepared
    calibration = [batch.inputs for batch in prepared.task.batches(prepared.calibration, prepared.source)]
    entries, skipped = build_all(contest, peers, arguments, calibration)
    batches = batches_of(contest)
    request = prepared.task.latency_inputs(batches)
    say("scoring the original")
    with contest.serve_original() as original:
        reference = prepared.task.evaluate(original.run_all, batches)
        alone = time_in_turns(original, None, request, None, budget_seconds=arguments.seconds / 2)
        memory = original.memory().own_peak
    found = [measure(contest, entry, reference, request, arguments.seconds) for entry in entries]
    first = [
        "PyTorch fp32 (the original)",
        megabytes(shipped_bytes(prepared.source.shipped_files())),
        f"{1e3 * alone.a.p50:.2f}",
        "100 %",
        share(score_interval(reference.scores, prepared.task.metric.figure)),
        "",
        "",
        megabytes(memory, 0),
        "",
    ]
    body = [table(HEADINGS, [first, *map(row_of, found)])]
    if pairs := duels(contest, found, request, arguments.seconds):
        body.append("Directly against each other, in turns:")
        body.append(table(("", "against", "p50", "p95", "size", "accuracy"), pairs))
    body += [*notes, *(f"Left out: {line}." for line in skipped)]
    text = "\n\n".join(body)
    print(text)
    if not arguments.no_results:
        title = f"{kind} {arguments.model.name}, {tokens} tokens, {len(batches)} held-out rows"
        key = f"{kind.lower()} {arguments.model.name} {tokens}"
        write_section(key, title, text, threads=contest.threads, seconds=time.monotonic() - began)
    return 0


def main() -> int:
    """Run the benchmark."""
    return compare(parsed(__doc__), contenders(), "Encoder")


if __name__ == "__main__":
    sys.exit(main())
