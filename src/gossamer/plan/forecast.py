"""What carrying out a recipe will take, stage by stage, before anything is spent: memory, seconds, disk.

    open        read the weights into a module                      compare     outputs of candidate and original
    original    score and time it in a process of its own           write       the artifact's files
    observe     calibration samples through the blocks, moments     prove       open the files again, check, score, time
    solve       codes and scales of each block                      publish     copy the artifact into place
    pass on     samples through the solved blocks                   train       rows forward and back

Seconds come from counts (passes, multiply-accumulates, bytes) divided by rates that were measured on this machine with
this model (`rates.py`); memory from what each stage holds at once, all processes together, and on a GPU where one
computes (`techniques/sweep_device.py`); seconds are then still those of the CPU. The counts that no formula
gives were fitted once, to solvers and runs on one machine; docs/concepts/planner.md tells how near they come. Left out:
what a step costs beyond passes and solving (the searches of `smooth`), and speed-ups of the artifact over the original.

Legend of counts: I inputs, O outputs of a layer, S calibration samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from gossamer.errors import RunError, TechniqueError
from gossamer.measure.size import shipped_bytes
from gossamer.models.roles import ModelMap
from gossamer.plan.budget import device_limit, device_needs, memory_limit, needed_bytes
from gossamer.plan.comparison import CHECKED_VALUES
from gossamer.plan.coverage import coverage
from gossamer.plan.job import Job
from gossamer.plan.original import ORIGINAL_RUNTIME
from gossamer.plan.predict import bytes_beside_saved
from gossamer.plan.proof import NUM_CHECKED_BATCHES, NUM_STREAMED_BATCHES, artifact_inputs
from gossamer.plan.rates import Rates, training_rate, values_of
from gossamer.plan.records import DiskUse, Forecast, Stage
from gossamer.run.atomic import existing, readable_bytes
from gossamer.runtimes.torch_streamed import BYTES_OF_A_SAMPLE
from gossamer.techniques.base import VALUE_BYTES, Decision, Technique
from gossamer.techniques.blockwise import SHARED_INPUTS, BlockTechnique
from gossamer.techniques.quantize.layers import num_inputs
from gossamer.techniques.sweep_gates import NUM_GATED
from gossamer.techniques.sweep_memory import SweepMemory

STAGES = ("open", "original", "observe", "solve", "pass on", "round", "train", "compare", "write", "prove", "publish")
CALIBRATED = ("observe", "solve", "pass on")  # stages in which calibration rows take memory
CHILD_BYTES = 250 << 20  # of a serving process that has opened nothing, beyond what it shares with this one
TIMED_SECONDS, TURNS_SECONDS = 8.0, 15.0  # that one timing takes, alone and in turns with the original
START_SECONDS = 4.0  # that a serving process takes to import what it needs
EXPORT_SECONDS, EXPORT_COPIES = 9.0, 3.0  # of a runtime that traces: for the graph, and float32 models held meanwhile
CUBES, ROUNDS = 6.0, 12.0  # multiply-accumulates of a solver: I^3 times the first, O I^2 times the second for each turn
ROUNDING_MACS = 1250.0  # what searching a grid takes for each weight, in the time of multiply-accumulates
CALL_SECONDS = 3e-5  # of a stand-in, for each block in front of the wanted one
SURE = 2 / 3  # of the seconds that are predicted: fewer are not enough
BACKWARD = 3.0  # passes that one step forward and back takes


@dataclass
class _Costs:
    """Gather what the stages take: the most memory and the sum of the seconds of all parts of a stage."""

    memory: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)

    def add(self, stage: str, memory: float, seconds: float, device: int = 0) -> None:
        """Note a part of a stage."""
        assert stage in STAGES
        self.memory[stage] = max(memory, self.memory.get(stage, 0.0))
        self.seconds[stage] = seconds + self.seconds.get(stage, 0.0)
        self.device[stage] = max(device, self.device.get(stage, 0))

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in their order."""
        return tuple(
            Stage(
                name=name,
                memory_bytes=int(self.memory[name]),
                seconds=round(self.seconds[name], 2),
                device_bytes=self.device[name],
            )
            for name in STAGES
            if name in self.memory
        )


