"""Weight grids side by side on the layers of a real language model: what each loses of the weights and of the outputs.

For every linear layer of a few blocks, one round-to-nearest with each grid, and two figures in percent:

    weights    |w - w'|^2 / |w|^2
    outputs    (w - w') S (w - w')^T / w S w^T          S: second moments of the layer's input on calibration rows

The table gives their means over layers. `hqq as published` keeps a float zero point for each group, which our files do
not hold: it says what integers cost. Ratios to `mse` are paired by layer, with a 95 % interval over layers.

With `--gptq` weights are solved as the technique `gptq` does it (grids chosen by `mse`, two passes of descent, scales
refitted), and ratios are to int4 in groups of 64. `rank` rows have two thin matrices in bfloat16 beside the codes,
which cost 16 R (O + I) / (O I) bits a weight: 0.61 at rank 16 for weights of 576 x 1536.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from results import FILE, table, write_section
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.measure.machine import usable_cores
from gossamer.models.levels import FORMATS
from gossamer.models.quantized import QuantSpec
from gossamer.techniques.block import observe
from gossamer.techniques.quantize.descend import descend
from gossamer.techniques.quantize.gptq import gptq
from gossamer.techniques.quantize.grid import ScaleSearch, minmax_grid, quantize_weight
from gossamer.techniques.quantize.hqq import BETA, KAPPA, ROUNDS, shrink
from gossamer.techniques.quantize.low_rank import low_rank
from gossamer.techniques.quantize.refit import refit_scales

Round = Callable[[Tensor, Tensor], Tensor]  # (weight, second moments) -> rounded weight
BASE = "int4 group 64 gptq"


def rounded(spec: QuantSpec, scale: ScaleSearch) -> Round:
    """Return what rounds a weight to a grid and back."""
    return lambda weight, _: quantize_weight(weight, spec, scale=scale).dequantize()


def solved(spec: QuantSpec) -> Round:
    """Return what the technique `gptq` makes of a weight."""

    def made(weight: Tensor, second_II: Tensor) -> Tensor:
        codes = refit_scales(weight, second_II, gptq(weight, second_II, spec))
        for _ in range(2):
            codes = refit_scales(weight, second_II, descend(weight, second_II, codes))
        return codes.dequantize()

    return made


def compensated(start: Round, rank: int) -> Round:
    """Return a rounding with two thin matrices beside it (bfloat16) that take off what they can of its error."""

    def made(weight: Tensor, second_II: Tensor) -> Tensor:
        values = start(weight, second_II)
        up_OR, down_RI = low_rank(weight - values, second_II, rank)
        return values + up_OR.bfloat16().float() @ down_RI.bfloat16().float()

    return made


def as_published(spec: QuantSpec) -> Round:
    """Return HQQ with a float zero point and the scale left alone, the constants counted in weights as released."""

    def made(weight: Tensor, second_II: Tensor) -> Tensor:
        del second_II
        groups = weight.reshape(-1, spec.group_size or weight.shape[1])
        scale, zero = minmax_grid(groups, spec)
        beta, best, least = BETA, zero, float("inf")
        for _ in range(ROUNDS):
            codes = (groups / scale + zero).round().clamp(spec.low, spec.high)
            error = groups - (codes - zero) * scale
            if float(error.abs().mean()) >= least:
                break
            least, best = float(error.abs().mean()), zero
            zero = (codes - (groups - shrink(error, beta)) / scale).mean(1, keepdim=True)
            beta *= KAPPA
        codes = (groups / scale + best).round().clamp(spec.low, spec.high)
        return ((codes - best) * scale).view_as(weight)

    return made


def grids(with_gptq: bool) -> dict[str, Round]:
    """Return every grid by the name of its row."""
    found: dict[str, Round] = {}
    if with_gptq:
        for bits, group in ((4, 64), (4, 32), (5, 64)):
            found[f"int{bits} group {group} gptq"] = solved(QuantSpec(bits=bits, symmetric=False, group_size=group))
        for rank in (8, 16, 32):
            found[f"{BASE} + rank {rank}"] = compensated(
                solved(QuantSpec(bits=4, symmetric=False, group_size=64)), rank
            )
        for name, form in FORMATS.items():
            spec = QuantSpec(bits=form.bits, group_size=form.usual_group_size, format=name)
            found[f"{spec} gptq"] = solved(spec)
        return found
    for bits in (4, 3, 2):
        spec = QuantSpec(bits=bits, symmetric=False, group_size=64)
        for scale in ("minmax", "mse", "hqq"):
            found[f"int{bits} group 64 {scale}"] = rounded(spec, scale)
        found[f"int{bits} group 64 hqq as published"] = as_published(spec)
    for name, form in FORMATS.items():
        spec = QuantSpec(bits=form.bits, group_size=form.usual_group_size, format=name)
        for scale in ("minmax", "mse"):
            found[f"{spec} {scale}"] = rounded(spec, scale)
    return found


def windows(model: Path, data: Path, count: int, context: int) -> list[Tensor]:
    """Return token windows [1, context] from the texts of a jsonl file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found: list[Tensor] = []
    for line in data.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :context]
        if ids.shape[1] == context:
            found.append(ids)
        if len(found) == count:
            break
    return found


