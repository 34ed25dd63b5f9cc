"""What training wins back of a language model that lost a fifth of its blocks' parameters, in the same minutes.

    python benchmarks/recovery.py --model DIR --data train.jsonl --eval test.jsonl [--context 512] [--windows 640 900]

The feed-forward channels are cut once and for all; what is left is trained on other windows of the same texts, each
seen once: following the original besides the labels, and on labels alone. A step on labels alone takes less, so it gets
more windows (`--windows`): at least as many seconds, which the table says. They are scored as in llm.py.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from contest import Contest, Entry, add_arguments, build_all, calibration_inputs, make_contest, megabytes, say
from encoder import files_of
from llm import held_out, rows_of
from ours import Gossamer
from pruning import cut, figures
from results import table, write_section
from scoring import WindowScores, score

from gossamer.measure.size import shipped_bytes

COLUMNS = ("", "weights MB", "trained for s", "perplexity", "won back", "KL, nats", "won back", "same top token")
ALONE: Mapping[str, Any] = {"logits": 0, "hidden": 0, "labels": 1}


def students(windows: Sequence[int], stays: str, rate: float, batch_size: int) -> list[Gossamer]:
    """Return the model as it is cut, distilled on so many windows, and trained on labels alone on so many others."""
    step = cut("ffn", stays)
    taught = {"epochs": 1, "rate": rate, "batch_size": batch_size}
    ways: dict[str, Mapping[str, Any]] = {
        f"distilled, {windows[0]} windows": {**taught, "rows": windows[0]},
        f"labels alone, {windows[1]} windows": {**taught, **ALONE, "rows": windows[1]},
    }
    found = [Gossamer("torch", (step,), f"ffn to {stays}, not trained")]
    return found + [Gossamer("torch", (step, {"distill": how}), f"ffn to {stays}, {way}") for way, how in ways.items()]


def row_of(entry: Entry, size: int, scores: WindowScores, first: tuple[Entry, WindowScores]) -> list[str]:
    """Return a row of weights of that many bytes; `first` was cut and not trained: of its loss shares are won back."""
    start, before = first
    perplexity, divergence, agreement = figures(scores)
    trained = entry.built.seconds - start.built.seconds
    whole, lost, now = (perplexity_of(*one) for one in (original(before), student(before), student(scores)))
    won = [(lost - now) / (lost - whole), 1 - divergence_of(scores) / divergence_of(before)]
    shares = ["" if entry is start else f"{share:.0%}" for share in won]
    seconds = "" if entry is start else f"{trained:.0f}"
    return [entry.peer.label, megabytes(size), seconds, perplexity, shares[0], divergence, shares[1], agreement]


def weights_of(contest: Contest, entry: Entry) -> int:
    """Return the bytes of an entry's weights."""
    return shipped_bytes([path for path in files_of(contest, entry) if path.suffix == ".safetensors"])


def original(scores: WindowScores) -> tuple[Sequence[float], Sequence[int]]:
    """Return the original's losses, and the tokens of each window."""
    return scores.original_loss, scores.tokens


def student(scores: WindowScores) -> tuple[Sequence[float], Sequence[int]]:
    """Return the student's losses, and the tokens of each window."""
    return scores.loss, scores.tokens


def perplexity_of(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """Return the perplexity over all windows."""
    return float(np.exp(sum(losses) / sum(tokens)))


def divergence_of(scores: WindowScores) -> float:
    """Return the divergence from the original, nats a token."""
    return float(sum(scores.divergence) / sum(scores.tokens))


def main() -> int:
    """Run the benchmark."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--max-tokens", type=int, default=10_000, help="held-out tokens scored")
    parser.add_argument("--windows", type=int, nargs=2, default=(640, 900), help="distilled on, and on labels alone")
    parser.add_argument("--stays", default="73.33%", help="what stays of the channels (a fifth of Llama's blocks goes)")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.model is None or arguments.data is None or arguments.evaluation is None:
        print("recovery.py: skipped, it needs --model, --data and --eval")
        return 0
    began = time.monotonic()
    contest = make_contest(arguments, "causal-lm", {"context": arguments.context}, None)
    peers = students(arguments.windows, arguments.stays, arguments.rate, arguments.batch_size)
    entries, skipped = build_all(contest, peers, arguments, calibration_inputs(contest, arguments.calibration_rows))
    if len(entries) < len(peers):
        print("recovery.py: not all could be made:\n" + "\n".join(skipped), file=sys.stderr)
        return 1
    windows = held_out(contest, arguments.context, arguments.max_tokens)
    found: list[tuple[Entry, WindowScores]] = []
    for entry in entries:
        say(f"scoring {entry.peer.label}")
        with contest.serve_original() as whole, contest.serve(entry) as served:
            found.append((entry, score(rows_of(whole.run), rows_of(served.run), windows)))
    rows = [row_of(entry, weights_of(contest, entry), scores, found[0]) for entry, scores in found]
    first = ["the original", "", "", f"{perplexity_of(*original(found[0][1])):.2f}", "", "0", "", ""]
    text = table(COLUMNS, [first, *rows]) + f"\n\n{len(windows)} windows of {arguments.context} tokens scored."
    print(text)
    if not arguments.no_results:
        name = arguments.model.name
        write_section(
            f"recovery {name}", f"What training wins back of {name} without a fifth of its blocks", text,
            threads=contest.threads, seconds=time.monotonic() - began,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
