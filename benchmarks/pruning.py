"""Structured pruning without training: this tool beside Torch-Pruning, on one model, one machine, the same rows.

    python benchmarks/pruning.py --model DIR --data train.jsonl --eval test.jsonl --tokens 128      # an encoder
    python benchmarks/pruning.py --task causal-lm --model DIR --data FILE --eval FILE --context 512 # language model

Encoders become ONNX graphs in float32; each is timed in turns with the graph that was not cut (that is the speed-up),
and the best of each tool among those that reach `--speedup` are compared row by row. Of language models a fifth of the
parameters of the blocks goes; they are scored as in llm.py, which is said there. Nothing is rounded, nothing trained.
Torch-Pruning looks for groups from the feed-forward networks alone where it cuts only those: from the stream of SmolLM2
its graph did not come back within eight minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from contest import Contest, Entry, add_arguments, build_all, calibration_inputs, make_contest, megabytes, say, share
from encoder import batches_of, files_of
from llm import held_out, rows_of
from onnx_export import OnnxFloat32
from ours import Gossamer
from peer import Peer
from pruning_peers import TorchPruning
from results import table, write_section
from scoring import WindowScores, score

from gossamer.measure.latency import time_in_turns
from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import paired_quality, score_interval
from gossamer.measure.types import Interval
from gossamer.tasks.base import Evaluation, Metric, Scores
from gossamer.tasks.causal_lm import CausalLM

OF_ENCODERS = ("", "files MB", "speed-up", "accuracy", "quality kept", "same answer", "made in s")
OF_LANGUAGE = ("", "weights MB", "perplexity", "KL, nats a token", "same top token", "made in s")
IMPORTANCES = ("magnitude", "taylor", "hessian")
Steps = tuple[Mapping[str, Any], ...]


def encoders() -> list[Peer]:
    """Return what is compared on an encoder: each tool with less and less left, around the asked speed-up."""
    found: list[Peer] = [OnnxFloat32()]
    for importance in IMPORTANCES:
        for scope, shares in (("ffn", (0.5, 0.65)), ("ffn+heads", (0.42, 0.6)), ("all", (0.15, 0.28))):
            found += [TorchPruning(importance, scope, each) for each in shares]
    cuts: tuple[Steps, ...] = (
        (cut("ffn", "50%"),),
        (cut("ffn", "40%"),),
        (cut("heads", "67%"), cut("ffn", "66%")),
        (cut("heads", "50%"), cut("ffn", "62%")),
        (cut("heads", "67%"), cut("ffn", "50%")),
    )
    return [*found, *(Gossamer("onnxruntime", steps, named(steps)) for steps in cuts)]


def language_models() -> list[Peer]:
    """Return what is compared on a language model whose blocks lose a fifth of their parameters."""
    # its second-order importance keeps every row's gradients: more than ten minutes on SmolLM2
    found: list[Peer] = [TorchPruning(each, "ffn", 0.2667, "torch") for each in IMPORTANCES[:2]]
    steps: list[Steps] = [(cut("ffn", "73.33%", by=by),) for by in ("obs", "fisher", "activation", "magnitude")]
    steps += [(cut("ffn", "73.33%", by=by, refit=False),) for by in ("taylor", "magnitude")]  # as LLM-Pruner does
    steps += [(cut("layers", "80%"),)]
    steps += [(cut("layers", "80%", by="divergence"),)]
    return [*found, *(Gossamer("torch", each, named(each)) for each in steps)]


def cut(what: str, to: str, **settings: Any) -> Mapping[str, Any]:
    """Return a recipe's step."""
    return {"prune": {"what": what, "to": to, **settings}}


def named(steps: Steps) -> str:
    """Return a row's name: `heads to 67%, ffn to 50%`."""
    words = []
    for step in steps:
        settings = dict(step["prune"])
        how = f" by {settings['by']}" if "by" in settings else ""
        how += "" if settings.get("refit", True) else ", no refit"
        words.append(f"{settings['what']} to {settings['to']}{how}")
    return ", ".join(words)


@dataclass(frozen=True)
class Cut:
    """Hold what was measured of one smaller encoder; `speedup` is the uncut graph's time over its own."""

    entry: Entry
    files: int
    speedup: Interval
    evaluation: Evaluation
    quality: Interval


def measure(contest: Contest, entry: Entry, uncut: Entry, reference: Evaluation, seconds: float) -> Cut:
    """Score a smaller encoder on all rows, and time it in turns with the uncut one."""
    say(f"measuring {entry.peer.label}")
    task, batches = contest.prepared.task, batches_of(contest)
    request = task.latency_inputs(batches)
    with contest.serve(entry) as served:
        evaluation = task.evaluate(served.run_all, batches, reference)
        with contest.serve(uncut) as whole:
            pair = time_in_turns(served, whole, request, request, budget_seconds=seconds)
    ratio = pair.ratio_of("p50")
    return Cut(
        entry,
        shipped_bytes(files_of(contest, entry)),
        ratio.model_copy(update={"value": 1 / ratio.value, "low": 1 / ratio.high, "high": 1 / ratio.low}),
        evaluation,
        paired_quality(evaluation.scores, reference.scores, task.metric),
    )


def encoder_text(contest: Contest, entries: Sequence[Entry], speedup: float, seconds: float) -> str:
    """Return the table of encoders, and who is best at the asked speed-up."""
    task, batches = contest.prepared.task, batches_of(contest)
    say("scoring the original")
    with contest.serve_original() as original:
        reference = task.evaluate(original.run_all, batches)
    uncut, *others = entries
    found = [measure(contest, entry, uncut, reference, seconds) for entry in others]
    rows = [row_of(one, task.metric) for one in found]
    accuracy = share(score_interval(reference.scores, task.metric.figure))
    first = ["the original's graph", megabytes(shipped_bytes(files_of(contest, uncut))), "1", accuracy, "", "", ""]
    return "\n\n".join((table(OF_ENCODERS, [first, *rows]), *duel(contest, found, speedup)))


