"""Our solvers and the reference implementations on the same layers, with the same moments, on the same grids.

    python benchmarks/solvers.py --model .demo/models/smollm2-135m --data calibration.jsonl --eval test.jsonl

The linear layers of a few blocks of the original are taken out, each with the second moments S of its input on
calibration rows. Ours and the references, these in their own environments, then solve one and the same problem:
damping, lazy blocks, counts and (in float32) every scale and zero point are equal. Judged by one code here:

    output error = (w - w') S (w - w')^T / w S w^T

and the same with the moments of held-out rows. Ratios are of single layers, the median (best to worst): below 1 ours
is nearer than the reference. AWQ looks for factors of all readers of one input, so that their errors are summed.
`by default` is what our technique does: scales searched and refitted, codes improved by descent, grids clipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from contest import say
from grids import solved, windows
from peer_scripts import SCRIPTS, TITLES, make_envs, short
from places import DAMPING, EXPONENTS, GRIDS, Place, Solve, write_places
from results import FILE, table, write_section
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gossamer.measure.machine import usable_cores
from gossamer.models.quantized import QuantSpec
from gossamer.techniques.block import observe
from gossamer.techniques.prune.masks import Pattern, kept, wanda_scores
from gossamer.techniques.prune.sparsegpt import sparsegpt
from gossamer.techniques.quantize.awq import Reader, awq_factors, round_clipped, scaled_moments
from gossamer.techniques.quantize.descend import descend_values
from gossamer.techniques.quantize.gptq import gptq, output_error
from gossamer.techniques.quantize.grid import minmax_grid, quantize_weight

SPECS = {name: QuantSpec(**settings) for name, settings in GRIDS.items()}
TWO_OF_FOUR = (2, 4)
TOOLS = ("llmcompressor", "gptqmodel")


@dataclass(frozen=True)
class Contest:
    """Name one problem, our solvers by the name of their row, and the references' solvers by tool.

    The first of a tool's has the same grid and order of channels as ours. `by_place` sums errors over a place's layers.
    """

    title: str
    ours: Mapping[str, Solve]
    references: Mapping[str, tuple[str, ...]]
    by_place: bool = False


@dataclass
class Row:
    """Hold one solver's errors, of each layer or place: on the moments it solved for, and on those of held-out rows."""

    label: str
    seconds: float
    here: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


def nearest(place: Place, grid: str) -> dict[str, Tensor]:
    """Round to the nearest."""
    return {name: quantize_weight(weight, SPECS[grid]).dequantize() for name, weight in place.weights.items()}


def same_gptq(place: Place, grid: str, order: str) -> dict[str, Tensor]:
    """Solve by GPTQ on min-max grids."""
    settings = {"scale": "minmax", "order": order, "damping": DAMPING}
    return {
        name: gptq(weight, place.second_II, SPECS[grid], **settings).dequantize()
        for name, weight in place.weights.items()
    }


def our_gptq(place: Place, grid: str) -> dict[str, Tensor]:
    """Solve as the technique `gptq` does."""
    return {name: solved(SPECS[grid])(weight, place.second_II) for name, weight in place.weights.items()}


def our_awq(place: Place, grid: str, exponents: int, clip: str) -> dict[str, Tensor]:
    """Round behind the factors of AWQ."""
    spec = SPECS[grid]
    readers = [Reader(weight, place.second_II, spec) for weight in place.weights.values()]
    factors = awq_factors(place.mean_abs_I, readers, num_exponents=exponents).factors_I
    second_II = scaled_moments(place.second_II, factors)
    return {
        name: round_clipped(weight * factors, second_II, spec, clip=clip).dequantize() / factors
        for name, weight in place.weights.items()
    }


def our_sparsegpt(place: Place, pattern: Pattern | None, passes: int) -> dict[str, Tensor]:
    """Take half of the weights out by SparseGPT, then fit what stays again."""
    found = {}
    for name, weight in place.weights.items():
        sparse = sparsegpt(weight, place.second_II, 0.5, pattern=pattern, damping=DAMPING)
        found[name] = descend_values(weight, place.second_II, sparse, passes=passes, damping=DAMPING)
    return found


def our_wanda(place: Place, pattern: Pattern | None) -> dict[str, Tensor]:
    """Take half of the weights out by Wanda."""
    return {
        name: weight * kept(wanda_scores(weight, place.second_II), 0.5, pattern)
        for name, weight in place.weights.items()
    }