class Forecaster:
    """Forecast recipes of one job; `where` is the run folder that they would be carried out in (the job's own).

    >>> Forecaster(job, measured_rates(job)).of([Gptq()]).seconds  # doctest: +SKIP
    """

    def __init__(self, job: Job, rates: Rates, *, where: Path | None = None) -> None:
        self.job = job
        self.rates = rates
        self.where = where or job.run.folder
        self.known = self.where == job.run.folder  # then what lies in it need not be made again
        self.limit = memory_limit(job.memory)
        self.device_limit = device_limit(job)
        self._resolved: dict[Technique, list[Decision]] = {}

    def of(self, steps: Sequence[Technique], *, covered: bool = False) -> Forecast:
        """Return what a recipe will take and whether it can be held here; with `covered`, what becomes of each module.

        Raises RecipeError or TechniqueError where a step does not fit the model.
        """
        decisions = [decision for step in steps for decision in self.resolved(step)]
        size = artifact_bytes(self.job, decisions)
        stages = self._stages(steps, size)
        disk = self._disk(steps, size)
        found = Forecast(
            streamed=self.job.budget is not None,
            stages=stages,
            disk=disk,
            memory_bytes=max(stage.memory_bytes for stage in stages),
            memory_limit=self.limit,
            disk_bytes=sum(part.bytes for part in disk),
            disk_free=shutil.disk_usage(existing(self.where)).free,
            seconds=round(sum(stage.seconds for stage in stages), 1),
            device=str(self.job.device),
            device_bytes=max(stage.device_bytes for stage in stages),
            device_limit=self.device_limit,
            coverage=coverage(steps, self.job.model, self.job.runtime) if covered else (),
        )
        return found.model_copy(update={"refusal": _refusal(found, self.where)})

    def resolved(self, step: Technique) -> list[Decision]:
        """Return a step's decisions."""
        if step not in self._resolved:
            self._resolved[step] = step.resolve(self.job.model)
        return self._resolved[step]

    def _stages(self, steps: Sequence[Technique], size: int) -> tuple[Stage, ...]:
        job, rates = self.job, self.rates
        costs, whole = _Costs(), job.budget is None
        floats = 4 * job.model.num_parameters
        own = rates.base_bytes + (floats if whole else job.budget or 0)  # this process while it holds the candidate
        largest = VALUE_BYTES * max((layer.num_parameters for layer in job.model.layers), default=0)
        outputs = 3 * rates.output_bytes * max(values_of([batch]) for batch in job.evaluation)
        stored = job.source.shards.num_bytes if whole and job.source.shards is not None else 0
        costs.add("open", own + stored, rates.open_seconds)
        child = CHILD_BYTES + outputs + (floats if whole else _served_bytes(job))
        self._add_original(costs, child, own + outputs)
        codes, applied, model = 0, list[dict[str, Any]](), job.model
        for step in steps:
            applied.append(step.entry())
            weights = sum(d.layer.num_parameters for d in self.resolved(step) if d.weight is not None)
            if isinstance(step, BlockTechnique):
                self._add_sweep(step, applied, costs, own + codes)
            else:
                learns = step.needs.training
                left = model.macs / max(1, job.model.macs)
                passes = step.model_passes(len(job.training) if learns else len(job.calibration), left)
                values = values_of(job.calibration) / max(1, len(job.calibration))  # of one sample
                working = step.working_bytes(job.model, len(job.calibration), 0) + (outputs if passes else 0)
                each = rates.pass_seconds
                if learns and whole and job.calibration:
                    from gossamer.techniques.training import TrainingTechnique  # imported where something trains

                    training = training_rate(job)
                    again = isinstance(step, TrainingTechnique) and step.checkpointing is not False
                    kept = training.again_bytes if again else training.kept_bytes
                    each, working = training.seconds, working + int(kept * values)  # a row at least
                seconds = weights * ROUNDING_MACS / rates.macs_per_second + passes * values * each
                costs.add("train" if learns else "round", own + codes + working, seconds)
            codes += weights if whole else 0
            model = step.after(model)
        batches = min(len(job.evaluation), NUM_CHECKED_BATCHES if whole else NUM_STREAMED_BATCHES)
        values = batches * values_of(job.evaluation) / len(job.evaluation)
        passes = values * rates.pass_seconds + rates.read_seconds
        costs.add("compare", own + codes + outputs + (floats if whole else largest), 2 * passes + rates.open_seconds)
        traced = not job.runtime.streams
        writing = (size + floats * traced) / rates.bytes_per_second  # the graph was made for the original
        costs.add("write", own + codes + largest + floats * EXPORT_COPIES * traced, writing)
        opening = START_SECONDS + rates.open_seconds
        proving = opening + passes + self._scoring_seconds() + (TURNS_SECONDS + 2 * opening if whole else 0.0)
        costs.add("prove", rates.base_bytes + child * (2 if whole else 1), proving)
        costs.add("publish", rates.base_bytes, 2 * size / rates.bytes_per_second)
        return costs.stages()

    def _add_original(self, costs: _Costs, child: float, scoring: float) -> None:
        """Add what measuring the original takes, where this run has not done it: scored, timed, written unchanged."""
        job, rates = self.job, self.rates
        finished = {entry["kind"] for entry in job.run.journal() if entry["event"] == "finished"}
        if self.known and "original" in finished:
            return
        opening = START_SECONDS + rates.open_seconds
        seconds, memory = opening + self._scoring_seconds(), rates.base_bytes + child
        if job.budget is None:  # scored in this process, while one that has timed it may stand by
            memory = max(memory, scoring + (child if job.keeps_open else 0))
            floats, traced = 4 * job.model.num_parameters, not job.runtime.streams
            seconds += TIMED_SECONDS
            seconds += rates.open_seconds + floats / rates.bytes_per_second + EXPORT_SECONDS * traced
            if job.runtime.name != ORIGINAL_RUNTIME:
                seconds += opening + TIMED_SECONDS
                memory = max(memory, rates.base_bytes + 2 * child)  # timed in turns
            memory = max(memory, rates.base_bytes + floats * (1 + EXPORT_COPIES * traced))
        costs.add("original", memory, seconds)

    def _scoring_seconds(self) -> float:
        """Return what scoring all evaluation rows takes; a streamed model is read once for each round of passes."""
        job, rates = self.job, self.rates
        if not job.scored:
            return 0.0
        rounds = 1
        if job.budget is not None:
            rounds = ceil(len(job.evaluation) / max(1, job.budget // BYTES_OF_A_SAMPLE))
        return rounds * rates.read_seconds + values_of(job.evaluation) * (rates.pass_seconds + rates.score_seconds)

    def _add_sweep(self, step: BlockTechnique, applied: Sequence[Any], costs: _Costs, own: float) -> None:
        """Add what one sweep over the blocks takes; where this run has its codes, they are only read."""
        job, rates = self.job, self.rates
        count = step.num_samples(job.calibration, self.resolved(step))
        if not count or self._is_swept(step, applied):
            return
        values = count * values_of(job.calibration) / len(job.calibration)
        solved = {decision.layer.name: decision.layer for decision in self.resolved(step)}
        inside = sum(layer.macs for layer in job.model.layers if layer.stack is not None)
        share = inside / max(1, sum(layer.macs for layer in job.model.layers))
        one_pass = values * rates.pass_seconds * share
        longer = values / max(1, next(iter(job.latency_inputs.values())).size)
        # the moments of a layer's input take I multiply-accumulates where its outputs take O
        moments = sum(
            layer.macs * longer * num_inputs(layer) / layer.shape[0]
            for layer in solved.values()
            if layer.role not in SHARED_INPUTS
        )
        gated = NUM_GATED / count if not step.fits_outputs else 1.0
        blocks = sum(stack.num_blocks for stack in job.model.stacks)
        calling = CALL_SECONDS * count * (1 + gated) * blocks**2 / 2
        turns = ROUNDS * (1 + getattr(step, "passes", 0)) + getattr(step, "exponents", 0)
        sizes = [(layer.shape[0], num_inputs(layer)) for layer in solved.values()]
        solving = sum(CUBES * inputs**3 + turns * outputs * inputs**2 for outputs, inputs in sizes)
        rounding = ROUNDING_MACS * sum(layer.num_parameters for layer in solved.values())
        learning = getattr(step, "steps", 0) * getattr(step, "batch_size", 0) * BACKWARD / count * one_pass
        sample = (rates.block_bytes + rates.call_bytes) * values / count
        if job.budget is None:
            most = own + step.working_bytes(job.model, len(job.calibration), int(sample))
        else:
            most = needed_bytes(job, step)
        reading, there = rates.read_seconds * share, device_needs(job, step)
        observing = one_pass + calling + moments / rates.macs_per_second + reading
        costs.add("observe", most, observing, there.get("observe", 0))
        seconds = (solving + rounding) / rates.macs_per_second + learning + 2 * reading
        costs.add("solve", most, seconds, there.get("solve", 0))
        block = 4 * max((stack.num_parameters for stack in job.model.stacks), default=0)
        passing = own + 2 * count * sample + (block if job.budget is not None else 0)
        seconds = one_pass * (1 + 3 * gated) + 2 * reading
        costs.add("pass on", min(most, passing), seconds, there.get("pass on", 0))

    def _is_swept(self, step: BlockTechnique, applied: Sequence[Any]) -> bool:
        """Say whether the run folder holds the codes of every block already."""
        if not self.known:
            return False
        job, places = self.job, {decision.layer.stack for decision in self.resolved(step)}
        inputs = {**job.step_inputs(calibration=job.prints["calibration"], seed=job.seed), "applied": list(applied)}
        blocks = [(stack, i) for stack in job.model.stacks if stack.name in places for i in range(stack.num_blocks)]
        return bool(blocks) and SweepMemory(job.run, inputs).solved_all(blocks, None in places)

    def _disk(self, steps: Sequence[Technique], size: int) -> tuple[DiskUse, ...]:
        """Return what will be added to the run folder; what lies there already is taken off."""
        job, rates, whole = self.job, self.rates, self.job.budget is None
        kept = rates.kept_bytes * values_of(job.evaluation) if job.scored else 0.0
        unchanged = artifact_bytes(job, ()) * (1 if job.runtime.streams else 2) if whole else 0  # an exported graph too
        codes = streams = 0.0
        for step in steps:
            if isinstance(step, BlockTechnique):
                codes += sum(_codes_bytes(decision) for decision in self.resolved(step) if decision.weight is not None)
                count = step.num_samples(job.calibration, self.resolved(step))
                values = count * values_of(job.calibration) / max(1, len(job.calibration))
                # live and reference; those behind the last block are kept until those behind the next one are
                streams = max(streams, 2 * (1 + min(1.0, NUM_GATED / max(1, count))) * values * rates.block_bytes)
        batches = min(len(job.evaluation), NUM_CHECKED_BATCHES if whole else NUM_STREAMED_BATCHES)
        longest = max(values_of([batch]) for batch in job.evaluation)
        compared = batches * 2 * min(4.0 * CHECKED_VALUES, rates.output_bytes * longest)
        left = not (self.known and job.run.has("artifact", artifact_inputs(job, steps)))
        parts = {
            "scores of the original": kept - self._held("original"),
            f"the original for {job.runtime.name}": unchanged - self._held("unchanged"),
            "codes of each block": left * codes - self._held("block"),
            "samples between two blocks": left * streams - self._held("stream"),
            "outputs to compare": left * compared,
            "the artifact": left * size,
            "the artifact, published": size,
        }
        return tuple(DiskUse(what=what, bytes=int(count)) for what, count in parts.items() if count > 0)

    def _held(self, kind: str) -> int:
        """Return the bytes of the run's finished steps of one kind."""
        if not self.known:
            return 0
        folders = (self.job.run.folder / "steps").glob(f"{kind}-" + "[0-9a-f]" * 12)
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def check_forecast(found: Forecast, label: str) -> None:
    """Raise TechniqueError or RunError when a recipe cannot be held here, with both numbers and the remedy."""
    if not found.refusal:
        return
    if found.memory_bytes > found.memory_limit:
        calibrates = _worst(found).name in CALIBRATED
        less = ", give fewer or shorter calibration rows, or round without data: quantize" if calibrates else ""
        raise TechniqueError(f"{label} {found.refusal}", f"raise --memory{less}")
    if found.device_bytes > found.device_limit:
        raise TechniqueError(f"{label} {found.refusal}", "give shorter calibration rows, or use --device cpu")
    raise RunError(f"{label} {found.refusal}", "free some space, or name a folder on another disk with --out")


def check_time(forecaster: Forecaster, left: float) -> None:
    """Raise RunError when what every search takes is longer than is left: the original measured, one candidate proven.

    What is counted is a recipe that does nothing; a finished step of the run folder takes no time again. A search that
    could still end in time, were the prediction that much too long, is begun.
    """
    found = forecaster.of(())
    if SURE * found.seconds <= left:
        return
    original = sum(stage.seconds for stage in found.stages if stage.name == "original")
    first = f"{original:.0f} s to measure the original, " if original else ""
    raise RunError(
        f"a search is predicted to take at least {found.seconds:.0f} s: {first}{found.seconds - original:.0f} s to "
        f"write and measure one candidate; {max(0.0, left):.0f} s are left",
        "give more --time (what is finished is not done again), or fewer rows with --eval-rows",
    )


def _worst(found: Forecast) -> Stage:
    """Return the stage that takes the most memory."""
    return max(found.stages, key=lambda stage: stage.memory_bytes)


def _refusal(found: Forecast, folder: Path) -> str:
    """Return why a recipe cannot be carried out here, as the end of a sentence; empty when it can."""
    if found.memory_bytes > found.memory_limit:
        return (
            f"needs about {found.memory_bytes / 2**30:.1f} GiB of memory ({_worst(found).name}); "
            f"{found.memory_limit / 2**30:.1f} GiB may be used"
        )
    if found.device_bytes > found.device_limit:
        worst = max(found.stages, key=lambda stage: stage.device_bytes)
        return (
            f"needs about {found.device_bytes / 2**30:.1f} GiB on {found.device} ({worst.name}); "
            f"{found.device_limit / 2**30:.1f} GiB may be used there"
        )
    if found.disk_bytes > found.disk_free:
        return (
            f"needs about {readable_bytes(found.disk_bytes)} under {folder}; {readable_bytes(found.disk_free)} are free"
        )
    return ""


def artifact_bytes(job: Job, decisions: Sequence[Decision], after: ModelMap | None = None) -> int:
    """Return about how many bytes the artifact will take: every tensor as the runtime holds it, and its companions.

    `after` is the map of what a recipe leaves of the model (None: all of it).
    """
    specs = {decision.parameter: decision.weight for decision in decisions if decision.weight is not None}
    narrow = any(decision.dtype is not None for decision in decisions)
    total = 0
    for layer in (after or job.model).layers:
        if layer.tied_to is None:
            stored = job.source.stored_dtype(f"{layer.name}.weight")
            kept = stored.itemsize if stored is not None and job.runtime.keeps_16_bits else 4
            spec = specs.get(f"{layer.name}.weight")
            total += job.runtime.stored_bytes(layer.role, layer.shape, spec, 2 if narrow else kept)
    return total + _companions(job) - bytes_beside_saved(job.model, after or job.model)


def _companions(job: Job) -> int:
    files = job.source.shipped_files()
    return shipped_bytes([path for path in files if path.suffix != ".safetensors"])


def _served_bytes(job: Job) -> int:
    """Return what a process holds that serves a model piece by piece: kept weights, one block, samples in between."""
    block = max((stack.num_parameters for stack in job.model.stacks), default=job.model.num_parameters)
    return (job.budget or 0) + 4 * block + BYTES_OF_A_SAMPLE


def _codes_bytes(decision: Decision) -> float:
    """Return what the run folder holds of a solved weight: a byte for each code, and each group's scale and zero."""
    assert decision.weight is not None
    groups = decision.layer.num_parameters / (decision.weight.group_size or num_inputs(decision.layer))
    return decision.layer.num_parameters + groups * (2 if decision.weight.symmetric else 3)
