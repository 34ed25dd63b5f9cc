"""Language models with rounded weights: this tool beside every peer, each in an environment of its own.

    python benchmarks/llm.py --model .demo/models/smollm2-135m --data calibration.jsonl --eval test.jsonl \\
        --context 512 --max-tokens 40000 --peers hqq,torchao --envs .demo/peers

All get the same calibration windows and are scored on the same held-out windows, spread evenly over all documents, by
the same code (peers/scoring.py), after what they saved was opened again in a fresh process: perplexity, mean
KL(original || quantized) in nats a token over the whole vocabulary, and how often the most likely token is the same.
MB are all files that hold weights, with whatever a tool leaves unrounded. Seconds are of quantizing, without loading
(gossamer's: of making the artifact, loading included). A result is kept and reused. A tool that could not be installed
or failed has a row that says so. `--part` gives some rows a section of their own, where all do not fit one sitting: KLs
compare across sections that were scored on the same windows. The weight compression of ONNX Runtime and NNCF on one
exported graph: llm_graphs.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from build import BuildError, build_in_child
from contest import Contest, Entry, megabytes, say, share, wanted
from numpy.typing import NDArray
from ours import Gossamer, GossamerOfSize
from peer import Material
from peer_scripts import TITLES, Inputs, Outcome, run_tool, short
from results import FILE, table, write_section
from scoring import score

from gossamer.measure.machine import installed_version, usable_cores
from gossamer.measure.size import shipped_bytes
from gossamer.measure.statistics import score_interval
from gossamer.plan.prepare import Inputs as Prepare
from gossamer.plan.prepare import prepare
from gossamer.tasks.base import Scores
from gossamer.tasks.causal_lm import CausalLM

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".gguf"}
HEADINGS = ("", "weights MB", "perplexity", "KL, nats a token", "same top token", "made in s", "peak MiB")
NO_MODEL = """llm.py: skipped, no --model was given. Any Hugging Face folder of a causal language model will do:
    hf download HuggingFaceTB/SmolLM2-135M --local-dir .demo/models/smollm2-135m
with rows of text (jsonl with a `text` column) for --data and --eval:
    python benchmarks/llm.py --model .demo/models/smollm2-135m --data calibration.jsonl --eval test.jsonl"""
SIZES = (145, 105, 92, 75, 60)  # megabytes of all weights that mixed widths are chosen for
Windows = NDArray[np.int64]


@dataclass(frozen=True)
class Ground:
    """Hold what all tools are given: the original and our rows, the windows, and the same in files for the peers."""

    contest: Contest
    windows: Windows  # held out
    num_calibration: int
    inputs: Inputs
    material: Material

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Ground:
        """Read model and rows, and write the windows for the peers."""
        settings = {"context": arguments.context}
        wish = Prepare(
            model=arguments.model,
            task="causal-lm",
            data=arguments.data,
            evaluation=arguments.evaluation,
            task_settings=settings,
            calibration_rows=arguments.calibration_windows,
            evaluation_rows=None,
        )
        work = (arguments.work / arguments.model.name).resolve()
        work.mkdir(parents=True, exist_ok=True)
        contest = Contest(prepare(wish), settings, arguments.threads, work)
        windows = held_out(contest, arguments.context, arguments.max_tokens)
        calibration = calibration_windows(contest, arguments.context, arguments.calibration_windows)
        np.save(work / "calibration.npy", calibration)
        np.savez(work / "evaluation.npz", windows=windows)
        inputs = Inputs(
            model=arguments.model.resolve(),
            fingerprint=contest.prepared.source.fingerprint,
            calibration=work / "calibration.npy",
            evaluation=work / "evaluation.npz",
            envs=arguments.envs.resolve(),
            work=work,
            threads=arguments.threads,
            quick=arguments.quick,
        )
        material = Material(
            model=str(inputs.model),
            graph=None,
            inputs="",
            data=str(arguments.data.resolve()),
            evaluation=str(arguments.evaluation.resolve()),
            task=contest.prepared.task.name,
            task_settings=settings,
            calibration_rows=arguments.calibration_windows,
        )
        return cls(contest, windows, len(calibration), inputs, material)


def ours(samples: int, quick: bool) -> list[Gossamer]:
    """Return our own recipes: linear layers in groups of 64 with the embedding, the head too, in int8; and GGUF's."""
    embedding = {"quantize": {"bits": 8, "targets": ["embedding"]}}
    grid = {"symmetric": False, "group_size": 64}
    calibrated = {**grid, "ignore": ["head"]}
    steps = (1,) if quick else (50, 200)
    found = [
        Gossamer("torch", ({"quantize": {"bits": 8}}, embedding), "int8", rows=False),
        Gossamer("torch", ({"quantize": {"bits": 4, **grid}}, embedding), "int4 g64, nearest", rows=False),
    ]
    tuned = {"tune_scales": {"samples": samples, "epochs": 1 if quick else 2}}
    for bits in (8, 5, 4, 3, 2):
        found.append(Gossamer("torch", ({"gptq": {"bits": bits, **calibrated}}, embedding), f"int{bits} g64, gptq"))
    every = {"gptq": {"bits": 4, **calibrated, "samples": samples}}
    found.append(Gossamer("torch", (every, embedding), f"int4 g64, gptq, {samples} samples"))
    for bits in (4, 3, 2):
        recipe = ({"gptq": {"bits": bits, **calibrated}}, embedding, tuned)
        found.append(Gossamer("torch", recipe, f"int{bits} g64, gptq, tune_scales"))
    for bits, num_steps in [(4, num_steps) for num_steps in steps] + [(3, steps[-1]), (2, steps[-1])]:
        settings = {"bits": bits, **calibrated, "steps": num_steps}
        name = f"int{bits} g64, learned_rounding, {num_steps} steps"
        found.append(Gossamer("torch", ({"learned_rounding": settings}, embedding), name))
    learned: dict[str, Any] = {"learned_rounding": {"bits": 4, **calibrated, "steps": steps[-1]}}
    solved: dict[str, Any] = {"gptq": {"bits": 4, **calibrated}}
    for recipe in ((solved, embedding), (solved, embedding, tuned), (learned, embedding, tuned)):
        title = ", ".join(["mixed g64", *recipe[0], *(["tune_scales"] if tuned in recipe else [])])
        found += [GossamerOfSize("torch", recipe, title, megabytes=size) for size in SIZES]
    table = {"gguf": {"format": "q6_k", "targets": ["embedding"], "importance": False}}
    mixed = {"format_of": [["q6_k", ["v", "down"]]]}
    for name, more in (("q4_0", {}), ("q4_k", {}), ("q4_k", mixed), ("q6_k", {})):
        title = f"{name}{', q6_k for v and down' if more else ''}, q6_k embedding"
        found.append(Gossamer("gguf", ({"gguf": {"format": name, **more}}, table), title))
    return found