def contests() -> list[Contest]:
    """Return every problem."""
    found = []
    for grid, order, title in (
        ("int4-g64", "static", "GPTQ, int4 asymmetric in groups of 64, most excited channels first"),
        ("int4-channel", "static", "GPTQ, int4 symmetric per channel, most excited channels first"),
        ("int4-channel", "none", "GPTQ, int4 symmetric per channel, channels as they stand"),
    ):
        ours = {
            "nearest": partial(nearest, grid=grid),
            "same grid": partial(same_gptq, grid=grid, order=order),
            "by default": partial(our_gptq, grid=grid),
        }
        references = {"llmcompressor": (f"gptq {grid} {order}",)}
        if grid == "int4-g64":
            references["gptqmodel"] = (f"gptq {grid} {order}", f"gptq {grid} own")
        found.append(Contest(title, ours, references))
    same = partial(our_awq, grid="int4-g64", exponents=EXPONENTS - 1, clip="none")
    default = partial(our_awq, grid="int4-g64", exponents=EXPONENTS, clip="full")
    ours = {"nearest": partial(nearest, grid="int4-g64"), "same grid": same, "by default": default}
    references = {"llmcompressor": ("awq int4-g64", "awq int4-g64 duo")}
    found.append(Contest("AWQ, int4 asymmetric in groups of 64", ours, references, by_place=True))
    for name, pattern in (("50%", None), ("2:4", TWO_OF_FOUR)):
        ours = {
            "same counts": partial(our_sparsegpt, pattern=pattern, passes=0),
            "by default": partial(our_sparsegpt, pattern=pattern, passes=2),
        }
        found.append(Contest(f"SparseGPT, {name}", ours, {"llmcompressor": (f"sparsegpt {name}",)}))
    for name, pattern in (("50%", None), ("2:4", TWO_OF_FOUR)):
        ours = {"same counts": partial(our_wanda, pattern=pattern)}
        found.append(Contest(f"Wanda, {name}", ours, {"llmcompressor": (f"wanda {name}",)}))
    return found


def gather(arguments: argparse.Namespace) -> tuple[list[Place], dict[str, Tensor]]:
    """Return the places of the chosen blocks, and the second moments of held-out rows by place."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    inside = tuple(f"model.layers.{block}." for block in arguments.blocks)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)}
    seen = []
    for data, count in ((arguments.data, arguments.windows), (arguments.evaluation, arguments.held_out)):
        samples = windows(arguments.model, data, count, arguments.context)
        with torch.no_grad():
            seen.append(observe(layers, [partial(model, input_ids=ids) for ids in samples]))
    readers: dict[int, list[str]] = {}
    for name in layers:
        readers.setdefault(id(seen[0][name]), []).append(name)
    places = []
    for names in readers.values():
        moments = seen[0][names[0]]
        weights = {name: layers[name].weight.detach() for name in names}
        grids = {grid: {name: _grid(weight, spec) for name, weight in weights.items()} for grid, spec in SPECS.items()}
        places.append(Place(names[0], moments.second_II, moments.mean_abs_I, weights, grids))
    return places, {place.name: seen[1][place.name].second_II for place in places}


def _grid(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    scale, zero = minmax_grid(weight.reshape(-1, spec.group_size or weight.shape[1]), spec)
    return scale.view(len(weight), -1), zero.view(len(weight), -1)


@dataclass
class Reference:
    """Hold what a tool made: weights by `SOLVER/LAYER`, seconds by solver, versions; or why there is nothing."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failure: str = ""


def reference(tool: str, problems: Path, arguments: argparse.Namespace) -> Reference:
    """Return what a tool makes of all places, in its own environment."""
    say(f"running {TITLES[tool]}")
    try:
        make_envs.make(tool, arguments.envs.resolve() / tool, arguments.threads)
    except make_envs.EnvironmentFailed as error:
        return Reference(failure=f"no environment: {short(str(error))}")
    out = problems.with_name(f"{tool}.safetensors")
    command = [make_envs.python_of(arguments.envs.resolve() / tool), SCRIPTS / f"solve_{tool}.py"]
    command += ["--places", problems, "--out", out, "--threads", arguments.threads]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        say(done.stderr[-3000:])
        return Reference(failure=short(done.stderr))
    with safe_open(out, framework="pt") as file:
        seconds, versions = (json.loads(file.metadata()[name]) for name in ("seconds", "versions"))
        return Reference({name: file.get_tensor(name) for name in file.keys()}, seconds, versions)  # noqa: SIM118


