"""Which modules a recipe touches and with what, and why it leaves the others as they are.

Every module that owns parameters appears once. Read from the recipe's decisions and the model's map alone: nothing is
computed, so a model of any size is covered at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gossamer.errors import RecipeError
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.roles import LayerInfo, ModelMap
from gossamer.plan.records import Covered
from gossamer.runtimes.base import Runtime
from gossamer.techniques.base import Decision, Technique
from gossamer.techniques.match import matches
from gossamer.techniques.quantize.layers import ROUNDED_KINDS, num_inputs

Asked = tuple[QuantSpec, ActivationSpec | None]  # how a step would hold a layer
NO_ROUNDING = {
    "norm": "a norm is one number a channel: nothing to gain below 16 bits",
    "other": "no linear layer, convolution or embedding: no technique here rounds it",
}
ROUTER = "a router decides which expert a token is sent to: rounded only where a recipe names it"
NOT_CALLED = "not called by the request that the model was run on"
OTHER_EXPERTS = "that request's tokens went to other experts: rounded plainly if calibration tokens do too"


def coverage(steps: Sequence[Technique], model: ModelMap, runtime: Runtime) -> tuple[Covered, ...]:
    """Return one row for each module: what the steps do to its weight, or why none of them does anything.

    Raises RecipeError or TechniqueError where a step does not fit the model (`resolve`).

    >>> [row.why for row in coverage([Gptq()], model, runtime) if not row.done]  # doctest: +SKIP
    ['a norm is one number a channel: nothing to gain below 16 bits', ...]
    """
    decided: dict[str, list[str]] = {}
    sampled: set[str] = set()  # parameters that are fitted to samples
    asked: list[tuple[Technique, Asked | None]] = []
    left = model
    for step in steps:
        decisions, left = step.resolve(left), step.after(left)
        for decision in decisions:
            for member in decision.cut.dimension.members if decision.cut is not None else ():
                decided.setdefault(member.parameter, []).append(f"{step.name} {decision.cut}")
            decided.setdefault(decision.parameter, []).append(_words(step, decision))
            if decision.weight is not None and step.rows_needed():
                sampled.add(decision.parameter)
        first = next((decision for decision in decisions if decision.weight is not None), None)
        asked.append((step, (first.weight, first.activation) if first is not None and first.weight else None))
    return tuple(_row(layer, decided, sampled, asked, runtime) for layer in model.layers)


def _row(
    layer: LayerInfo,
    decided: Mapping[str, Sequence[str]],
    sampled: Collection[str],
    asked: Sequence[tuple[Technique, Asked | None]],
    runtime: Runtime,
) -> Covered:
    parameter = f"{layer.name}.weight"
    done = list(decided.get(layer.tied_to or parameter, ()))
    why = "" if done else _why_left(layer, asked, runtime)
    if layer.tied_to is not None:
        shared = f"shares {layer.tied_to}"
        done, why = ([f"{shared}: {', '.join(done)}"] if done else []), "" if done else shared
    elif parameter in sampled and layer.experts is not None:
        why = "" if layer.macs else OTHER_EXPERTS
    elif parameter in sampled and not layer.macs and layer.kind != "embedding":
        why = f"{NOT_CALLED}: without samples it is rounded plainly"
    return Covered(
        module=layer.name,
        role=layer.role,
        shape=layer.shape,
        num_parameters=layer.num_parameters,
        done=", ".join(done),
        why=why,
    )


def _words(step: Technique, decision: Decision) -> str:
    """Return what a decision does to a weight, in a few words."""
    parts = [str(part) for part in (decision.weight, decision.activation, decision.dtype) if part is not None]
    return f"{step.name} {' '.join(parts)}".rstrip()


def _why_left(layer: LayerInfo, asked: Sequence[tuple[Technique, Asked | None]], runtime: Runtime) -> str:
    """Return why no step does anything to a layer: the nearest reason wins."""
    if layer.role == "router":
        return ROUTER
    if layer.kind not in ROUNDED_KINDS:
        return NO_ROUNDING[layer.kind]
    named = [(step, how) for step, how in asked if _named(layer, step)]
    if named:
        step, how = named[0]
        reason = _cannot(layer, how, runtime)
        return f"named under `ignore` of {step.name}" + (f": {reason}" if reason else "")
    for _, how in asked:
        if (reason := _cannot(layer, how, runtime)) is not None:
            return reason
    if not layer.macs and layer.kind != "embedding" and layer.experts is None:
        return NOT_CALLED
    return f"no step's `targets` match it (role {layer.role})"


def _named(layer: LayerInfo, step: Technique) -> bool:
    """Say whether a step's `ignore` matches a layer."""
    try:
        return any(matches(layer, pattern) for pattern in getattr(step, "ignore", ()))
    except RecipeError:
        return False


def _cannot(layer: LayerInfo, how: Asked | None, runtime: Runtime) -> str | None:
    """Return why a layer could not be held like a step's others, None when it could (or the step rounds nothing)."""
    if how is None:
        return None
    spec, activation = how
    if spec.group_size and num_inputs(layer) % spec.group_size:
        return f"group_size {spec.group_size} does not divide its {num_inputs(layer)} inputs"
    refusal = runtime.refusal(layer.role, layer.shape, spec, activation)
    return None if refusal is None else f"{runtime.name} cannot hold it: {refusal}"
