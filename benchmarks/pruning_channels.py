"""Channels of convolutions cut from real networks: beside Torch-Pruning's importances, and predicted beside measured.

    python benchmarks/pruning_channels.py quality MODEL TRAIN TEST    # a folder, two parquet files of labelled pictures
    python benchmarks/pruning_channels.py latency MODEL TRAIN TEST --out DIR [--threads 2]
    python benchmarks/pruning_channels.py latency NETWORK.py FOLDER TRAIN --out DIR [--threads 2]

`quality` cuts the same share of every group of channels with our ways of choosing and with Torch-Pruning's, from the
same calibration pictures and without training: all networks of a share have the same shapes. Accuracies are of the same
test pictures; differences are paired, with 95 % intervals.

`latency` carries a recipe out for ONNX Runtime and sets the latency that the planner predicts from its table of layer
times beside the measured one; channels are chosen by magnitude, since which they are changes no time. A NETWORK.py has
`load(folder)` and takes pictures as `x` (of maps that it returns the means stand for classes); fashion pictures,
enlarged to 224 x 224, stand for its own: of such a network only shapes and times are told.
"""

from __future__ import annotations

import argparse
import math
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import table, write_section
from torch import Tensor, nn

from gossamer import api
from gossamer.data.columns import bind_columns
from gossamer.data.rows import read_rows
from gossamer.models.candidate import Candidate
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.recipe import Recipe, Step
from gossamer.run.progress import Silent
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context
from gossamer.techniques.prune.prune import Prune

TASK = get_task("image-classification")
SHARES = ("75%", "50%")
CALIBRATION, TESTED = 128, 2000
QUICKLY = {"by": "magnitude", "refit": False}
OURS: dict[str, dict[str, Any]] = {
    "obs": {},
    "fisher": {"by": "fisher"},
    "activation": {"by": "activation"},
    "magnitude": {"by": "magnitude"},
    "magnitude, nothing made up for": QUICKLY,
}


def quality(model: str, train: str, test: str) -> str:
    """Return tables of accuracies."""
    source = Source.open(model)
    calibration = batches(train, source, CALIBRATION, 1)
    tested = batches(test, source, TESTED, 100)
    before = right(source.module(TASK), source, tested)
    parts = [f"As it is {100 * before.mean():.1f} % of {len(before)} pictures are told right."]
    for share in SHARES:
        found = {f"**gossamer** {name}": ours(source, calibration, share, more) for name, more in OURS.items()}
        found |= {f"Torch-Pruning {name}": make(share) for name, make in theirs(source, calibration).items()}
        counts = {sum(values.numel() for values in module.parameters()) for module in found.values()}
        scores = {name: right(module, source, tested) for name, module in found.items()}
        best = max((name for name in scores if name.startswith("Torch")), key=lambda name: scores[name].mean())
        rows = []
        for name, score in scores.items():
            away = score - scores[best]
            interval = 1.96 * away.std(ddof=1) / math.sqrt(len(away))
            rows.append([name, f"{100 * score.mean():.1f}", f"{100 * away.mean():+.1f} ± {100 * interval:.1f}"])
        headings = (f"{share} of the channels, {' or '.join(map(str, sorted(counts)))} parameters", "right, %",
                    f"points more than {best}")  # fmt: skip
        parts.append(table(headings, rows))
    return "\n\n".join(parts)


def batches(data: str, source: Source, count: int, size: int) -> list[Batch]:
    """Return evenly spread rows of a file as batches."""
    rows = bind_columns(read_rows(data), TASK, {})
    picked = [rows[number * len(rows) // count] for number in range(count)]
    return TASK.batches(picked, source, batch_size=size)


def right(module: nn.Module, source: Source, tested: list[Batch]) -> np.ndarray[Any, Any]:
    """Return 1.0 for each picture that is told right."""
    found = []
    with torch.no_grad():
        for batch in tested:
            logits = source.forward(module, {"pixel_values": torch.from_numpy(batch.inputs["pixel_values"])})
            found.append(logits.argmax(-1).numpy() == batch.targets["labels"])
    return np.concatenate(found).astype(np.float64)


def ours(source: Source, calibration: list[Batch], share: str, more: dict[str, Any]) -> nn.Module:
    """Return the network cut by `prune`."""
    candidate = Candidate(source=source, module=source.module(TASK))
    example = {name: torch.from_numpy(values) for name, values in calibration[0].inputs.items()}
    model = map_model(candidate.module, example, source.forward)
    context = Context(task=TASK, example=calibration[0].inputs, calibration=calibration, progress=Silent())
    return Prune(what="channels", to=share, **more).apply(candidate, model, context).module


def theirs(source: Source, calibration: list[Batch]) -> dict[str, Callable[[str], nn.Module]]:
    """Return how networks are cut by each of Torch-Pruning's importances."""
    import torch_pruning as tp

    importances = {
        "magnitude": tp.importance.MagnitudeImportance(p=2),
        "scale of batch norms": tp.importance.BNScaleImportance(),
        "LAMP": tp.importance.LAMPImportance(),
        "geometric median": tp.importance.FPGMImportance(),
        "Taylor": tp.importance.TaylorImportance(),
        "Hessian": tp.importance.HessianImportance(),
    }

    def cut(importance: Any, share: str) -> nn.Module:
        module = source.module(TASK)
        module.requires_grad_(True)
        example = torch.from_numpy(calibration[0].inputs["pixel_values"])
        pruner = tp.pruner.BasePruner(
            module,
            example,
            importance=importance,
            pruning_ratio=1 - float(share.rstrip("%")) / 100,
            ignored_layers=[part for part in module.modules() if isinstance(part, nn.Linear)],
            output_transform=lambda output: output.logits,
        )
        hessian = isinstance(importance, tp.importance.HessianImportance)
        if hessian:
            importance.zero_grad()
        for loss in losses(module, calibration):
            if hessian:
                module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if hessian:
                importance.accumulate_grad(module)
        pruner.step()
        module.requires_grad_(False)
        return module.eval()

    return {name: lambda share, each=each: cut(each, share) for name, each in importances.items()}


def losses(module: nn.Module, calibration: list[Batch]) -> Iterator[Tensor]:
    """Yield the loss of each calibration picture."""
    for batch in calibration:
        logits = module(pixel_values=torch.from_numpy(batch.inputs["pixel_values"])).logits
        yield nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets["labels"]))


