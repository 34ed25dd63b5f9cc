"""Carry out a recipe that trains on a tiny language model, in as many processes as torchrun started.

    python -m torch.distributed.run --standalone --nproc-per-node 2 train_together.py FOLDER RECIPE(json) [STEPS]

Each process writes FOLDER/<rank>.json: the losses that were told, and the weights that it ended with. With STEPS it
ends as soon as so many steps were told, and writes nothing.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gossamer.run.team import assembled
from gossamer.run.workspace import Onlooker, Run

TINY = runpy.run_path(str(Path(__file__).parents[1] / "techniques" / "tiny_candidates.py"))
ENDED = 7  # the exit status


class Told:
    """Keep what a training tells."""

    def __init__(self, steps: float) -> None:
        self.steps = steps
        self.losses: list[float] = []
        self.said: list[str] = []

    def say(self, message: str) -> None:
        """Keep a line."""
        self.said.append(message)

    def record(self, series: str, step: int, values: Mapping[str, float]) -> None:
        """Keep a loss; end where it is the last that is wanted."""
        if step >= self.steps:
            raise SystemExit(ENDED)
        self.losses += [value for name, value in values.items() if name.endswith("loss")]

    def stage(self, label: str, total: float | None = None) -> Any:
        """Return a bar that nobody sees."""
        return nullcontext(lambda units: None)


def main(folder: Path, recipe: list[tuple[str, dict[str, Any]]], steps: float) -> None:
    """Carry out the recipe."""
    torch.set_num_threads(1)
    told = Told(steps)
    with assembled() as team, Run(folder / "run", {}) if team.leads else nullcontext(Onlooker(folder / "run")) as run:
        candidate = TINY["made"](TINY["llama"](2), recipe, progress=told, team=team, run=run)
        weights = {name: values.flatten().tolist() for name, values in candidate.module.state_dict().items()}
        found = {"losses": told.losses, "said": told.said, "weights": weights}
        (folder / f"{team.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), float([*sys.argv, "inf"][3]))
