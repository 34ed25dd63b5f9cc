"""Predict a recipe's size, latency, memory and quality from the measured tables, without building it.

    size      bytes of the unchanged file + sum over parameters of (bytes in the new format - bytes as float32), exactly
    latency   latency of the unchanged model in the runtime + sum over layers (seconds(new format) - seconds(float32));
              over blocks, where these were timed at several sizes (`block_times.py`)
    memory    peak of the unchanged model in the runtime - float32 bytes + new bytes
    KL        sum of the effects of the steps alone (errors of small size are nearly independent), times what repairs
              usually leave of it
    quality   a likelihood metric loses exp(-KL): the expected log-likelihood loss under the original is the KL itself;
              an accuracy loses at most the share of answers that change, which is both measured (1 - agreement) and
              bounded by sqrt(KL / 2) (Pinsker's inequality): the smaller of the two

Each figure is corrected by what was measured of earlier candidates: factors on the latency and on the lost quality,
bytes beside those of the parameters (headers of the file, nodes of a graph), which only small models notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log, prod, sqrt

from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.plan.block_times import BlockTimes, change_of_blocks
from gossamer.plan.profile import Profile, layer_formats
from gossamer.plan.records import Original, Prediction
from gossamer.runtimes.base import Runtime
from gossamer.techniques.base import Decision, Technique, resolved

FLOAT_BYTES = 4
CAST_BYTES = {"bf16": 2, "fp16": 2}


@dataclass
class Corrections:
    """Hold what measuring taught: log-factors on latency (by activation format) and on the lost quality, more bytes.

    A recipe that cuts or trains as a measured one did (`cuts`) loses what that one lost; for all others the factor is
    what half of each surprise left. `beside` is the bytes that files took more than predicted.
    """

    latency: dict[str, float] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    quality: float = 0.0
    cuts: dict[tuple[str, ...], float] = field(default_factory=dict)

    def of(self, formats: str) -> float:
        """Return the log-factor for a kind of arithmetic: its own, else the mean of the nearest that were measured.

        Layers timed alone have their weights in the cache, which flatters the larger ones of the original: a large part
        of what a prediction misses is common to all kinds.
        """
        return _mean(_nearest(self.latency, formats))

    def of_bytes(self, formats: str) -> int:
        """Return the bytes that files of a kind take more than their parameters do."""
        return round(_mean(_nearest(self.beside, formats)))

    def unsure_bytes(self, formats: str) -> int:
        """Return how far the bytes of a kind may lie from that: as far as one of the nearest that were measured does.

        What calibrated inputs put into a graph is not what weights alone put there.
        """
        usual = self.of_bytes(formats)
        return max((abs(round(one) - usual) for one in _nearest(self.beside, formats)), default=0)

    def of_quality(self, cuts: tuple[str, ...]) -> float:
        """Return the log-factor on what a recipe loses that cuts and trains like this."""
        return self.cuts.get(cuts, self.quality)

    def learn(
        self,
        formats: str,
        predicted: Prediction,
        latency_share: float | None,
        quality_share: float,
        cuts: tuple[str, ...] = (),
        size_bytes: float | None = None,
    ) -> None:
        """Take one measured candidate in: the next prediction of its kind starts from what was seen."""
        if size_bytes is not None:
            self.beside[formats] = self.of_bytes(formats) + size_bytes - predicted.size_bytes
        if latency_share is not None:
            self.latency[formats] = self.of(formats) + log(latency_share / predicted.latency_share)
        lost, expected = max(1e-4, 1 - quality_share), max(1e-4, 1 - predicted.quality_share)
        surprise = log(lost / expected)
        if cuts:
            self.cuts[cuts] = self.of_quality(cuts) + surprise
        self.quality += 0.5 * surprise


def _nearest(known: Mapping[str, float], formats: str) -> list[float]:
    """Return what is known of a kind; where nothing is, of those that have the most in common with it.

    How it rounds says more of a graph than what the rest is cast to.

    >>> _nearest({"8:dynamic": 1.0, "2:+bf16": 3.0}, "7:dynamic+bf16")
    [1.0]
    """
    if formats in known:
        return [known[formats]]
    common = {kind: _parts(kind) & _parts(formats) for kind in known}
    shared = {
        kind: 2 * len(parts - CAST_BYTES.keys()) + len(parts & CAST_BYTES.keys()) for kind, parts in common.items()
    }
    return [value for kind, value in known.items() if shared[kind] == max(shared.values())]


def _parts(formats: str) -> set[str]:
    return set(formats.replace(":", "+").split("+")) - {""}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class Tables:
    """Hold everything that predictions are made from."""

    model: ModelMap
    runtime: Runtime
    original: Original
    profile: Profile
    likelihood_metric: bool
    unchanged_memory: int
    proof_seconds: float  # of writing, checking, scoring and timing the unchanged model
    float_bytes: Mapping[str, int] = field(default_factory=dict)  # of a value as it is held; FLOAT_BYTES if not named
    blocks: tuple[BlockTimes, ...] = ()  # where a goal asks for less work


def predict(tables: Tables, steps: Sequence[Technique], corrections: Corrections | None = None) -> Prediction:
    """Return what a recipe is expected to reach."""
    corrections = corrections or Corrections()
    decisions, after = resolved(tables.model, steps)
    formats = format_key(decisions)
    size = predicted_bytes(tables, decisions, after) + corrections.of_bytes(formats)
    latency = predicted_latency(tables, decisions, after) * exp(corrections.of(formats))
    kl = left_by_repairs(steps) * sum(tables.profile.effects[step].kl for step in alone(steps))
    lost = predicted_loss(tables, steps, kl) * exp(corrections.of_quality(cut_key(steps)))
    unchanged_bytes = tables.original.same_runtime_bytes or tables.original.size_bytes
    return Prediction(
        quality_share=1 - lost,
        kl=kl,
        size_bytes=size,
        latency_seconds=latency,
        latency_share=latency / tables.original.latency.p50,
        memory_bytes=max(size, tables.unchanged_memory - unchanged_bytes + size),
        seconds=tables.proof_seconds,
        num_parameters=after.num_parameters,
        macs=after.macs,
    )


def predicted_loss(tables: Tables, steps: Sequence[Technique], kl: float) -> float:
    """Return the share of quality that the steps are expected to lose."""
    if tables.likelihood_metric:
        return 1 - exp(-kl)
    changed = sum(1 - tables.profile.effects[step].agreement for step in alone(steps))
    changed *= sqrt(left_by_repairs(steps))  # by the bound below: of answers as of the root of the divergence
    return min(changed if changed > 0 else 1.0, sqrt(kl / 2))


def alone(steps: Sequence[Technique]) -> list[Technique]:
    """Return the steps that have an effect of their own: all but repairs."""
    return [step for step in steps if step.divergence_left == 1]


def left_by_repairs(steps: Sequence[Technique]) -> float:
    """Return the share of the other steps' divergence that the repairs among these usually leave."""
    return prod(step.divergence_left for step in steps)


