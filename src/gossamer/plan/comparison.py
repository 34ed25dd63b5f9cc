"""What an artifact's files hold beside what the recipe says, and what they compute beside the in-memory candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gossamer.models.experts import STACKS
from gossamer.models.gguf_blocks import BlockName
from gossamer.models.levels import FORMATS
from gossamer.models.quantized import QuantSpec
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.plan.job import Job
from gossamer.plan.records import Equivalence, TensorRow
from gossamer.runtimes.base import StoredTensor
from gossamer.tasks.base import Arrays, RunAll

CHECKED_VALUES = 1 << 21  # of one output that is compared, whole rows of its last axis
EXACT_TOLERANCE = 1e-3  # float arithmetic in another order: 1e-6 to 1e-4 was seen
CAST_TOLERANCE = {"fp16": 0.01, "bf16": 0.05}  # a runtime may compute in 16 bits too: about ten of the format's steps
CACHE_TOLERANCE = 0.01  # keys and values on the border of two codes: 1e-4 was seen where blocks are few
INTEGER_TOLERANCE = 0.05  # a code that rounds the other way moves an output by a step; see docs/concepts/proof.md


def thinned(values: NDArray[Any]) -> NDArray[Any]:
    """Return the last axis' rows [N, C] of an output, evenly spread and so few that CHECKED_VALUES are not exceeded.

    A language model's logits for 8 windows of 2048 tokens and 128,000 words would be 8 GB.
    """
    rows = values.reshape(-1, values.shape[-1])
    count = max(1, CHECKED_VALUES // rows.shape[1])
    return np.ascontiguousarray(rows[[i * len(rows) // count for i in range(count)]] if len(rows) > count else rows)


def compare_outputs(
    job: Job,
    arrays: Arrays,
    run_all: RunAll,
    decisions: Sequence[Mapping[str, Any]],
) -> Equivalence:
    """Return how an opened artifact's outputs compare with the in-memory candidate's on the kept batches.

    Weight-only artifacts must agree to float rounding, those cast to 16 bits to the rounding of 16-bit arithmetic.
    Where inputs, or keys and values, are rounded too, a value on the border of two codes may fall to either side, so
    they may differ by as much as half of what the recipe itself changed.
    """
    indices = sorted({int(name.split(".")[0]) for name in arrays})
    found, decided, original = [], [], []
    prefixes = [f"{index}.input." for index in indices]
    inputs = [{n.removeprefix(p): v for n, v in arrays.items() if n.startswith(p)} for p in prefixes]
    for index, outputs in zip(indices, run_all(inputs), strict=True):
        found.append(thinned(outputs[job.task.output]).astype(np.float64))
        decided.append(arrays[f"{index}.decided"].astype(np.float64))
        original.append(arrays[f"{index}.original"].astype(np.float64))
    spread = _rms(*(values - values.mean() for values in decided)) or 1.0
    error = _rms(*(a - b for a, b in zip(found, decided, strict=True))) / spread
    change = _rms(*(a - b for a, b in zip(decided, original, strict=True))) / spread
    allowed = max((CAST_TOLERANCE[d["dtype"]] for d in decisions if d["dtype"]), default=EXACT_TOLERANCE)
    if any(decision.get("cache") for decision in decisions):
        allowed = max(allowed, CACHE_TOLERANCE, 0.5 * change)  # see docs/concepts/proof.md
    rounded = job.runtime.rounds_inputs and any(decision["weight"] for decision in decisions)
    if rounded or any(decision["activation"] for decision in decisions):
        allowed = max(INTEGER_TOLERANCE, 0.5 * change)
    same = [(a.argmax(-1) == b.argmax(-1)).mean() for a, b in zip(found, decided, strict=True)]
    return Equivalence(
        relative_error=error,
        change=change,
        allowed=allowed,
        top1_agreement=float(np.mean(same)),
        num_batches=len(indices),
        passed=bool(np.isfinite(error) and error <= allowed),
    )


def _rms(*parts: NDArray[np.float64]) -> float:
    total = sum(float(np.square(part).sum()) for part in parts)
    return float(np.sqrt(total / sum(part.size for part in parts)))


def compare_tensors(
    model: ModelMap, decisions: Sequence[Mapping[str, Any]], stored: Sequence[StoredTensor]
) -> tuple[TensorRow, ...]:
    """Return one row for each layer's parameter: what the recipe asked for beside what the file holds.

    `model` is the map of what the recipe leaves: where something was cut, shapes are compared too.
    """
    cut = any(decision.get("cut") for decision in decisions)
    by_name = {tensor.name: tensor for tensor in stored}
    asked: dict[str, dict[str, Any]] = {}
    for decision in (one for one in decisions if not one.get("cache") and not one.get("cut")):
        kept = asked.setdefault(decision["parameter"], dict(decision))
        if decision["weight"]:  # a step before it may have changed values only
            kept |= {"weight": decision["weight"], "activation": decision["activation"]}
        if decision["dtype"] and not kept["weight"]:
            kept["dtype"] = decision["dtype"]
    rows = []
    for layer in model.layers:
        parameter = f"{layer.name}.weight"
        if layer.tied_to is not None:
            continue
        wanted = asked.get(parameter)
        tensor = by_name.get(parameter) or _in_a_stack(layer, by_name)
        original_bytes = 4 * int(np.prod(layer.shape))
        rows.append(
            TensorRow(
                parameter=parameter,
                role=layer.role,
                shape=layer.shape,
                asked=_asked_text(wanted) if layer.role != "adapter" else "thin layer",
                found=_found_text(tensor),
                bytes=tensor.bytes if tensor else 0,
                original_bytes=original_bytes,
                activation=wanted["activation"] if wanted else "",
                agrees=_agrees(wanted, tensor) and not (cut and _other_shape(layer, tensor)),
            )
        )
    return (*rows, *(_cache_row(decision, by_name) for decision in decisions if decision.get("cache")))


def _other_shape(layer: LayerInfo, tensor: StoredTensor | None) -> bool:
    """Say whether a file holds a weight in another shape than was asked for (it may lie turned there, or flat)."""
    return tensor is not None and prod(tensor.shape) != prod(layer.shape)


def _cache_row(decision: Mapping[str, Any], by_name: Mapping[str, StoredTensor]) -> TensorRow:
    """Return what the file holds for an attention's keys or values beside what the recipe asked for."""
    tensor = by_name.get(decision["parameter"])
    found = "missing" if tensor is None else tensor.dtype
    return TensorRow(
        parameter=decision["parameter"],
        role="cache",
        shape=tensor.shape if tensor else (),
        asked=decision["cache"],
        found=found,
        bytes=tensor.bytes if tensor else 0,
        original_bytes=0,
        activation="",
        agrees=found == decision["cache"],
    )


