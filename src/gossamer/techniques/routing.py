"""How many calibration tokens each expert of a block was sent, and how many it needs before they may choose its codes.

A router sends a token to few experts, so an expert sees a small and uneven share of all tokens: n of them. Its second
moments S then have rank n at most, and a solver is free to hide errors in directions that no token has shown, which
later tokens will. An expert that saw fewer than

    needed = TOKENS_PER_INPUT * inputs

is therefore rounded without data, and named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from gossamer.models.purpose import named
from gossamer.models.roles import LayerInfo
from gossamer.techniques.quantize.moments import Moments

TOKENS_PER_INPUT = 0.25  # see docs/concepts/experts.md for what was measured


def tokens_needed(layer: LayerInfo) -> int:
    """Return how many tokens a layer must have seen for its moments to be used; one that sees all of them needs one."""
    return 1 if layer.experts is None else max(1, math.ceil(TOKENS_PER_INPUT * layer.shape[1]))


def tokens_of_experts(layers: Iterable[LayerInfo], seen: Mapping[str, Moments]) -> dict[str, list[int]]:
    """Return how many tokens each expert saw, by what holds the experts; others are left out.

    `seen` are the moments by the layers' weights.
    """
    found: dict[str, dict[str, int]] = {}
    for layer in layers:
        if layer.experts is not None:
            expert = layer.name.removeprefix(f"{layer.experts}.").partition(".")[0]
            known = seen.get(f"{layer.name}.weight")
            counts = found.setdefault(layer.experts, {})
            counts[expert] = max(counts.get(expert, 0), 0 if known is None else known.num_tokens)
    return {name: list(counts.values()) for name, counts in found.items()}


def told(routed: Mapping[str, Sequence[int]], starved: Mapping[str, str]) -> str:
    """Return a few words for the progress line: how the tokens were spread, and who saw too few of them."""
    words = ""
    for counts in map(sorted, routed.values()):
        middle = counts[len(counts) // 2]
        words += f"; {len(counts)} experts saw {counts[0]} to {counts[-1]} tokens each, {middle} in the middle"
    return words + (f"; too few for {named(list(starved.values()))}" if starved else "")