def predicted_bytes(tables: Tables, decisions: Sequence[Decision], after: ModelMap) -> int:
    """Return the bytes of the files that the recipe would ship; `after` is the map of what it leaves of the model."""
    unchanged_bytes = tables.original.same_runtime_bytes or tables.original.size_bytes
    specs: dict[str, Decision] = {}
    cast_bytes = FLOAT_BYTES
    for decision in decisions:
        if decision.weight is not None:
            specs[decision.parameter] = decision
        elif decision.dtype is not None:
            cast_bytes = CAST_BYTES.get(decision.dtype, FLOAT_BYTES)
    saved = _float_bytes(tables, tables.model) - _float_bytes(tables, after)
    for layer in after.layers:
        if layer.tied_to is not None:
            continue
        parameter = f"{layer.name}.weight"
        decided, before = specs.get(parameter), _float_width(tables, layer)
        spec, width = decided.weight if decided else None, min(before, cast_bytes)
        held = tables.runtime.stored_bytes(layer.role, layer.shape, spec, width)
        saved += tables.runtime.stored_bytes(layer.role, layer.shape, None, before) - held
    return unchanged_bytes - saved - bytes_beside_saved(tables.model, after)


def bytes_beside_saved(before: ModelMap, after: ModelMap) -> int:
    """Return how many bytes fewer the tokenizer's files take after a recipe that cut its vocabulary."""
    if before.words is None or after.words is None or after.words is before.words:
        return 0
    return before.words.num_bytes - after.words.num_bytes


