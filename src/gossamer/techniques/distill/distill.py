"""The technique `distill`: the candidate learns from the original, on the user's own rows, what earlier steps lost.

All weights but embeddings are trained; these too where tokens were cut before: a word whose token is gone is read in
smaller pieces, which have to learn what it meant. The original is run beside the candidate, so no label is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.tasks.classification import Classification
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique, resolved
from gossamer.techniques.training import MIN_ROWS, TrainingTechnique
from gossamer.train.lesson import Plan, Schedule

DEEP = 1 / 3  # of the original's operations: where fewer are left, a classifier learns anew
# Tried on an encoder with 3 of its 6 blocks, half of the heads, 640 of 1,536 channels, and on a vision transformer with
# 5 of 12 heads, 96 of 768 channels (docs/concepts/distillation.md).
ANEW = {"epochs": 6.0, "hidden": 0.0}
ROWS_ANEW, MANY_ROWS, MOST_ROWS = 1024, 16_384, 65_536  # there have to be; from which on steps are larger; at most used
# The best rate goes with 1 / width (Yang et al., "Tensor Programs V", 2022, table 3): where it was tried, and at most.
RATE_ANEW, WIDTH, MOST_RATE = 3e-4, 384, 1e-3


class Leaving(Schedule, Protocol):
    """A schedule that takes something out of the student while it is trained."""

    def at_once(self) -> None:
        """Take out now what is gone at the end, chosen without training."""


class Distill(TrainingTechnique):
    """Train the candidate to follow the original's predictions and the outputs of its blocks.

    In a recipe behind the steps that cut and before those that round: `- distill: {epochs: 3}`. Hinton et al.,
    "Distilling the Knowledge in a Neural Network", 2015; Jiao et al., "TinyBERT", 2020, section 3.
    """

    name: ClassVar[str] = "distill"
    family: ClassVar[str] = "distill"
    needs: ClassVar[Needs] = Needs(
        training=True,
        gradients=True,
        after=("vocabulary", "prune", "sparsify", "low_rank"),
        before=(
            "rotate", "smooth", "awq", "quantize", "gptq", "learned_rounding", "tune_scales", "qat", "kv_cache", "cast",
        ),
    )  # fmt: skip

    divergence_left: ClassVar[float] = 0.3

    embeddings: bool | None = Field(
        None, description="whether embeddings are trained too; empty: where a vocabulary was cut before"
    )

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return nothing: shapes and formats are other steps' matter."""
        return []

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate after training, or as it was where rows held back say that it is not better."""
        self._check(candidate, context)
        _, values = self._learned(candidate, context, partial(self._trained, candidate, model, context))
        _put(candidate.module, values)
        candidate.applied.append(self.entry())
        return candidate

    def _check(self, candidate: Candidate, context: Context) -> None:
        super()._check(candidate, context)
        if candidate.quantized:
            raise TechniqueError(
                f"{len(candidate.quantized)} parameters were rounded before this step, which trains them",
                "put it before the steps that round",
            )

    def _plan_of(self, candidate: Candidate, context: Context) -> Plan:
        """Return how long and how fast, and whether embeddings stay as they are."""
        plan, trained = self._plan(context), self.embeddings
        if trained is None:
            trained = any("vocabulary" in entry for entry in candidate.applied)
        return replace(plan, frozen=()) if trained else plan

    def _trained(
        self, candidate: Candidate, model: ModelMap, context: Context, checkpoints: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train in place, and return what came of it: the loss, and the values."""
        from gossamer.train.loop import train  # transformers' Trainer takes seconds to import

        lesson = self._lesson(candidate, context)
        plan = self._plan_of(candidate, context)
        outcome = train(lesson, plan, checkpoints, context.progress, label=self.name, team=context.team)
        told = self._told(outcome, lesson, context, otherwise="the weights stay as they were")
        return told, values_of(candidate.module)

    def _trained_without(
        self,
        candidate: Candidate,
        context: Context,
        checkpoints: Path,
        leaving: AbstractContextManager[Leaving],
        words: tuple[str, str, str],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train in place while something goes out of the student; return what came of it: three losses, and the values.

        The start, which has all, is no outcome: what has lost it is judged, against the start that loses it at once.
        `words` say what the start has, what is taken from it at once, and what is left where training was not better.
        """
        from gossamer.train.loop import judge, train  # transformers' Trainer takes seconds to import

        lesson, plan = self._lesson(candidate, context), self._plan_of(candidate, context)
        whole = judge(lesson, plan, context.team)
        with leaving as schedule:
            schedule.at_once()
            lesson.schedule = schedule
            outcome = train(lesson, plan, checkpoints, context.progress, label=self.name, team=context.team)
            if not outcome.better:
                schedule.at_once()
        everything, at_once, otherwise = words
        verdict = "" if outcome.better else f": {otherwise}, the others stay as they were"
        context.progress.say(
            f"{self.name}: loss on {len(lesson.judged)} rows held back {whole:.3e} with {everything}, "
            f"{outcome.before:.3e} {at_once}, "
            f"{outcome.after:.3e} after {outcome.steps} steps{verdict}"
        )
        found = {"whole": whole, "before": outcome.before, "after": outcome.after, "steps": outcome.steps}
        return {**found, "kept": outcome.better}, values_of(candidate.module)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it takes minutes, so it is proposed only where a recipe falls short without it (`repairs`)."""
        yield from ()

    @classmethod
    def repairs(cls, steps: Sequence[Technique], space: SearchSpace) -> Sequence[Technique]:
        """Return the step with its defaults for a recipe that cuts something, where there are rows to learn from.

        Of a classifier of which little is left there is not much to hold on to: before that it is proposed to learn
        anew, faster and longer, on all rows, and from predictions alone, for which the original runs once.
        """
        cuts = any(step.family == "prune" for step in steps)
        if not cuts or space.training_rows < 4 * MIN_ROWS or any(isinstance(step, cls) for step in steps):
            return ()
        left = resolved(space.model, steps)[1].macs / max(1, space.model.macs)
        deep = left < DEEP and isinstance(space.task, Classification) and space.training_rows >= ROWS_ANEW
        return (*((cls.model_validate(anew(space)),) if deep else ()), cls.model_validate({}))


def anew(space: SearchSpace) -> dict[str, float]:
    """Return the settings with which a classifier learns anew."""
    width = next((layer.shape[-1] for layer in space.model.layers if layer.role == "q"), WIDTH)
    rows = min(space.training_rows, MOST_ROWS)
    steps = {"batch_size": 64 if rows >= MANY_ROWS else 32, "rate": min(MOST_RATE, RATE_ANEW * WIDTH / width)}
    return {**ANEW, **steps, **({"rows": rows} if rows >= MANY_ROWS else {})}


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the values of all parameters, by name."""
    return {name: values.detach().contiguous() for name, values in module.named_parameters()}


def _put(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(values[name])