def errors(weight: Tensor, made: Tensor, second_II: Tensor) -> tuple[float, float]:
    """Return (weights, outputs) in percent."""
    change, weight = (weight - made).double(), weight.double()
    second_II = second_II.double()
    share = float(change.square().sum() / weight.square().sum())
    of_outputs = float(((change @ second_II) * change).sum() / ((weight @ second_II) * weight).sum())
    return 100 * share, 100 * of_outputs


def main() -> None:
    """Measure and write the section of the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="jsonl with `text`")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 9, 19, 29])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--gptq", action="store_true", help="solve with the moments instead of rounding")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    inside = tuple(f"model.layers.{block}." for block in arguments.blocks)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)}
    samples = windows(arguments.model, arguments.data, arguments.windows, arguments.context)

    with torch.no_grad():
        moments = observe(layers, [partial(model, input_ids=ids) for ids in samples])
        made_by = grids(arguments.gptq)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in made_by}
        for name, layer in layers.items():
            for grid, made in made_by.items():
                weight, second_II = layer.weight.detach(), moments[name].second_II
                found[grid].append(errors(weight, made(weight, second_II), second_II))
    base = BASE if arguments.gptq else "mse"
    body = table(("grid", "weights %", "outputs %", f"outputs, of {base}"), [row(grid, found) for grid in found])
    how = "solved by GPTQ" if arguments.gptq else "rounded to nearest"
    title = f"Weight grids on {len(layers)} layers of {arguments.model.name}, {how}"
    print(body)
    seconds = time.monotonic() - began
    key = f"grids {arguments.model.name}{' gptq' if arguments.gptq else ''}"
    write_section(key, title, body, threads=arguments.threads, seconds=seconds, file=arguments.out)


def row(grid: str, found: dict[str, list[tuple[float, float]]]) -> tuple[str, str, str, str]:
    """Return a grid's line of the table; its ratio is to the grid of the same name with `mse`, or to `BASE`."""
    here = torch.tensor(found[grid], dtype=torch.float64)
    compared = next((f"{grid.removesuffix(end)}mse" for end in ENDS if grid.endswith(end)), BASE)
    base = found[compared]
    logs = (here[:, 1] / torch.tensor(base, dtype=torch.float64)[:, 1]).log()
    half = 1.96 * float(logs.std()) / len(logs) ** 0.5
    ratio, low, high = (float(torch.tensor(float(logs.mean()) + way).exp()) for way in (0, -half, half))
    shown = "1" if grid == compared else f"{ratio:.3f} ({low:.3f} to {high:.3f})"
    weights, outputs = here.mean(0).tolist()
    return grid, f"{weights:.3f}", f"{outputs:.3f}", shown


ENDS = ("hqq as published", "minmax", "mse", "hqq")

if __name__ == "__main__":
    main()