def held_out(contest: Contest, context: int, max_tokens: int) -> Windows:
    """Return whole windows [N, context] taken evenly from all documents, about `max_tokens` scored tokens."""
    batches = CausalLM(context=context).batches(contest.prepared.evaluation, contest.prepared.source)
    whole = whole_windows([batch.inputs for batch in batches], context)
    count = min(len(whole), max(2, round(max_tokens / (context - 1))))
    return whole[[index * len(whole) // count for index in range(count)]]


def calibration_windows(contest: Contest, context: int, count: int) -> Windows:
    """Return the windows [N, context] that gossamer's own recipes calibrate on."""
    prepared = contest.prepared
    batches = prepared.task.calibration(prepared.calibration, prepared.source, count)
    return whole_windows([batch.inputs for batch in batches], context)


def whole_windows(inputs: Sequence[Mapping[str, Any]], context: int) -> Windows:
    """Return those of full length, stacked."""
    whole = [each["input_ids"][0] for each in inputs if each["input_ids"].shape[1] == context]
    if len(whole) < 2:
        sys.exit(f"llm.py: {len(whole)} windows of {context} tokens where 2 are needed\nhint: lower --context")
    return np.stack(whole).astype(np.int64)


def run_ours(contest: Contest, peer: Gossamer, material: Material, windows: Windows) -> Outcome:
    """Return the outcome of one of our recipes, scored as the peers are."""
    folder = contest.out / ("gossamer-" + hashlib.sha256(peer.label.encode()).hexdigest()[:12])
    kept = folder.with_suffix(".scores.json")
    asked = {"windows": hashlib.sha256(windows.tobytes()).hexdigest(), "source": contest.prepared.source.fingerprint}
    try:
        say(f"running {peer.label}")
        built = build_in_child(peer, material, folder.resolve(), reuse=True)
    except BuildError as error:
        say(str(error))
        return Outcome(peer.label, failure=short(str(error)))
    asked["built"] = f"{built.seconds} {built.peak_bytes}"
    if kept.exists() and (found := json.loads(kept.read_text()))["asked"] == asked:
        return Outcome(peer.label, found["result"])
    with contest.serve_original() as original, contest.serve(Entry(peer, built)) as served:
        scores = score(rows_of(original.run), rows_of(served.run), windows)
    result = {
        "bytes": shipped_bytes(weight_files(built.folder)),
        "seconds": built.seconds,
        "peak_mib": built.peak_bytes / 2**20,
        "by_window": vars(scores),
        "versions": {"gossamer": installed_version("gossamer") or "?"},
        **scores.figures(),
    }
    kept.write_text(json.dumps({"asked": asked, "result": result}))
    return Outcome(peer.label, result)


def rows_of(run: Callable[[Any], Any]) -> Callable[[Windows], Any]:
    """Return token ids [tokens] -> logits [tokens, V] of one of our served models."""

    def logits(window: Windows) -> Any:
        ids = window[None]
        return run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"][0]

    return logits


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold weights."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES]


def row_of(outcome: Outcome) -> list[str]:
    """Return an outcome's row of the table; bounds are over windows."""
    result = outcome.result
    if result is None:
        return [outcome.label, f"failed: {outcome.failure}", *([""] * (len(HEADINGS) - 2))]
    sums = {name: np.array(values, dtype=np.float64) for name, values in result["by_window"].items()}
    tokens = sums["tokens"]
    perplexity = score_interval(Scores(-sums["loss"], tokens), CausalLM.metric.figure)
    divergence = score_interval(Scores(sums["divergence"], tokens))
    return [
        outcome.label,
        megabytes(result["bytes"]),
        f"{perplexity.value:.2f} ({perplexity.low:.2f} to {perplexity.high:.2f})",
        f"{divergence.value:.4f} ({divergence.low:.4f} to {divergence.high:.4f})",
        share(score_interval(Scores(sums["agreement"], tokens))),
        f"{result['seconds']:.0f}",
        f"{result['peak_mib']:.0f}",
    ]


def text_of(outcomes: Sequence[Outcome], model: Path, shapes: str) -> str:
    """Return the table by bytes, failures last, and what a reader must know below it."""
    made = sorted((one for one in outcomes if one.result), key=lambda one: one.result["bytes"] if one.result else 0)
    failed = [one for one in outcomes if one.result is None]
    originals = [one.result["original_perplexity"] for one in made if one.result]
    middle = float(np.median(originals)) if originals else float("nan")
    first = ["the original in float32", megabytes(shipped_bytes(weight_files(model))), f"{middle:.2f}", "0", "", "", ""]
    rows = [row_of(one) for one in made]
    parts = [table(HEADINGS, [*rows, first, *map(row_of, failed)]), shapes]
    for one, found in zip(made, originals, strict=True):
        if abs(found / middle - 1) > 1e-3:  # another library reads the same model differently: not its rounding's fault
            parts.append(f"{one.label}: in this environment the original itself has perplexity {found:.2f}.")
    parts.append("Versions: " + "; ".join(versions_of(made)) + ".")
    return "\n\n".join(parts)


def versions_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Return one phrase for each set of versions."""
    found = []
    for one in outcomes:
        assert one.result is not None
        versions = {name: version for name, version in one.result["versions"].items() if name != "python"}
        own = [f"{name} {version}" for name, version in versions.items() if name not in ("torch", "transformers")]
        under = [f"{name} {version}" for name, version in versions.items() if name in ("torch", "transformers")]
        found.append(", ".join(own) + (f" (with {', '.join(under)})" if under else ""))
    return sorted(set(found))


def arguments_of(rounds: bool = False) -> argparse.Namespace:
    """Read the command line, with a number of rounds where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--data", type=Path, help="rows to calibrate on")
    parser.add_argument("--eval", type=Path, dest="evaluation", help="held-out rows to score on")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=40_000, help="about so many held-out tokens are scored")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--peers", default=",".join(TITLES), help="comma-separated; '' for gossamer alone")
    parser.add_argument("--envs", type=Path, default=Path(".demo/peers"), help="where their environments are, or go")
    parser.add_argument("--work", type=Path, default=Path(".demo/bench-llm"), help="where what was made is kept")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only rows whose name contains one of these ($: ends)"
    )
    if rounds:
        parser.add_argument("--rounds", type=int, default=2, help="how often all rows are made")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=FILE, help="the file whose section is replaced")
    parser.add_argument("--part", default="", help="what these rows are: a section of its own beside the others'")
    parser.add_argument("--no-results", action="store_true", help="print the table, leave --out as it is")
    parser.add_argument("--quick", action="store_true", help="one iteration each, results not written")
    arguments = parser.parse_args()
    if arguments.model is not None and (arguments.data is None or arguments.evaluation is None):
        parser.error("--model needs --data and --eval")
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    if unknown := sorted(set(arguments.peers) - set(TITLES)):
        parser.error(f"unknown peers {', '.join(unknown)}; known are {', '.join(TITLES)}")
    return arguments


