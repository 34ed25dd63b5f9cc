"""The technique `qat`: rounded weights are trained through their rounding, until the original is followed again.

The grids are those of `fake_grid.py`; the loop, the rows and the losses are those of every step that trains
(`training.py`). It starts from the codes that a solver found, and what is not better on rows held back is not kept.
Layer inputs that are rounded are rounded in training too, gradients passing straight through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized
from gossamer.models.roles import ModelMap
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.prune.masks import has_masks
from gossamer.techniques.quantize.fake_grid import fake_grids
from gossamer.techniques.training import MIN_ROWS, TrainingTechnique

SMALLEST_ROOT = 1e-12  # gradients of a divergence near nothing are far below Adam's usual 1e-8
COARSE = 4  # bits up to which the planner proposes it: finer codes lose too little to train for minutes


class Qat(TrainingTechnique):
    """Train rounded weights and their scales, the files' own values in every pass, to follow the original.

    In a recipe behind the steps that round: `- qat: {epochs: 1}`. Jacob et al., "Quantization and Training of Neural
    Networks", 2018, section 3; Esser et al., "Learned Step Size Quantization", 2020.
    """

    name: ClassVar[str] = "qat"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(
        training=True,
        gradients=True,
        after=(
            "vocabulary", "prune", "sparsify", "low_rank", "distill", "rotate", "smooth", "awq", "quantize", "gptq",
            "learned_rounding", "tune_scales",
        ),
        before=("lora", "kv_cache", "cast"),
        excludes=("compensate",),
    )  # fmt: skip

    divergence_left: ClassVar[float] = 0.8

    rate: float = Field(1e-3, gt=0, lt=0.1, description="how far one step moves a scale at most, as a share of it")
    code_rate: float = Field(
        0.02, gt=0, lt=1, description="how far one step moves a weight at most, in steps of its grid"
    )

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return nothing: what is rounded, and how, other steps decided."""
        return []

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with other codes, or as it was where rows held back say that it is not better."""
        self._check(candidate, context)
        start = _integers(candidate)
        found, values = self._learned(candidate, context, partial(self._trained, candidate, context, start))
        if found["kept"]:
            for name, codes in start.items():
                here = replace(codes, codes=values[f"{name}.codes"], scale=values[f"{name}.scale"])
                candidate.set_quantized(name, here)
        candidate.applied.append(self.entry())
        return candidate

    def _check(self, candidate: Candidate, context: Context) -> None:
        super()._check(candidate, context)
        if not _integers(candidate):
            others = sorted({str(codes.spec) for codes in candidate.quantized.values()})
            rounded = f"{len(candidate.quantized)} weights are {', '.join(others)}" if others else "nothing is rounded"
            raise TechniqueError(
                f"qat trains integer codes, and {rounded}", "put it behind steps that round to integers"
            )

    def _trained(
        self, candidate: Candidate, context: Context, start: Mapping[str, Quantized], checkpoints: Path
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train, leave the candidate as it was, and return what came of it: the loss, and codes and scales."""
        from gossamer.train.loop import train  # transformers' Trainer takes seconds to import

        network, lesson = candidate.module, self._lesson(candidate, context)
        plain = lesson.forward

        def forward(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
            with parametrize.cached():  # a weight that is asked for twice is computed once
                return plain(module, inputs)

        lesson.forward = forward
        grids = fake_grids(
            network,
            start,
            reach=self.code_rate / self.rate,
            masked=has_masks(candidate.applied),
        )
        with candidate.simulated(), grids as held:
            trained = {id(part) for position, grid in held.values() for part in (position, grid.factor_OG)}
            only = frozenset(name for name, part in network.named_parameters() if id(part) in trained)
            plan = replace(self._plan(context), only=only, smallest_root=SMALLEST_ROOT)
            outcome = train(lesson, plan, checkpoints, context.progress, label=self.name, team=context.team)
            codes = {name: grid.rounded(position) for name, (position, grid) in held.items()}
        moved = sum(int((now.codes != start[name].codes).sum()) for name, now in codes.items())
        share = moved / sum(now.codes.numel() for now in codes.values())
        context.progress.say(f"qat: {share:.2%} of the codes moved")
        values = {f"{name}.codes": now.codes for name, now in codes.items()}
        values |= {f"{name}.scale": now.scale for name, now in codes.items()}
        return self._told(outcome, lesson, context, otherwise="the codes stay as they were"), values

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it takes minutes, so it is proposed only where a recipe falls short without it (`repairs`)."""
        yield from ()

    @classmethod
    def repairs(cls, steps: Sequence[Technique], space: SearchSpace) -> Sequence[Technique]:
        """Return one epoch for a recipe that rounds layers to few bits, where there are rows to learn from."""
        decided = [one for step in steps for one in step.resolve(space.model) if one.layer.kind != "embedding"]
        coarse = any(one.weight and one.weight.format == "int" and one.weight.bits <= COARSE for one in decided)
        if not coarse or space.training_rows < 4 * MIN_ROWS or any(isinstance(step, cls) for step in steps):
            return ()
        return (cls.model_validate({"epochs": 1}),)


def _integers(candidate: Candidate) -> dict[str, Quantized]:
    """Return the codes that are integers, by parameter."""
    return {name: codes for name, codes in candidate.quantized.items() if codes.spec.number_format is None}
