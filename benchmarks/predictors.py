"""Which figure of single layers tells best how far a model of mixed widths moves from the original?

    python benchmarks/predictors.py --model .demo/models/smollm2-135m --data calibration.jsonl --eval test.jsonl

Every linear layer of the blocks is rounded to the nearest (groups of 64, scales by least squared error) to one of six
widths. Random allocations of widths are drawn at a few average widths, and the KL(original || rounded) of each is
measured on held-out windows. A predictor is a table layer x width whose entries are summed over layers:

    output error       (w - w') S (w - w')^T,           S: second moments of the layer's input
    relative error     the same / w S w^T
    Fisher             the output error of each channel times its Fisher information (`sensitivity.py`)
    Fisher, min-max    the same of weights that were rounded with min-max scales, which takes a tenth of the time
    alone              KL of the model in which only this layer is rounded, to ALONE_BITS, on a few calibration windows,
                       carried to the other widths by the layer's output error

Reported is how the sums go with what was measured, over all allocations and among those of equal average width
(95 % intervals by bootstrap over allocations), and the KL of the widths that each predictor chooses for a number of
bytes. There the intervals of ratios are over windows, in pairs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import megabytes, say
from grids import windows
from numpy.typing import NDArray
from results import FILE, table, write_section
from scipy import stats
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gossamer.measure.machine import usable_cores
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.plan.allocation import allocate
from gossamer.runtimes import get_runtime
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.sensitivity import Sensitivity, sensitivities

WIDTHS = (8, 6, 5, 4, 3, 2)
ALONE_BITS = 3
SPREAD = 1.3  # bits that the widths of an allocation lie apart
SLICE = 128  # positions whose logits are compared at once
RESAMPLES = 10_000
PREDICTORS = ("output error", "relative error", "Fisher", "Fisher, min-max", "alone")
TODAY = "Fisher, min-max"  # what the planner uses
Floats = NDArray[np.float64]


@dataclass
class Rounded:
    """Hold a model whose layers may be given any width; `codes` by layer, then width; `bytes` [layers, widths]."""

    model: Any
    layers: dict[str, nn.Linear]
    weights: list[Tensor]
    codes: list[dict[int, Quantized]]
    bytes: NDArray[np.int64]
    rest: int  # bytes of all other parameters: the embedding, which is the head, in 8 bits, norms in 16

    @classmethod
    def of(cls, folder: Path) -> Rounded:
        """Open a model and round every layer to every width."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        layers = {n: m for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)}
        specs = {bits: QuantSpec(bits=bits, symmetric=False, group_size=64) for bits in WIDTHS}
        weights = [layer.weight.detach().clone() for layer in layers.values()]
        codes = [{b: quantize_weight(w, spec, scale="mse") for b, spec in specs.items()} for w in weights]
        size = get_runtime("torch").stored_bytes
        sizes = [[size("linear", tuple(w.shape), spec, 2) for spec in specs.values()] for w in weights]
        rest = size("embedding", tuple(model.model.embed_tokens.weight.shape), QuantSpec(bits=8), 2)
        rest += sum(2 * p.numel() for p in model.parameters() if p.dim() == 1)
        return cls(model, layers, weights, codes, np.array(sizes, dtype=np.int64), rest)

    def put(self, widths: Sequence[int | None]) -> None:
        """Give each layer a width, None being the original weight."""
        for layer, weight, codes, bits in zip(self.layers.values(), self.weights, self.codes, widths, strict=True):
            layer.weight.copy_(weight if bits is None else codes[bits].dequantize())


class Divergence:
    """Measure KL(original || model) in nats a token, window by window."""

    def __init__(self, model: Any, samples: Sequence[Tensor]) -> None:
        self.model, self.samples = model, samples
        self.original = [torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1) for ids in samples]

    def __call__(self) -> Floats:
        """Return the figure of each window with the weights that the model has now."""
        return np.array([self.of(n, self.model(input_ids=ids).logits[0]) for n, ids in enumerate(self.samples)])

    def of(self, number: int, logits: Tensor) -> float:
        """Return the figure of one window by its logits."""
        original, total = self.original[number], 0.0
        for start in range(0, len(original), SLICE):
            p = original[start : start + SLICE]
            q = torch.log_softmax(logits[start : start + len(p)], -1)
            total += float(nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        return total / len(original)


def alone(rounded: Rounded, samples: Sequence[Tensor]) -> Floats:
    """Return the KL of the model with one layer rounded, for each layer; blocks in front are not computed again."""
    model, judge = rounded.model, Divergence(rounded.model, samples)
    blocks = list(model.model.layers)
    calls: list[list[tuple[Tensor, dict[str, Any]]]] = [[] for _ in blocks]  # by block, then window

    def note(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], number: int) -> None:
        calls[number].append((inputs[0], named))

    hooks = [
        block.register_forward_pre_hook(partial(note, number=n), with_kwargs=True) for n, block in enumerate(blocks)
    ]
    judge()
    for hook in hooks:
        hook.remove()
    found = []
    for name, layer, weight, codes in zip(
        rounded.layers, rounded.layers.values(), rounded.weights, rounded.codes, strict=True
    ):
        first = int(name.split(".")[2])
        layer.weight.copy_(codes[ALONE_BITS].dequantize())
        figures = []
        for number, (hidden, _) in enumerate(calls[first]):
            for block in range(first, len(blocks)):
                hidden = blocks[block](hidden, **calls[block][number][1])
            figures.append(judge.of(number, model.lm_head(model.model.norm(hidden))[0]))
        layer.weight.copy_(weight)
        found.append(max(0.0, float(np.mean(figures))))  # a sum in float32 may end below zero
    return np.array(found)


