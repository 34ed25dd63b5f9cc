"""This tool as one of the peers: a recipe carried out and proven by `gossamer.apply`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peers import Material, Peer

PROOF_ROWS = 32  # what `apply` itself scores; the benchmark scores every artifact on all rows afterwards


@dataclass(frozen=True)
class Gossamer(Peer):
    """Carry out `recipe` (steps as JSON values) for a runtime. `rows` False: nothing is calibrated."""

    served_by: str
    recipe: tuple[Mapping[str, Any], ...]
    name: str
    rows: bool = True

    needs: ClassVar[tuple[str, ...]] = ("gossamer",)
    ours: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Return its row's name."""
        return f"**gossamer** {self.served_by}, {self.name}"

    @property
    def runtime(self) -> str:
        """Return the name of our runtime."""
        return self.served_by

    def missing(self) -> list[str]:
        """Return what our runtime lacks here."""
        from gossamer.runtimes import available_runtimes

        hint = available_runtimes()[self.served_by]
        return [hint] if hint else []

    def quantize(self, material: Material, out: Path) -> float:
        """Write the artifact; return the seconds of the step that makes it (`apply` also proves it)."""
        import gossamer
        from gossamer.recipe import Recipe, Step

        steps = tuple(
            Step(technique=name, settings=dict(settings)) for step in self.recipe for name, settings in step.items()
        )
        run = out / "run"
        result = gossamer.apply(
            Recipe(steps=steps),
            material.model,
            out=run,
            task=material.task,
            data=material.data if self.rows else None,
            evaluation=material.evaluation if self.rows else None,
            runtime=self.served_by,
            task_settings=material.task_settings,
            calibration_rows=material.calibration_rows,
            evaluation_rows=PROOF_ROWS,
        )
        if result.verdict != "PASS":
            raise RuntimeError(f"the artifact is not what the recipe says: {result.reason}")
        finished = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        seconds = sum(entry["seconds"] for entry in finished if entry.get("kind") == "artifact" and "seconds" in entry)
        for path in sorted((run / "artifact").iterdir()):
            shutil.move(path, out / path.name)
        shutil.rmtree(run)
        return float(seconds)