def _in_a_stack(layer: LayerInfo, by_name: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """Return a layer's part of the stacked tensor that holds it with others like it, or None where there is none."""
    for name in STACKS.get(layer.role, ()):
        stack = by_name.get(f"{layer.experts}.{name}")
        if stack is not None:
            share = stack.bytes * int(np.prod(layer.shape)) // int(np.prod(stack.shape))
            return replace(stack, name=f"{layer.name}.weight", shape=layer.shape, bytes=share)
    return None


def _asked_text(decision: Mapping[str, Any] | None) -> str:
    if decision is None:
        return "unchanged"
    weight = decision["weight"]
    if not weight:
        return str(decision["dtype"])
    return str(QuantSpec.model_validate(weight))


def _found_text(tensor: StoredTensor | None) -> str:
    if tensor is None:
        return "folded into another tensor"
    if tensor.bits >= 16:
        return tensor.dtype
    scope = f"group {tensor.group_size}" if tensor.group_size else "per channel"
    if _format_found(tensor) != "int":
        return f"{tensor.dtype} {scope}"
    return f"{tensor.dtype} {'symmetric' if tensor.symmetric else 'asymmetric'} {scope}"


def _format_found(tensor: StoredTensor) -> str:
    """Return which format a file's codes are of: `int`, or that of levels or of blocks whose name it bears."""
    return tensor.dtype if tensor.dtype in FORMATS or tensor.dtype in get_args(BlockName) else "int"


def _agrees(decision: Mapping[str, Any] | None, tensor: StoredTensor | None) -> bool:
    """Say whether the file holds what was asked: the width, and for codes the format and the grid."""
    if decision is None or not decision["weight"]:
        return tensor is None or tensor.bits in (16, 32)
    if tensor is None:
        return False
    weight = decision["weight"]
    group = weight["group_size"] or None
    whole_row = group is None or tensor.group_size == group or (tensor.group_size is None and group == tensor.shape[1])
    same = _format_found(tensor) == weight.get("format", "int") and tensor.bits == weight["bits"]
    return same and tensor.symmetric == weight["symmetric"] and whole_row
