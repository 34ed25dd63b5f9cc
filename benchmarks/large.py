"""A model larger than the memory that it may take: rounded to 4 bits beside a plain copy of its files, and by GPTQ.

    python benchmarks/large.py [--params 7B] [--rounds 2] [--work .demo/large]
    python benchmarks/large.py [--params 7B] --rounds 0 --gptq 16 512

The model is Llama-shaped with random weights in bf16 (make_random_llama.py). Copying and rounding take turns, each from
a disk cache without the files, and each until what it wrote is on the disk. Seconds are of the whole command (start,
forecast, proof and report included) and of what stands against copying, reading, rounding and writing the weights; the
peak is that of the largest of its processes. Solving takes an hour and more, and has a section of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contest import megabytes, say
from results import table, write_section

from gossamer.measure.machine import usable_cores

HERE = Path(__file__).parent
ROUND = "- quantize: {bits: 4, group_size: 64, symmetric: false, scale: minmax}\n"
SOLVE = "- gptq: {bits: 4, group_size: 64, refit: false, passes: 0}\n"  # behind it the default takes thrice its time
EVALUATED, EVALUATED_TOKENS = 16, 64  # rows that the proof is shown on
PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""  # of all processes below it the largest (Linux counts KiB)


@dataclass(frozen=True)
class Taken:
    """Hold what a command took: seconds of all of it and of writing the artifact, the most bytes of a process."""

    whole: float
    writing: float
    peak_bytes: int


def forget(folder: Path) -> None:
    """Have the system forget what it holds of some files, so that they are read from disk again."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def copied(model: Path, work: Path) -> Taken:
    """Copy the files as they are."""
    out = work / "copy"
    shutil.rmtree(out, ignore_errors=True)
    forget(model)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(out)], check=True)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return Taken(seconds, seconds, 0)


def applied(model: Path, out: Path, recipe: str, memory: str, more: Sequence[str] = ()) -> Taken:
    """Carry out a recipe as `gossamer apply` does, going on with what `out` holds. Raises CalledProcessError."""
    path = out.with_suffix(".yaml")
    path.write_text(recipe, encoding="utf-8")
    forget(model)
    command = [sys.executable, "-m", "gossamer", "apply", str(path), str(model), "--task", "causal-lm"]
    command += ["--memory", memory, "--out", str(out), *more]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *command], stdout=subprocess.PIPE, text=True, check=True)
    os.sync()
    seconds = time.perf_counter() - began
    journal = [json.loads(line) for line in (out / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    writing = sum(entry["seconds"] for entry in journal if entry["event"] == "written")
    shutil.rmtree(out)
    return Taken(seconds, writing, int(done.stdout.split()[-1]))


def text_rows(path: Path, count: int, tokens: int, seed: int = 0) -> Path:
    """Write rows of so many tokens (a token is a byte here) that are all different."""
    drawn = random.Random(seed)
    rows = [{"text": drawn.randbytes(tokens // 2).hex()} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row_of(name: str, found: Sequence[Taken], copies: Sequence[Taken]) -> list[str]:
    """Return a row of the table: medians, and shares round by round."""
    shares = [f"{100 * copy.writing / one.writing:.0f} %" for one, copy in zip(found, copies, strict=False)]
    return [
        name,
        f"{statistics.median(one.whole for one in found):.0f}",
        f"{statistics.median(one.writing for one in found):.0f}",
        " and ".join(shares),
        f"{max(one.peak_bytes for one in found) / 2**30:.2f}" if found[0].peak_bytes else "",
    ]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", default="7B", help="size of the model, as make_random_llama.py names it")
    parser.add_argument("--rounds", type=int, default=2, help="how often copying and rounding take turns")
    parser.add_argument("--memory", default="2GiB", help="what rounding may take")
    parser.add_argument("--gptq", type=int, nargs=2, metavar=("SAMPLES", "TOKENS"), help="solve with so much besides")
    parser.add_argument("--gptq-memory", default="4GiB", help="what solving may take")
    parser.add_argument("--work", type=Path, default=Path(".demo/large"))
    parser.add_argument("--no-results", action="store_true", help="print the table, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    if arguments.rounds < 1 and not arguments.gptq:
        parser.error("--rounds 0 leaves nothing to do without --gptq SAMPLES TOKENS")
    began, work = time.monotonic(), arguments.work
    model = work / arguments.params
    if not (model / "config.json").exists():
        say(f"writing {model}")
        command = [sys.executable, str(HERE / "make_random_llama.py"), "--params", arguments.params, str(model)]
        subprocess.run(command, check=True)
    size = sum(path.stat().st_size for path in model.iterdir())
    copies, rounded = [], []
    for number in range(arguments.rounds):
        copies.append(copied(model, work))
        shutil.rmtree(work / "rounded", ignore_errors=True)
        rounded.append(applied(model, work / "rounded", ROUND, arguments.memory))
        say(f"{number + 1} of {arguments.rounds}: copied in {copies[-1].whole:.0f} s, {rounded[-1]}")
    rows = []
    if copies:
        rows = [row_of("cp", copies, copies), row_of("int4 group 64, plain", rounded, copies)]
    if arguments.gptq:
        samples, tokens = arguments.gptq
        data = text_rows(work / "rows.jsonl", samples, tokens)
        evaluation = text_rows(work / "evaluation.jsonl", EVALUATED, EVALUATED_TOKENS, seed=1)
        more = ["--data", str(data), "--eval", str(evaluation), "--set", f"context={tokens}"]
        more += ["--calibration-rows", str(samples)]
        name, out = f"int4 group 64, GPTQ, {samples} x {tokens} tokens", work / f"gptq-{arguments.params}"
        if (out / "journal.jsonl").exists():
            name += ", from where a killed run was"
        solved = applied(model, out, SOLVE, arguments.gptq_memory, more)
        rows.append(row_of(name, [solved], copies))
    asked = [f"`--memory {arguments.memory}`"] if copies else []
    asked += [f"GPTQ: `--memory {arguments.gptq_memory}`"] if arguments.gptq else []
    headings = ("", "seconds", "of them writing", "as fast as cp", "peak GiB")
    text = f"{megabytes(size, 0)} MB of bf16 weights, {', '.join(asked)}:\n\n{table(headings, rows)}"
    print(text)
    if not arguments.no_results:
        part = "" if copies else ", GPTQ"
        title = f"A model of {arguments.params} read piece by piece{part}"
        seconds = time.monotonic() - began
        write_section(f"large {arguments.params}{part}", title, text, threads=usable_cores(), seconds=seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