def predictors(rounded: Rounded, known: dict[str, Sensitivity], alone_M: Floats) -> dict[str, Floats]:
    """Return every predictor's table [layers, widths]."""
    found = {name: np.zeros((len(rounded.weights), len(WIDTHS))) for name in PREDICTORS}
    for m, (name, weight) in enumerate(zip(rounded.layers, rounded.weights, strict=True)):
        seen = known[name]
        second_II = seen.moments.second_II
        energy = float(((weight @ second_II) * weight).sum())
        for b, bits in enumerate(WIDTHS):
            change = weight - rounded.codes[m][bits].dequantize()
            error_O = ((change @ second_II) * change).sum(1)
            error = float(error_O.sum())
            found["output error"][m, b], found["relative error"][m, b] = error, error / energy
            found["Fisher"][m, b] = 0.5 * float(seen.fisher_O @ error_O)
            plain = quantize_weight(weight, rounded.codes[m][bits].spec).dequantize()
            found["Fisher, min-max"][m, b] = seen.divergence(weight, plain)
    errors = found["output error"]
    found["alone"] = alone_M[:, None] * errors / errors[:, [WIDTHS.index(ALONE_BITS)]]
    return found


def drawn(rounded: Rounded, average: float, draw: np.random.Generator) -> list[int]:
    """Return the places in WIDTHS of a random allocation whose weights have `average` bits in the mean.

    Kinds of layers, depths and single layers are liked or not at random, so that allocations differ as whole.
    """
    names = [name.split(".") for name in rounded.layers]
    kinds = {kind: draw.normal() for kind in sorted({name[-1] for name in names})}
    depth = np.array([int(name[2]) for name in names])
    wave = np.sin(2 * np.pi * (depth / (depth.max() + 1) * draw.uniform(0, 2) + draw.uniform()))
    liked = np.array([kinds[name[-1]] for name in names]) + draw.normal() * wave + draw.normal(size=len(names))
    liked *= SPREAD / liked.std()
    counts = np.array([weight.numel() for weight in rounded.weights])
    widths = np.array(WIDTHS)

    def nearest(shift: float) -> NDArray[np.int64]:
        return np.abs(widths[None] - (liked + shift)[:, None]).argmin(1)

    low, high = -20.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        above = (widths[nearest(middle)] * counts).sum() / counts.sum() > average
        low, high = (low, middle) if above else (middle, high)
    return [int(place) for place in nearest(low)]


def bounds(figure: Callable[[NDArray[np.int64]], float], groups: Sequence[NDArray[np.int64]]) -> tuple[float, float]:
    """Return the 95 % interval of a figure of allocations by percentile bootstrap, drawn within each group."""
    draw = np.random.default_rng(0)
    figures = [figure(np.concatenate([draw.choice(group, len(group)) for group in groups])) for _ in range(1000)]
    low, high = np.nanpercentile(figures, [2.5, 97.5])
    return float(low), float(high)


def agreement(predicted: Floats, measured: Floats, groups: Sequence[NDArray[np.int64]]) -> list[str]:
    """Return how a predictor goes with what was measured: ranks of all, of equals in width, logarithms, and ratio."""
    log_p, log_q = np.log(predicted), np.log(measured)
    group_of = np.concatenate([np.full(len(group), n) for n, group in enumerate(groups)])

    def within(rows: NDArray[np.int64]) -> float:
        centred = [np.array(each[rows], dtype=np.float64) for each in (log_p, log_q)]
        for values in centred:
            for n in range(len(groups)):
                values[group_of[rows] == n] -= values[group_of[rows] == n].mean()
        return float(stats.pearsonr(*centred).statistic)

    figures: tuple[Callable[[NDArray[np.int64]], float], ...] = (
        lambda rows: float(stats.spearmanr(predicted[rows], measured[rows]).statistic),
        lambda rows: float(stats.pearsonr(log_p[rows], log_q[rows]).statistic),
        within,
    )
    every = np.arange(len(measured))
    cells = []
    for figure in figures:
        low, high = bounds(figure, groups)
        cells.append(f"{figure(every):.3f} ({low:.3f} to {high:.3f})")
    return [*cells, f"{np.median(measured / predicted):.3g}"]


