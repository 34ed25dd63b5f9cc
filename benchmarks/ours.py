"""This tool as one of the peers: a recipe carried out as `gossamer apply` does, and checked in a fresh process.

What `apply` measures besides (the original, scores, times) is left to the benchmark, which measures every entry alike.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peer import EXPORTED, Material, Peer

if TYPE_CHECKING:
    from gossamer.plan.job import Job
    from gossamer.techniques.base import Technique

CHECKED_ROWS = 8  # on so many held-out rows the re-opened artifact must compute what was computed in memory


@dataclass(frozen=True)
class Gossamer(Peer):
    """Carry out `recipe` (steps as JSON values) for a runtime. `rows` False: nothing is calibrated."""

    served_by: str
    recipe: tuple[Mapping[str, Any], ...]
    name: str
    rows: bool = True
    seed: int = 0

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
        """Write the artifact; return the seconds of the step that makes it (the check is not among them)."""
        from gossamer.plan.prepare import Inputs, identity, opened_job, prepare
        from gossamer.plan.proof import build_artifact, check_artifact
        from gossamer.run.workspace import Run

        inputs = Inputs(
            model=material.model,
            task=material.task,
            data=material.data if self.rows else None,
            evaluation=material.evaluation if self.rows else None,
            runtime=self.served_by,
            task_settings=material.task_settings,
            calibration_rows=material.calibration_rows,
            evaluation_rows=CHECKED_ROWS,
            seed=self.seed,
        )
        folder, prepared = out / "run", prepare(inputs)
        with Run(folder, identity(inputs, prepared)) as run, opened_job(inputs, prepared, run) as job:
            if self.uses_graph and material.graph is not None:
                shutil.copytree(Path(material.graph) / EXPORTED / "cache", job.request().cache, dirs_exist_ok=True)
            steps = self.steps(job)
            built = build_artifact(job, steps)
            equivalence, tensors = check_artifact(job, built, steps)
        wrong = [row.parameter for row in tensors if not row.agrees]
        if wrong or not equivalence.passed:
            raise RuntimeError(f"the artifact is not what the recipe says: {wrong[:3]}, {equivalence}")
        journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        seconds = sum(entry["seconds"] for entry in journal if entry.get("kind") == "artifact" and "seconds" in entry)
        for path in sorted((built.folder / "artifact").iterdir()):
            shutil.move(path, out / path.name)
        shutil.rmtree(folder)
        return float(seconds)

    def steps(self, job: Job) -> tuple[Technique, ...]:
        """Return the recipe's techniques."""
        from gossamer.recipe import Recipe, Step
        from gossamer.techniques.registry import resolve

        named = [(name, dict(settings)) for step in self.recipe for name, settings in step.items()]
        recipe = Recipe(steps=tuple(Step(technique=name, settings=settings) for name, settings in named))
        return tuple(resolve(recipe))


@dataclass(frozen=True)
class GossamerOnGraph(Gossamer):
    """The same for runtimes that start from the exported graph, handed over: its seconds count too."""

    uses_graph: ClassVar[bool] = True


@dataclass(frozen=True)
class GossamerOfSize(Gossamer):
    """The same with the first step's widths chosen layer by layer, for files of at most `megabytes`."""

    megabytes: float = 0.0

    @property
    def label(self) -> str:
        """Return its row's name."""
        return f"**gossamer** {self.served_by}, {self.name}, to {self.megabytes:g} MB"

    def steps(self, job: Job) -> tuple[Technique, ...]:
        """Return the recipe's techniques, the first with widths for what the others leave. Raises ValueError."""
        from gossamer.measure.size import shipped_bytes
        from gossamer.plan.allocation import within
        from gossamer.techniques.quantize.calibrated import CalibratedGrid

        base, *others = super().steps(job)
        total = shipped_bytes(job.source.shipped_files())
        for decision in (decision for step in (base, *others) for decision in step.resolve(job.model)):
            role, shape, stored = decision.layer.role, decision.layer.shape, job.source.stored_dtype(decision.parameter)
            width = stored.itemsize if stored is not None else 4
            total += job.runtime.stored_bytes(role, shape, decision.weight, width)
            total -= job.runtime.stored_bytes(role, shape, None, width)
        assert isinstance(base, CalibratedGrid)
        mixed = within(job, base, base.resolve(job.model), 1e6 * self.megabytes - total)
        if mixed is None:
            raise ValueError(
                f"no widths reach {self.megabytes:g} MB; in {base.bits} bits everywhere it is {total / 1e6:.1f} MB"
            )
        return (mixed, *others)