@dataclass(frozen=True)
class Judge:
    """Hold what every solution is judged by."""

    places: Sequence[Place]
    held_out: Mapping[str, Tensor]

    def row(self, label: str, contest: Contest, solution: Callable[[str], Tensor], seconds: float) -> Row:
        """Return a solver's errors; `solution` gives the weight that it made of a layer."""
        row = Row(label, seconds)
        for place in self.places:
            groups = [list(place.weights)] if contest.by_place else [[name] for name in place.weights]
            for names in groups:
                pairs = [(place.weights[name], solution(name)) for name in names]
                row.here.append(_share(pairs, place.second_II))
                row.held_out.append(_share(pairs, self.held_out[place.name]))
        return row

    def ours(self, label: str, contest: Contest, solve: Solve) -> Row:
        """Solve by one of ours and return its errors."""
        began, found = time.monotonic(), {}
        for place in self.places:
            found |= solve(place)
        return self.row(label, contest, found.__getitem__, time.monotonic() - began)

    def theirs(self, label: str, contest: Contest, solver: str, made: Reference) -> Row:
        """Return the errors of a reference's solver."""
        return self.row(label, contest, lambda name: made.weights[f"{solver}/{name}"], made.seconds[solver])


def _share(pairs: Sequence[tuple[Tensor, Tensor]], second_II: Tensor) -> float:
    lost = sum(output_error(weight, made, second_II) for weight, made in pairs)
    whole = sum(output_error(weight, torch.zeros_like(weight), second_II) for weight, _ in pairs)
    return 100 * lost / whole


def rows_of(contest: Contest, judge: Judge, made: Mapping[str, Reference]) -> list[list[str]]:
    """Return a contest's lines of the table."""
    say(contest.title)
    ours = [judge.ours(f"**gossamer**, {name}", contest, solve) for name, solve in contest.ours.items()]
    theirs: dict[str, list[Row]] = {tool: [] for tool in made}
    for tool, solvers in contest.references.items():
        if tool in made and not made[tool].failure:
            theirs[tool] = [
                judge.theirs(f"{TITLES[tool]}, {solver}", contest, solver, made[tool]) for solver in solvers
            ]
    lines = [[f"*{contest.title}*", *([""] * (3 + 2 * len(made)))]]
    for row in (*(row for rows in theirs.values() for row in rows), *ours):
        ratios = []
        for tool in made:
            compared = theirs[tool][0] if row in ours and theirs[tool] else None
            ratios += ["", ""] if compared is None else _ratios(row, compared)
        errors = (f"{statistics.fmean(values):.3f}" for values in (row.here, row.held_out))
        lines.append([row.label, *errors, *ratios, f"{row.seconds:.1f}"])
    return lines


def _ratios(row: Row, reference: Row) -> list[str]:
    """Return the median, best and worst ratio of a solver's errors to another's, here and on held-out rows."""
    cells = []
    for mine, theirs in ((row.here, reference.here), (row.held_out, reference.held_out)):
        shares = [one / other for one, other in zip(mine, theirs, strict=True)]
        cells.append(f"{statistics.median(shares):.4f} ({min(shares):.4f} to {max(shares):.4f})")
    return cells


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="jsonl with `text`, to calibrate on")
    parser.add_argument("--eval", type=Path, required=True, dest="evaluation", help="held-out jsonl with `text`")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--windows", type=int, default=32, help="of calibration rows")
    parser.add_argument("--held-out", type=int, default=13, help="windows of held-out rows")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--peers", nargs="*", choices=TOOLS, default=TOOLS, help="which references")
    parser.add_argument("--envs", type=Path, default=Path(".demo/peers"), help="where the environments are, or go")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--no-results", action="store_true", help="print the table, leave --out as it is")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    say("gathering moments")
    places, held_out = gather(arguments)
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder) / "places.safetensors"
        write_places(problems, places)
        made = {tool: reference(tool, problems, arguments) for tool in arguments.peers}
    judge = Judge(places, held_out)
    with torch.no_grad():
        lines = [line for contest in contests() for line in rows_of(contest, judge, made)]
    compared = [heading for tool in made for heading in (f"of {TITLES[tool]}", "held out")]
    parts = [table(("", "outputs %", "held out %", *compared, "s"), lines)]
    parts += [f"{TITLES[tool]}: {one.failure}" for tool, one in made.items() if one.failure]
    parts.append(
        f"{sum(len(place.weights) for place in places)} linear layers of blocks {', '.join(map(str, arguments.blocks))}"
        f", {arguments.windows} calibration and {arguments.held_out} held-out windows of {arguments.context} tokens. "
        "Errors are means over layers. Ratios to a tool are to the first of its rows."
    )
    versions = {name: found for one in made.values() for name, found in one.versions.items() if name != "torch"}
    parts.append("Versions: " + ", ".join(f"{name} {found}" for name, found in versions.items()) + ".")
    body = "\n\n".join(parts)
    print(body)
    if not arguments.no_results:
        title = f"Our solvers and the reference implementations on layers of {arguments.model.name}"
        seconds = time.monotonic() - began
        key = f"solvers {arguments.model.name}"
        write_section(key, title, body, threads=arguments.threads, seconds=seconds, file=arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
