"""Language models with rounded weights on an exported graph: this tool beside ONNX Runtime and NNCF.

    python benchmarks/llm_graphs.py --model DIR --data calibration.jsonl --eval test.jsonl --max-tokens 10000

Windows of `--context` tokens are taken evenly from all held-out documents. Every artifact is made in a process of its
own (seconds, peak memory) and opened in another, which scores the windows: perplexity, the share of it kept (paired,
by window), KL(original || artifact) per token over the whole vocabulary on the first windows, and how often the most
likely token is the same. MB are the files that hold weights. The table goes to standard output and into RESULTS.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Contest, Entry, add_arguments, build_all, make_contest, megabytes, say, share
from llm_peers import NncfWeights, OnnxNBits
from numpy.typing import NDArray
from onnx_export import OnnxFloat32
from ours import Gossamer, GossamerOnGraph
from peer import Peer
from results import table, write_section

from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import paired_quality, score_interval
from gossamer.tasks.base import Arrays, Batch, Evaluation, Scores, each
from gossamer.tasks.causal_lm import CausalLM

WEIGHT_SUFFIXES = {".safetensors", ".onnx", ".data", ".bin", ".xml", ".gguf", ".pte"}
HEADINGS = (
    "", "weights MB", "perplexity", "quality kept", "KL, nats a token", "same top token", "made in s", "peak MB",
)  # fmt: skip
NO_MODEL = """llm_graphs.py: skipped, no --model was given. Any Hugging Face folder of a causal language model will do:
    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir .demo/smollm2
with rows of text (jsonl with a `text` column) for --data and --eval:
    python benchmarks/llm_graphs.py --model .demo/smollm2 --data calibration.jsonl --eval test.jsonl"""


def contenders() -> list[Peer]:
    """Return what is compared: other tools first, then our recipes on two runtimes."""
    codes = {"bits": 4, "symmetric": False}
    table8 = {"quantize": {"bits": 8, "targets": ["embedding"]}}
    int8 = ({"quantize": {"bits": 8}}, table8)
    g64 = {"quantize": {**codes, "group_size": 64}}
    g32 = {"quantize": {**codes, "group_size": 32}}
    table4 = {"quantize": {**codes, "group_size": 32, "targets": ["embedding"]}}
    return [
        OnnxFloat32(),
        OnnxNBits(bits=8),
        OnnxNBits(block_size=64),
        OnnxNBits(block_size=32),
        OnnxNBits(block_size=32, embeddings=True),
        NncfWeights(),
        NncfWeights("int4_asym", 64),
        NncfWeights("int4_asym", 64, data_aware=True),
        Gossamer("torch", int8, "int8, embeddings int8", rows=False),
        Gossamer("torch", (g64, table8), "int4 g64, embeddings int8", rows=False),
        GossamerOnGraph("onnxruntime", int8, "int8, embeddings int8", rows=False),
        GossamerOnGraph("onnxruntime", (g64,), "int4 g64, embeddings fp32", rows=False),
        GossamerOnGraph("onnxruntime", (g64, table8), "int4 g64, embeddings int8", rows=False),
        GossamerOnGraph("onnxruntime", (g32, table8), "int4 g32, embeddings int8", rows=False),
        GossamerOnGraph("onnxruntime", (g32, table4), "int4 g32, embeddings int4 g32", rows=False),
    ]


def held_out(contest: Contest, max_tokens: int) -> list[Batch]:
    """Return windows taken evenly from all documents, each a sample of its own, about `max_tokens` scored tokens."""
    task, prepared = contest.prepared.task, contest.prepared
    assert isinstance(task, CausalLM)
    every = CausalLM(context=task.context).batches(prepared.evaluation, prepared.source)
    whole = [batch for batch in every if batch.inputs["input_ids"].shape[1] == task.context] or every
    wanted = min(len(whole), max(2, round(max_tokens / (task.context - 1))))
    picked = [whole[index * len(whole) // wanted] for index in range(wanted)]
    return [Batch(batch.inputs, np.array([index])) for index, batch in enumerate(picked)]


@dataclass
class Divergence:
    """Run an artifact, and on its first `num_windows` windows compare whole distributions with the original's.

    Call the original's first: what it answers is kept (about 100 MB a window). `per_window` [num_windows] then holds
    each later artifact's mean KL(original || artifact) in nats a token.
    """

    num_windows: int
    kept: list[NDArray[Any]] = field(default_factory=list)

    def keeping(self, run: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
        """Return the original's `run`, which keeps its first answers."""

        def kept_run(inputs: Arrays) -> Arrays:
            outputs = run(inputs)
            if len(self.kept) < self.num_windows:
                self.kept.append(outputs["logits"][0, :-1].copy())
            return outputs

        return kept_run

    def comparing(self, run: Callable[[Arrays], Arrays], found: list[float]) -> Callable[[Arrays], Arrays]:
        """Return an artifact's `run`, which puts the mean divergence of its first windows into `found`."""

        def compared_run(inputs: Arrays) -> Arrays:
            outputs = run(inputs)
            if len(found) < len(self.kept):
                found.append(mean_divergence(self.kept[len(found)], outputs["logits"][0, :-1]))
            return outputs

        return compared_run


