"""Which weights stay: the largest scores of each row, or n of every m neighbouring inputs.

    magnitude   |w|                          Han et al., "Learning both Weights and Connections", 2015
    Wanda       |w| * sqrt(E x^2)            Sun et al., "A Simple and Effective Pruning Approach for LLMs", 2023, eq. 1

Both compare weights of one row (Wanda, section 3: per output works best for language models). Counts are exact: a row
of I weights at sparsity s keeps I - floor(s I), ties going to the first. A pattern n:m keeps n of each m, whatever s
is.

Shape suffixes: O rows, I inputs, m weights of one pattern.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor

from gossamer.errors import TechniqueError

Pattern = tuple[int, int]
MASKING = ("sparsify", "gradual")  # steps that take weights out one by one, whatever their settings


def read_pattern(text: str) -> Pattern:
    """Return (n, m) of `n:m`: n of m neighbours stay. Raises TechniqueError for anything else.

    >>> read_pattern("2:4")
    (2, 4)
    """
    first, colon, second = text.partition(":")
    if not (colon and first.isdigit() and second.isdigit() and 0 < int(first) < int(second)):
        raise TechniqueError(f"pattern {text!r} is not n:m with 0 < n < m", "write for example 2:4")
    return int(first), int(second)


def _pattern_or_nothing(text: str) -> str:
    if text:
        try:
            read_pattern(text)
        except TechniqueError as error:
            raise ValueError(error.message) from error
    return text


PatternText = Annotated[str, AfterValidator(_pattern_or_nothing)]  # of a recipe's setting: n:m, or nothing


def check_pattern(pattern: Pattern, num_inputs: int, name: str) -> None:
    """Raise TechniqueError when a pattern does not divide a layer's inputs."""
    if num_inputs % pattern[1]:
        raise TechniqueError(
            f"pattern {pattern[0]}:{pattern[1]} does not divide in_features {num_inputs} of {name}",
            "name the layer under `ignore`, or use another pattern",
        )


def kept(
    scores_OI: Tensor, sparsity: float, pattern: Pattern | None = None, *, ties_OI: Tensor | None = None
) -> Tensor:
    """Return what stays, bool [O, I]: the largest scores of each row, or of each m neighbours.

    Of equal scores those stay that are largest in `ties_OI`, or come first.

    >>> kept(torch.tensor([[3.0, 1.0, 2.0, 0.5]]), 0.5).tolist()
    [[True, False, True, False]]
    """
    num_rows, num_inputs = scores_OI.shape
    if pattern is None:
        groups, count = scores_OI, num_inputs - math.floor(sparsity * num_inputs)
    else:
        check_pattern(pattern, num_inputs, "the layer")
        groups, count = scores_OI.reshape(-1, pattern[1]), pattern[0]
    if ties_OI is None:
        order = torch.argsort(groups, dim=1, descending=True, stable=True)
    else:
        second = torch.argsort(ties_OI.reshape(groups.shape), dim=1, descending=True, stable=True)
        order = second.gather(1, torch.argsort(groups.gather(1, second), dim=1, descending=True, stable=True))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return mask.reshape(num_rows, num_inputs)


def magnitude_scores(weight_OI: Tensor) -> Tensor:
    """Return |w|."""
    return weight_OI.float().abs()


def wanda_scores(weight_OI: Tensor, second_II: Tensor) -> Tensor:
    """Return |w| times the root mean square of its input."""
    return weight_OI.float().abs() * second_II.diagonal().clamp(min=0).sqrt()


def has_masks(applied: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a step that was applied took weights out one by one."""
    return any(
        name in MASKING or settings.get("sparsity") or settings.get("pattern")
        for entry in applied
        for name, settings in entry.items()
    )
