"""How long other tools' recipes and ours take to round one language model, in turns on one machine.

    python benchmarks/llm_times.py --model .demo/models/smollm2-135m --data calibration.jsonl --eval test.jsonl \\
        --context 512 --max-tokens 10000 --peers llmcompressor --only 'gptq-w4-g64-asym' 'torch, int4 g64, gptq$'

The rows are those of llm.py, all made anew in every round, each in a process of its own. Seconds are llm.py's: of
quantizing, without loading (gossamer's: of making the artifact, loading included).
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time

from build import build_in_child
from contest import say, wanted
from llm import NO_MODEL, Ground, arguments_of, ours, publish
from peer_scripts import run_tool
from results import table

TAKEN = ", of which a gossamer recipe takes as many as its `samples` says (docs/guides/recipes.md), the others all"
HEADINGS = ("", "seconds, round by round", "of the first row's, in each round", "median")


def main() -> int:
    """Run the benchmark."""
    arguments = arguments_of(rounds=True)
    if arguments.model is None:
        print(NO_MODEL)
        return 0
    began = time.monotonic()
    ground = Ground.of(arguments)
    own = [peer for peer in ours(ground.num_calibration, arguments.quick) if wanted(peer, arguments.only)]
    seconds: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        say(f"round {number + 1} of {arguments.rounds}")
        for tool in arguments.peers:
            for kept in ground.inputs.work.glob(f"{tool}-*"):
                shutil.rmtree(kept)
            for outcome in run_tool(tool, ground.inputs, arguments.only):
                if outcome.result is None:
                    sys.exit(f"llm_times.py: {outcome.label} failed: {outcome.failure}")
                seconds.setdefault(outcome.label, []).append(outcome.result["seconds"])
        for peer in own:
            built = build_in_child(peer, ground.material, ground.inputs.work / "timed")
            seconds.setdefault(peer.label, []).append(built.seconds)
        say(str({label: round(values[-1]) for label, values in seconds.items()}))
    if not seconds:
        sys.exit("llm_times.py: no row has a name that --only asks for")
    first = next(iter(seconds.values()))
    rows = []
    for label, values in seconds.items():
        shares = [value / other for value, other in zip(values, first, strict=True)]
        row = [label, " and ".join(f"{value:.0f}" for value in values)]
        row += [" and ".join(f"{share:.2f}" for share in shares), f"{statistics.median(shares):.2f}"]
        rows.append(row)
    given = f"{ground.num_calibration} windows of {arguments.context} tokens to calibrate on{TAKEN}."
    text = f"{given}\n\n{table(HEADINGS, rows)}"
    title = f"Language model {arguments.model.name}: how long rounding takes"
    publish(arguments, f"llm times {arguments.model.name} {arguments.context}", title, text, began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