def _float_bytes(tables: Tables, model: ModelMap) -> int:
    """Return the bytes of all parameters of a map in what they are held as before anything is rounded."""
    return sum(layer.num_parameters * _float_width(tables, layer) for layer in model.layers)


def _float_width(tables: Tables, layer: LayerInfo) -> int:
    """Return the bytes of a number of a layer as it is held before anything is rounded or cast."""
    usual = tables.runtime.adapter_bytes if layer.role == "adapter" else FLOAT_BYTES
    return tables.float_bytes.get(f"{layer.name}.weight", usual)


def predicted_latency(tables: Tables, decisions: Sequence[Decision], after: ModelMap) -> float:
    """Return the seconds of one request: the unchanged model's, with the layers' differences added up.

    Blocks that were timed as such, in the format that they get, are added up whole. Else a format that was not timed
    (the runtime holds no layer alone) counts as fast as the layer was before; a smaller shape in a format that was
    timed only in the larger one by its share of the products. What is no layer (attention, norms, sums) goes with the
    blocks.
    """
    unchanged = tables.original.same_runtime_latency or tables.original.latency
    seconds, shapes = tables.profile.seconds, tables.profile.shapes
    before = layer_formats(tables.model, [], shapes)
    whole, cut = layer_formats(tables.model, decisions, shapes), layer_formats(after, decisions, shapes)
    timed = [name for name in before if before[name] in seconds and whole[name] in seconds]
    change, in_blocks = change_of_blocks(tables.blocks, tables.model, after, decisions)
    for name in timed:
        if name in in_blocks:
            continue
        now = 0.0
        if name in cut:
            share = prod(cut[name].shape) / prod(before[name].shape)
            now = seconds.get(cut[name], seconds[whole[name]] * share)
        change += now - seconds[before[name]]
    rest = max(0.0, unchanged.p50 - sum(seconds[before[name]] for name in timed))
    blocks, left = (sum(stack.num_blocks for stack in model.stacks) for model in (tables.model, after))
    change -= rest * (1 - left / blocks) if blocks and timed and not in_blocks else 0.0
    return max(0.05 * unchanged.p50, unchanged.p50 + change)


def cut_key(steps: Sequence[Technique]) -> tuple[str, ...]:
    """Return what a recipe does besides rounding: recipes that agree in it lose much the same."""
    return tuple(str(step.entry()) for step in steps if step.family != "quantize")


def format_key(decisions: Sequence[Decision]) -> str:
    """Return which kind of arithmetic a recipe uses: what a latency correction carries over to.

    Embeddings do not count, since looking rows up takes next to no time, nor does fp16, which only the file is held in.
    """
    computed = [d for d in decisions if d.layer.kind != "embedding" and (d.weight or d.activation)]
    kinds = {f"{_codes_kind(d)}:{d.activation.kind if d.activation else ''}" for d in computed}
    kinds |= {d.dtype for d in decisions if d.dtype not in (None, "fp16")}
    return "+".join(sorted(kinds))


def _codes_kind(decision: Decision) -> str:
    if decision.weight is None:
        return ""
    return str(decision.weight.bits) if decision.weight.format == "int" else decision.weight.format


def as_figures(prediction: Prediction, original: Original) -> Mapping[str, float]:
    """Return a prediction by the names that goals use, in base units and as ratios."""
    return {
        "quality ratio": prediction.quality_share,
        "size": prediction.size_bytes,
        "latency p50": prediction.latency_seconds,
        "latency p50 ratio": prediction.latency_share,
        "memory": prediction.memory_bytes,
        "params": prediction.num_parameters or original.num_parameters,
        "flops": 2 * (prediction.macs or original.macs),
        "throughput": 1 / prediction.latency_seconds,
    }