def publish(arguments: argparse.Namespace, key: str, title: str, text: str, began: float) -> None:
    """Print a benchmark's text and put it into the file of results, where that is wanted."""
    print(text)
    if not arguments.no_results and not arguments.quick:
        seconds = time.monotonic() - began
        write_section(key, title, text, threads=arguments.threads, seconds=seconds, file=arguments.out)


def main() -> int:
    """Run the benchmark."""
    arguments = arguments_of()
    if arguments.model is None:
        print(NO_MODEL)
        return 0
    began = time.monotonic()
    ground = Ground.of(arguments)
    contest, windows, inputs = ground.contest, ground.windows, ground.inputs
    outcomes = [outcome for tool in arguments.peers for outcome in run_tool(tool, inputs, arguments.only)]
    own = [peer for peer in ours(ground.num_calibration, arguments.quick) if wanted(peer, arguments.only)]
    outcomes += [run_ours(contest, peer, ground.material, windows) for peer in own]
    shapes = (
        f"{len(windows)} windows of {arguments.context} tokens scored ({windows[:, 1:].size:,} tokens), "
        f"{ground.num_calibration} windows to calibrate on. Bounds are over windows."
    )
    text = text_of(outcomes, arguments.model, shapes)
    part = f": {arguments.part}" if arguments.part else ""
    title = f"Language model {arguments.model.name}, weights only, beside tools in their own environments{part}"
    publish(arguments, f"llm {arguments.model.name} {arguments.context}{part}", title, text, began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