def latency(model: str, train: str, test: str, out: Path, threads: int, shares: list[str]) -> str:
    """Return a table of predicted and measured latencies, parameters and operations of a model cut to each share."""
    given: dict[str, Any] = {"task": "image-classification", "runtime": "onnxruntime", "threads": threads}
    if model.endswith(".py"):
        network = runpy.run_path(model)["load"](train)
        given |= {"model": network, "forward": lambda module, inputs: classes(module(inputs["pixel_values"]))}
        rows = enlarged(test, 128, network)
        given |= {"data": rows[:64], "evaluation": rows[64:], "calibration_rows": 32}
    else:
        given |= {"model": model, "data": train, "evaluation": test, "evaluation_rows": 64, "calibration_rows": 32}
    told: list[list[str]] = []
    for share in shares:
        folder = out / f"{Path(model).stem}-{share.rstrip('%')}"
        recipe = Recipe(steps=(Step(technique="prune", settings={"what": "channels", "to": share, **QUICKLY}),))
        goal = "latency <= 100%"
        planned = api.plan(**given, goal=goal, recipe=recipe, out=folder)
        found = api.apply(recipe, **given, goal=goal, out=folder)
        predicted, measured = planned.candidates[0].predicted, found.tried[0].measured
        original = found.original
        if measured is None or original is None or original.same_runtime_latency is None:
            raise SystemExit(f"{share}: not measured: {found.tried[0].rejected or found.reason}")
        unchanged = original.same_runtime_latency.p50
        foretold, took = predicted.latency_seconds, measured.latency.p50
        told.append([
            share,
            f"{predicted.num_parameters / 1e6:.2f} of {original.num_parameters / 1e6:.2f}",
            f"{predicted.macs / 1e6:.0f} of {original.macs / 1e6:.0f}",
            f"{1e3 * unchanged:.2f}",
            f"{1e3 * foretold:.2f}",
            f"{1e3 * took:.2f}",
            f"{unchanged / foretold:.2f}",
            f"{unchanged / took:.2f}",
            f"{100 * (foretold / took - 1):+.0f} %",
        ])  # fmt: skip
        print(" | ".join(told[-1]), flush=True)
    headings = ("channels", "million parameters", "million multiply-accumulates", "ms, unchanged", "ms, predicted",
                "ms, measured", "speed-up predicted", "measured", "predicted ms, off by")  # fmt: skip
    return "A picture at a time in ONNX Runtime, float32, medians.\n\n" + table(headings, told)


def classes(output: Tensor) -> Tensor:
    """Return logits of classes: as they are, or the means of maps [N, C, H, W]."""
    return output.mean((2, 3)) if output.dim() == 4 else output


def enlarged(data: str, count: int, network: nn.Module) -> list[dict[str, Any]]:
    """Return pictures as prepared pixels [3, 224, 224] with the network's own answers as labels."""
    rows = bind_columns(read_rows(data), TASK, {})[:count]
    found = []
    for row in rows:
        picture = row["image"]
        if isinstance(picture, dict):
            import io

            from PIL import Image

            picture = Image.open(io.BytesIO(picture["bytes"]))
        pixels = np.asarray(picture.convert("RGB").resize((224, 224)), np.float32)
        pixels = ((pixels - 127) / 128).transpose(2, 0, 1).copy()
        with torch.no_grad():
            label = int(classes(network(torch.from_numpy(pixels)[None])).argmax())
        found.append({"image": pixels, "label": label})
    return found


def main() -> None:
    """Read the command line and run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "latency"))
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shares", nargs="+", default=list(SHARES))
    parser.add_argument("--no-results", action="store_true", help="print the table, leave RESULTS.md as it is")
    asked = parser.parse_args()
    if asked.what == "latency" and asked.out is None:
        parser.error("latency needs --out")
    began = time.monotonic()
    if asked.what == "quality":
        text = quality(asked.model, asked.train, asked.test)
    else:
        text = latency(asked.model, asked.train, asked.test, asked.out, asked.threads, asked.shares)
    print(text)
    if not asked.no_results:
        name = Path(asked.model).stem
        what = "which ones go" if asked.what == "quality" else "predicted and measured times"
        title = f"Channels cut from {name}: {what}"
        seconds = time.monotonic() - began
        write_section(f"channels {name}, {asked.what}", title, text, threads=asked.threads, seconds=seconds)


if __name__ == "__main__":
    main()