def mean_divergence(original_TV: NDArray[Any], candidate_TV: NDArray[Any], positions: int = 64) -> float:
    """Return the mean over T positions of KL(p || q) in nats, from logits, summed over the vocabulary in float64."""
    total = 0.0
    for start in range(0, len(original_TV), positions):
        log_p, log_q = (
            torch.log_softmax(torch.from_numpy(part[start : start + positions]).double(), dim=-1)
            for part in (original_TV, candidate_TV)
        )
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(original_TV)


def row_of(
    contest: Contest, entry: Entry, batches: Sequence[Batch], reference: Evaluation, divergence: Divergence
) -> list[str]:
    """Score an artifact on all windows; return its row of the table."""
    say(f"scoring {entry.peer.label}")
    task = contest.prepared.task
    windows: list[float] = []
    with contest.serve(entry) as served:
        evaluation = task.evaluate(each(divergence.comparing(served.run, windows)), batches, reference)
    assert evaluation.agreement is not None
    quality = paired_quality(evaluation.scores, reference.scores, task.metric)
    exact = score_interval(Scores(np.array(windows), np.ones(len(windows))))
    return [
        entry.peer.label,
        megabytes(shipped_bytes(weight_files(entry.built.folder))),
        f"{score_interval(evaluation.scores, task.metric.figure).value:.3f}",
        share(quality, 2),
        f"{exact.value:.4f} ({exact.low:.4f} to {exact.high:.4f})",
        share(score_interval(evaluation.agreement)),
        f"{entry.built.seconds:.0f}",
        megabytes(entry.built.peak_bytes, 0),
    ]


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold weights."""
    return [
        path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES or path.suffix.startswith(".onnx")
    ]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=10_000, help="about so many held-out tokens are scored")
    parser.add_argument("--kl-windows", type=int, default=6, help="windows with KL over the whole vocabulary")
    arguments = parser.parse_args()
    if arguments.model is None:
        print(NO_MODEL)
        return 0
    if arguments.data is None or arguments.evaluation is None:
        parser.error("--model needs --data and --eval")
    began = time.monotonic()
    settings = {"context": arguments.context, "latency_tokens": min(32, arguments.context)}
    contest = make_contest(arguments, "causal-lm", settings, None)
    prepared = contest.prepared
    windows = prepared.task.batches(prepared.calibration, prepared.source)
    evenly = [windows[i * len(windows) // arguments.calibration_rows] for i in range(arguments.calibration_rows)]
    entries, skipped = build_all(contest, contenders(), arguments, [batch.inputs for batch in evenly])
    batches = held_out(contest, arguments.max_tokens)
    divergence = Divergence(min(arguments.kl_windows, len(batches)))
    say("scoring the original")
    with contest.serve_original() as original:
        reference = prepared.task.evaluate(each(divergence.keeping(original.run)), batches)
    own = score_interval(reference.scores, prepared.task.metric.figure)
    first = ["PyTorch fp32 (the original)", megabytes(shipped_bytes(weight_files(arguments.model)))]
    first += [f"{own.value:.3f}", "", "", "", "", ""]
    rows = [row_of(contest, entry, batches, reference, divergence) for entry in entries]
    tokens = int(sum(reference.scores.weights))
    body = [table(HEADINGS, [first, *rows])]
    body.append(
        f"{len(batches)} windows of {arguments.context} tokens, {tokens:,} tokens scored; KL on the first "
        f"{divergence.num_windows}. Peak MB is of the process that makes the files; for gossamer it includes the check."
    )
    body += [f"Left out: {line}." for line in skipped]
    text = "\n\n".join(body)
    print(text)
    if not arguments.no_results:
        key = f"llm-graphs {arguments.model.name} {arguments.context}"
        title = f"Language model {arguments.model.name}, weights only, on an exported graph"
        write_section(key, title, text, threads=contest.threads, seconds=time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