def chosen(
    rounded: Rounded, judge: Divergence, tables: dict[str, Floats], megabytes_asked: Sequence[float]
) -> list[list[str]]:
    """Return a line for each number of bytes and predictor: the KL of the widths that it chooses."""
    lines = []
    for size in megabytes_asked:
        found = {}
        for name, kl in tables.items():
            widths = allocate(kl, rounded.bytes, 1e6 * size - rounded.rest)
            if widths is None:
                sys.exit(f"predictors.py: no widths reach {size:g} MB; {rounded.rest / 1e6:.1f} MB are not rounded")
            rounded.put([WIDTHS[place] for place in widths])
            found[name] = (judge(), widths)
        today = found[TODAY][0]
        for name, (figures, widths) in found.items():
            total = rounded.rest + int(rounded.bytes[np.arange(len(widths)), widths].sum())
            share = "1" if name == TODAY else _of(figures, today)
            lines.append([f"{size:g} MB, {name}", megabytes(total), f"{figures.mean():.4f}", share])
            say(str(lines[-1]))
    return lines


def _of(figures: Floats, others: Floats) -> str:
    draw = np.random.default_rng(0).integers(len(figures), size=(RESAMPLES, len(figures)))
    low, high = np.percentile(figures[draw].mean(1) / others[draw].mean(1), [2.5, 97.5])
    return f"{figures.mean() / others.mean():.3f} ({low:.3f} to {high:.3f})"


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama-shaped Hugging Face model")
    parser.add_argument("--data", type=Path, required=True, help="jsonl with `text`, for the predictors")
    parser.add_argument("--eval", type=Path, required=True, dest="evaluation", help="held-out jsonl with `text`")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=6, help="held-out windows that KL is measured on")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows for Fisher and output errors")
    parser.add_argument("--alone-samples", type=int, default=2, help="calibration windows for layers rounded alone")
    parser.add_argument("--averages", type=float, nargs="+", default=[4.0, 5.0, 6.0], help="mean widths drawn")
    parser.add_argument("--draws", type=int, default=8, help="allocations at each of them")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[105.0, 92.0, 75.0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--no-results", action="store_true", help="print the tables, leave --out as it is")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    say("rounding")
    rounded = Rounded.of(arguments.model)
    held_out = windows(arguments.model, arguments.evaluation, arguments.windows, arguments.context)
    samples = windows(arguments.model, arguments.data, arguments.samples, arguments.context)
    say("Fisher information")
    inputs = [{"input_ids": ids} for ids in samples]
    known = sensitivities(rounded.model, lambda m, sample: m(**sample).logits, inputs, rounded.layers)
    with torch.no_grad():
        say("each layer alone")
        alone_M = alone(rounded, samples[: arguments.alone_samples])
        tables = predictors(rounded, known, alone_M)
        judge = Divergence(rounded.model, held_out)
        draw = np.random.default_rng(0)
        measured, sums = [], {name: [] for name in tables}
        for average in arguments.averages:
            for _ in range(arguments.draws):
                places = drawn(rounded, average, draw)
                rounded.put([WIDTHS[place] for place in places])
                measured.append(float(judge().mean()))
                for name, kl in tables.items():
                    sums[name].append(float(kl[np.arange(len(places)), places].sum()))
                say(
                    f"{average:g} bits: KL {measured[-1]:.4f}, "
                    + ", ".join(f"{n} {s[-1]:.4g}" for n, s in sums.items())
                )
        groups = np.split(np.arange(len(measured)), len(arguments.averages))
        lines = [[name, *agreement(np.array(s), np.array(measured), groups)] for name, s in sums.items()]
        choices = chosen(rounded, judge, tables, arguments.megabytes)
    body = text_of(arguments, lines, choices, len(rounded.layers), measured)
    print(body)
    if not arguments.no_results:
        title = f"What predicts the KL of mixed widths on {arguments.model.name}"
        seconds, key = time.monotonic() - began, f"predictors {arguments.model.name}"
        write_section(key, title, body, threads=arguments.threads, seconds=seconds, file=arguments.out)
    return 0


def text_of(
    arguments: argparse.Namespace,
    lines: list[list[str]],
    choices: list[list[str]],
    num_layers: int,
    measured: Sequence[float],
) -> str:
    """Return both tables and what a reader must know."""
    averages = ", ".join(f"{average:g}" for average in arguments.averages)
    headings = ("", "ranks", "logarithms", "logarithms at equal average width", "measured / predicted")
    return "\n\n".join(
        (
            f"{len(measured)} random allocations of widths over {num_layers} layers, {arguments.draws} each at "
            f"{averages} bits in the mean; their KL is {min(measured):.3f} to {max(measured):.3f} nats a token on "
            f"{arguments.windows} held-out windows of {arguments.context} tokens. Correlations:",
            table(headings, lines),
            "Widths chosen for a number of bytes by each predictor, rounded to the nearest, the embedding not rounded "
            "but counted in 8 bits:",
            table(("", "weights MB", "KL, nats a token", f"of {TODAY}"), choices),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