def row_of(one: Cut, metric: Metric) -> list[str]:
    """Return a smaller encoder's row of the table."""
    return [
        one.entry.peer.label,
        megabytes(one.files),
        f"{one.speedup.value:.2f} ({one.speedup.low:.2f} to {one.speedup.high:.2f})",
        share(score_interval(one.evaluation.scores, metric.figure)),
        share(one.quality, 2),
        "" if one.evaluation.agreement is None else share(score_interval(one.evaluation.agreement)),
        f"{one.entry.built.seconds:.0f}",
    ]


def duel(contest: Contest, found: Sequence[Cut], speedup: float) -> list[str]:
    """Return a line that compares the best of ours with the best other among those that are fast enough."""
    fast = [one for one in found if one.speedup.value >= speedup]
    mine = max((one for one in fast if one.entry.peer.ours), key=right_answers, default=None)
    rival = max((one for one in fast if not one.entry.peer.ours), key=right_answers, default=None)
    if mine is None or rival is None:
        return [f"A speed-up of {speedup:g} was not reached by {'ours' if mine is None else 'another'}."]
    quality = paired_quality(mine.evaluation.scores, rival.evaluation.scores, contest.prepared.task.metric)
    return [
        f"Best at a speed-up of at least {speedup:g}: {mine.entry.peer.label} against {rival.entry.peer.label}: "
        f"right answers, ours of theirs, row by row: {share(quality, 2)}."
    ]


def right_answers(one: Cut) -> float:
    """Return the share of right answers."""
    return float(score_interval(one.evaluation.scores).value)


def language_text(contest: Contest, entries: Sequence[Entry], context: int, max_tokens: int) -> str:
    """Return the table of language models."""
    windows = held_out(contest, context, max_tokens)
    rows = []
    for entry in entries:
        say(f"scoring {entry.peer.label}")
        with contest.serve_original() as original, contest.serve(entry) as served:
            scores = score(rows_of(original.run), rows_of(served.run), windows)
        weights = shipped_bytes([path for path in files_of(contest, entry) if path.suffix == ".safetensors"])
        rows.append([entry.peer.label, megabytes(weights), *figures(scores), f"{entry.built.seconds:.0f}"])
    shapes = f"{len(windows)} windows of {context} tokens scored; bounds are over windows."
    whole = shipped_bytes([path for path in contest.prepared.source.shipped_files() if path.suffix == ".safetensors"])
    perplexity = float(np.exp(sum(scores.original_loss) / sum(scores.tokens)))
    first = ["the original", megabytes(whole), f"{perplexity:.2f}", "0", "", ""]
    return "\n\n".join((table(OF_LANGUAGE, [first, *rows]), shapes))


def figures(scores: WindowScores) -> list[str]:
    """Return perplexity, KL and agreement as the table shows them."""
    tokens = np.asarray(scores.tokens, dtype=np.float64)
    perplexity = score_interval(Scores(-np.asarray(scores.loss), tokens), CausalLM.metric.figure)
    divergence = score_interval(Scores(np.asarray(scores.divergence), tokens))
    return [
        f"{perplexity.value:.2f} ({perplexity.low:.2f} to {perplexity.high:.2f})",
        f"{divergence.value:.4f} ({divergence.low:.4f} to {divergence.high:.4f})",
        share(score_interval(Scores(np.asarray(scores.agreement, dtype=np.float64), tokens))),
    ]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--task", choices=("text-classification", "causal-lm"), default="text-classification")
    parser.add_argument("--tokens", type=int, default=128, help="encoders: texts are cut to so many tokens")
    parser.add_argument("--context", type=int, default=512, help="language models: tokens of a window")
    parser.add_argument("--max-tokens", type=int, default=10_000, help="language models: held-out tokens scored")
    parser.add_argument("--rows", type=int, help="encoders: score on so many held-out rows (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time spent on each pair that is timed in turns")
    parser.add_argument("--speedup", type=float, default=1.5, help="encoders: the best at so much are compared")
    arguments = parser.parse_args()
    if arguments.model is None or arguments.data is None or arguments.evaluation is None:
        print("pruning.py: skipped, it needs --model, --data and --eval")
        return 0
    began = time.monotonic()
    encoder = arguments.task == "text-classification"
    settings: dict[str, Any] = (
        {"max_length": arguments.tokens, "latency_tokens": arguments.tokens}
        if encoder
        else {"context": arguments.context}
    )
    if encoder and arguments.only:
        arguments.only.append(OnnxFloat32().label)  # what the others are timed against
    contest = make_contest(arguments, arguments.task, settings, arguments.rows)
    calibration = calibration_inputs(contest, arguments.calibration_rows)
    entries, skipped = build_all(contest, encoders() if encoder else language_models(), arguments, calibration)
    if not any(not isinstance(entry.peer, OnnxFloat32) for entry in entries):
        print("pruning.py: nothing was made:\n" + "\n".join(skipped), file=sys.stderr)
        return 1
    text = (
        encoder_text(contest, entries, arguments.speedup, arguments.seconds)
        if encoder
        else language_text(contest, entries, arguments.context, arguments.max_tokens)
    )
    text = "\n\n".join((text, *(f"Left out: {line}." for line in skipped)))
    print(text)
    if not arguments.no_results:
        title = f"Pruning {arguments.model.name} without training"
        write_section(
            f"pruning {arguments.model.name}", title, text, threads=contest.threads, seconds=time.monotonic() - began
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
