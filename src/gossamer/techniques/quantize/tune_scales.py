"""The technique `tune_scales`: fit all scales of a rounded model together to the original's predictions.

The solver is `scale_descent.py`; here are the samples, the original that is run beside, what is kept in the run folder,
and the check on samples that were held back. Inputs of layers that are rounded too are rounded meanwhile, gradients
passing straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.measure.machine import multiplies_bf16
from gossamer.models.attention import fused_attention
from gossamer.models.candidate import Candidate
from gossamer.models.quantized import Quantized
from gossamer.models.roles import ModelMap
from gossamer.run.progress import Progress
from gossamer.run.workspace import Run
from gossamer.tasks.base import Batch, spread
from gossamer.techniques.base import Context, Decision, Needs, SearchSpace, Technique
from gossamer.techniques.quantize.scale_descent import Factors, descend_scales, scaled
from gossamer.techniques.sweep_precision import BFLOAT16, FLOAT32, computing
from gossamer.techniques.sweep_shared import shared_codes

MIN_SAMPLES = 8
HELD_BACK = 8  # every so many-th sample only judges
BACKWARD = 3  # passes that one forward and back takes
SAVED_STEPS = 8  # so many steps are lost at most when a run is killed
FACTORS = "factors.safetensors"


class TuneScales(Technique):
    """Fit the scales of every rounded layer together so that predictions stay the original's; codes stay.

    In a recipe behind the steps that round: `- tune_scales: {epochs: 2}`. Chen et al., "EfficientQAT", 2024, section
    3.3; the solver is `scale_descent.py`. Needs the original, the candidate and gradients in memory.
    """

    name: ClassVar[str] = "tune_scales"
    family: ClassVar[str] = "quantize"
    needs: ClassVar[Needs] = Needs(
        calibration_rows=MIN_SAMPLES,
        gradients=True,
        after=("quantize", "gptq", "learned_rounding", "awq"),
        before=("cast",),
    )

    divergence_left: ClassVar[float] = 0.65

    samples: int = Field(128, ge=MIN_SAMPLES, description="calibration samples that are used; one in 8 only judges")
    epochs: int = Field(2, ge=1, description="how often each sample is seen")
    batch_size: int = Field(4, ge=1, description="samples of one step")
    rate: float = Field(1e-3, gt=0, lt=0.1, description="how far one step moves a scale, as a share of it")

    def resolve(self, model: ModelMap) -> list[Decision]:
        """Return nothing: what is rounded, and how, other steps decided."""
        return []

    def working_bytes(self, model: ModelMap, num_samples: int, sample_bytes: int) -> int:
        """Return the bytes of the original, and of the gradients, beside the candidate."""
        return 2 * 4 * model.num_parameters

    def model_passes(self, num_samples: int, left: float = 1.0) -> float:
        """Return the passes of the steps, and of judging before and after."""
        count = min(self.samples, num_samples)
        judged = count // HELD_BACK
        return self.epochs * (count - judged) * (1 + left * BACKWARD) + 2 * judged * (1 + left)

    def apply(self, candidate: Candidate, model: ModelMap, context: Context) -> Candidate:
        """Return the candidate with other scales, or as it was where the samples held back are not nearer with them."""
        if candidate.weights is not None:
            raise TechniqueError(
                "tune_scales needs the model whole, and this one is read piece by piece",
                "raise --memory, or leave the step out",
            )
        if not candidate.quantized:
            raise TechniqueError("tune_scales found no rounded layer", "put it behind the steps that round")
        # one process of a team fits, since a step needs all of its samples; the others wait for what it found
        mine = self._fitted(candidate, context) if context.team.leads else {}
        for name, codes in shared_codes(context.team, mine).items():
            candidate.set_quantized(name, codes)
        candidate.applied.append(self.entry())
        return candidate

    def _fitted(self, candidate: Candidate, context: Context) -> dict[str, Quantized]:
        """Return the codes with the scales that are kept: those that were found, or those that were there."""
        tuning = Tuning.of(self, candidate, context)
        with candidate.simulated(), fused_attention(tuning.network), fused_attention(tuning.original):
            before = tuning.judge(context.progress)
            found = tuning.run(context, candidate.applied)
            for name, codes in found.items():
                candidate.set_quantized(name, codes)
            after = tuning.judge(context.progress)
        verdict = "" if after < before else ": the scales stay as they were"
        context.progress.say(f"divergence on samples held back: {before:.2e} before, {after:.2e} after{verdict}")
        return found if after < before else dict(tuning.start)

    @classmethod
    def candidates(cls, space: SearchSpace) -> Iterator[tuple[Technique, ...]]:
        """Yield nothing: it takes minutes, so it is proposed only where a recipe falls short without it (`repairs`)."""
        yield from ()

    @classmethod
    def repairs(cls, steps: Sequence[Technique], space: SearchSpace) -> Sequence[Technique]:
        """Return the step with its defaults for a recipe that rounds something, where there are samples enough."""
        rounds = any(decision.weight is not None for step in steps for decision in step.resolve(space.model))
        if not rounds or space.calibration_rows < 4 * MIN_SAMPLES or any(isinstance(step, cls) for step in steps):
            return ()
        return (cls.model_validate({}),)


@dataclass(frozen=True)
class Tuning:
    """Hold one fitting: the candidate's network, the original, samples to learn from and to judge on, the start."""

    settings: TuneScales
    network: nn.Module
    original: nn.Module
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    learned: Sequence[dict[str, Tensor]]
    judged: Sequence[dict[str, Tensor]]
    start: Mapping[str, Quantized]
    dtype: str  # of the products in the steps; held-back samples are judged in float32

    @classmethod
    def of(cls, settings: TuneScales, candidate: Candidate, context: Context) -> Tuning:
        """Return the fitting of a candidate. Raises TechniqueError for too few samples."""
        batches = spread(context.calibration, settings.samples)
        if len(batches) < MIN_SAMPLES:
            raise TechniqueError(
                f"tune_scales needs {MIN_SAMPLES} calibration samples, {len(batches)} were given",
                "give more rows with --data",
            )
        samples = [_tensors(batch) for batch in batches]
        source, output = candidate.source, context.task.output
        return cls(
            settings=settings,
            network=candidate.module,
            original=source.original(context.task).requires_grad_(False),
            forward=lambda module, inputs: source.forward(module, inputs, output),
            learned=[sample for index, sample in enumerate(samples) if index % HELD_BACK != HELD_BACK - 1],
            judged=samples[HELD_BACK - 1 :: HELD_BACK],
            start=dict(candidate.quantized),
            dtype=BFLOAT16 if multiplies_bf16() else FLOAT32,
        )

    def judge(self, progress: Progress) -> float:
        """Return the mean divergence on the samples held back, computed in float32."""
        found = []
        with progress.stage("tune_scales: samples held back", len(self.judged)) as advance, torch.inference_mode():
            for sample in self.judged:
                found.append(float(self._divergence(sample)))
                advance(1)
        return sum(found) / len(found)

    def run(self, context: Context, applied: Sequence[dict[str, Any]]) -> dict[str, Quantized]:
        """Return the codes with the scales that were found; goes on where a killed run had come to."""
        batches = self._batches(context.seed)
        memory = TuningMemory(context.run, {**context.identity, "applied": [*applied, self.settings.entry()]})
        done, factors = memory.load(len(batches), self.start)
        left = {number: batches[number] for number in range(done, len(batches))}
        # parameters that nothing rounded get no gradient
        self.network.requires_grad_(False)
        with context.progress.stage("tune_scales: steps", len(batches)) as advance:
            advance(done)

            def after_step(number: int, _: float) -> None:
                if (number + 1) % SAVED_STEPS == 0 and number + 1 < len(batches):
                    memory.save(number + 1, factors)
                advance(1)

            descend_scales(
                {name: self.network.get_parameter(name) for name in self.start},
                self.start,
                factors,
                lambda sample: self._divergence(self.learned[sample], self.dtype),
                left,
                rate=self.settings.rate,
                num_steps=len(batches),
                after_step=after_step,
            )
        memory.forget(len(batches))
        return {name: scaled(codes, factors[name].factor_OG) for name, codes in self.start.items()}

    def _batches(self, seed: int) -> list[list[int]]:
        """Return the samples of every step: all of them once an epoch, in an order drawn once."""
        draw, size = torch.Generator().manual_seed(seed), self.settings.batch_size
        order: list[int] = []
        for _ in range(self.settings.epochs):
            order += torch.randperm(len(self.learned), generator=draw).tolist()
        return [order[first : first + size] for first in range(0, len(order), size)]

    def _divergence(self, sample: dict[str, Tensor], dtype: str = FLOAT32) -> Tensor:
        """Return the mean over predictions of KL(original || candidate) in nats."""
        with computing(dtype):
            with torch.no_grad():
                wanted = self.forward(self.original, sample)
            found = self.forward(self.network, sample)
        log_p, log_q = (torch.log_softmax(logits.float().flatten(0, -2), -1) for logits in (wanted, found))
        return nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class TuningMemory:
    """Keep the factors in the run folder every few steps, so that a killed run goes on from there, bytes the same."""

    def __init__(self, run: Run | None, inputs: Mapping[str, Any]) -> None:
        self.run = run
        self.inputs = inputs

    def save(self, number: int, factors: Mapping[str, Factors]) -> None:
        """Keep the factors as they are before step `number`, and drop what was kept before."""
        if self.run is None:
            return

        def build(folder: Path) -> dict[str, Any]:
            tensors = {f"{name}/{part}": getattr(held, part) for name, held in factors.items() for part in vars(held)}
            save_file(tensors, folder / FACTORS)
            return {}

        self.run.step("scales", self._at(number), build)
        self.run.discard("scales", self._at(number - SAVED_STEPS))

    def load(self, num_steps: int, start: Mapping[str, Quantized]) -> tuple[int, dict[str, Factors]]:
        """Return how many steps were taken, and the factors behind them."""
        for number in range(num_steps - num_steps % SAVED_STEPS, 0, -SAVED_STEPS):
            if self.run is not None and self.run.has("scales", self._at(number)):
                step = self.run.step("scales", self._at(number), _never)
                tensors = load_file(step.folder / FACTORS)
                parts = ("factor_OG", "first_OG", "second_OG")
                return number, {name: Factors(*(tensors[f"{name}/{part}"] for part in parts)) for name in start}
        return 0, {name: Factors.of(codes) for name, codes in start.items()}

    def forget(self, num_steps: int) -> None:
        """Drop what was kept: the steps are over."""
        if self.run is not None:
            for number in range(SAVED_STEPS, num_steps + 1, SAVED_STEPS):
                self.run.discard("scales", self._at(number))

    def _at(self, number: int) -> dict[str, Any]:
        return {**self.inputs, "number": number}


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in batch.inputs.items()}


def _never(_: Path) -> dict[str, Any]:
    raise AssertionError("what was kept is not built again")
