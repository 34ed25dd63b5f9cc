"""How much faster cuts make a model: what the planner predicts beside what is measured of the files.

    python benchmarks/speedups.py MODEL --task T --data F --eval F [--runtime onnxruntime] [--set max_length=128]

Predictions are those that `optimize` chooses by before it has tried anything: from blocks timed at a few sizes, in the
formats of the recipes, and from layers timed alone. Each recipe is then carried out, and its files are timed in turns
with the original in PyTorch. Which units go changes no time, so they are chosen quickly, and quality is not told.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from contest import say
from results import table, write_section

from gossamer.errors import GossamerError
from gossamer.goal import parse_goal
from gossamer.measure.machine import usable_cores
from gossamer.plan.candidates import Steps, name_of
from gossamer.plan.flow import make_tables
from gossamer.plan.predict import predict
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.plan.profile import profile
from gossamer.plan.proof import refused_by
from gossamer.plan.proposed_cuts import tables_of_blocks
from gossamer.plan.search import prove
from gossamer.recipe import Recipe, Step
from gossamer.run.workspace import Run
from gossamer.techniques.base import SearchSpace
from gossamer.techniques.registry import resolve

GOAL = "latency <= 100%"
NEAR = 0.15  # of the measured speed-up: as near as a prediction should come
COLUMNS = ("", "latency predicted", "measured, of the original's", "speed-up predicted", "measured", "off by")
QUICKLY = {"by": "magnitude", "refit": False}
INT8 = {"quantize": {"bits": 8, "activations": "dynamic"}}


def cut(what: str, to: str) -> Mapping[str, Any]:
    """Return a recipe's step that takes no time to choose by."""
    return {"prune": {"what": what, "to": to, **({} if what == "layers" else QUICKLY)}}


RECIPES: tuple[tuple[Mapping[str, Any], ...], ...] = (
    (cut("ffn", "50%"),),
    (cut("ffn", "25%"),),
    (cut("heads", "50%"),),
    (cut("heads", "67%"), cut("ffn", "50%")),
    (cut("heads", "34%"), cut("ffn", "25%")),
    (cut("layers", "50%"),),
    (cut("layers", "50%"), cut("ffn", "50%")),
    (INT8,),
    (cut("heads", "67%"), cut("ffn", "50%"), INT8),
    (cut("heads", "34%"), cut("ffn", "25%"), INT8),
    (cut("layers", "50%"), INT8),
)


def recipes() -> Iterator[Steps]:
    """Yield the steps of each recipe."""
    for steps in RECIPES:
        named = [(name, dict(settings)) for step in steps for name, settings in step.items()]
        yield tuple(resolve(Recipe(steps=tuple(Step(technique=name, settings=settings) for name, settings in named))))


def rows_of(inputs: Inputs, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Yield for each recipe that the runtime can hold its name, the latency predicted and measured, as shares."""
    goal, prepared = parse_goal(GOAL), prepare(inputs)
    with Run(folder, {"verb": "benchmark", "runtime": inputs.runtime}) as run, opened_job(inputs, prepared, run) as job:
        tables, reference = make_tables(job, goal)
        space = SearchSpace(job.model, job.runtime, job.task, len(job.calibration), frozenset(("latency",)))
        held: list[Steps] = []
        for steps in recipes():
            try:
                refusal = refused_by(job.runtime, job.model, steps)
            except GossamerError as error:  # this model has no such units
                refusal = error.message
            if refusal is None:
                held.append(steps)
            else:
                say(f"left out in {inputs.runtime}: {name_of(steps)}: {refusal}")
        parts = [step for steps in held for step in steps]
        tables = replace(tables, blocks=tables_of_blocks(job, space, held), profile=profile(job, parts, tables.profile))
        for steps in held:
            predicted = predict(tables, steps)
            tried, _ = prove(job, None, steps, predicted, tables.original, reference)
            assert tried.measured is not None
            measured = tried.measured.figures["latency p50 ratio"].value
            say(f"{name_of(steps)}: predicted {predicted.latency_share:.3f}, measured {measured:.3f}")
            yield name_of(steps), predicted.latency_share, measured


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True, dest="evaluation")
    parser.add_argument("--runtime", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the task")
    parser.add_argument("--out", type=Path, default=Path(".demo/bench-speedups"))
    parser.add_argument("--no-results", action="store_true", help="print the table, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    began, parts = time.monotonic(), []
    settings = {key: int(value) for key, value in (one.split("=", 1) for one in arguments.set)}
    for runtime in arguments.runtime:
        folder = arguments.out / f"{arguments.model.name}-{runtime}"
        shutil.rmtree(folder, ignore_errors=True)
        inputs = Inputs(
            model=arguments.model, task=arguments.task, data=arguments.data, evaluation=arguments.evaluation,
            runtime=runtime, task_settings=settings, calibration_rows=32, evaluation_rows=32,
        )  # fmt: skip
        found = list(rows_of(inputs, folder))
        rows = [
            [name, f"{100 * told:.1f} %", f"{100 * took:.1f} %", f"{1 / told:.2f}", f"{1 / took:.2f}",
             f"{100 * (took / told - 1):+.0f} %"]
            for name, told, took in found
        ]  # fmt: skip
        near = sum(abs(took / told - 1) <= NEAR for _, told, took in found)
        summary = f"{near} of {len(found)} predicted speed-ups are within {100 * NEAR:.0f} % of the measured one."
        parts.append(f"In {runtime}:\n\n{table(COLUMNS, rows)}\n\n{summary}")
        shutil.rmtree(folder)
    text = "\n\n".join(parts)
    print(text)
    if not arguments.no_results:
        name = arguments.model.name
        title = f"Speed-ups of {name}, predicted and measured"
        write_section(f"speedups {name}", title, text, threads=usable_cores(), seconds=time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
