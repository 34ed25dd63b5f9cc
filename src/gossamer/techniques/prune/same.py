"""Whether a smaller model computes what it should: beside the masked, the swept or the larger one, on the example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.reduction import reduced
from gossamer.models.roles import Dimension
from gossamer.techniques.base import Context

ROUNDING = 1e-3  # of the largest output: two models that compute the same may differ by so much
IN_ANOTHER_ORDER = "some weight has its units in another order than was thought"
LEAVE = "leave this model's units as they are, and say so to us"


def computed(candidate: Candidate, context: Context, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return what a model in memory computes for some inputs, the example's where none are given."""
    if inputs is None:
        inputs = {name: torch.from_numpy(values) for name, values in context.example.items()}
    with torch.no_grad():
        return candidate.source.forward(candidate.module, dict(inputs), context.task.output)


def check_same(
    expected: Tensor, found: Tensor, model: str, reason: str, remedy: str, *, rounding: float = ROUNDING
) -> None:
    """Raise TechniqueError where two models differ: `model` names the second, `reason` says what that means."""
    largest, away = float(expected.abs().max()), float((found - expected).abs().max())
    if not away <= rounding * max(largest, torch.finfo(torch.float32).tiny):
        raise TechniqueError(f"{model} is off by {away:.2e} where outputs reach {largest:.2e}: {reason}", remedy)


def cut_out(candidate: Candidate, kept: Mapping[Dimension, Sequence[int]], context: Context, label: str) -> Candidate:
    """Return the candidate without the units that are not kept, which are zero: it must compute the same.

    Raises TechniqueError where it does not. A model that is read piece by piece is not run for that.
    """
    expected = computed(candidate, context) if candidate.weights is None else None
    smaller = reduced(candidate, kept)
    if expected is not None:
        check_same(expected, computed(smaller, context), f"{label}: the smaller model", IN_ANOTHER_ORDER, LEAVE)
    return smaller
