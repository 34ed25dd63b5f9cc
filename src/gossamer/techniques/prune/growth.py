"""How sparsity grows while a network is trained, and which weights are gone at each moment.

Zhu and Gupta, "To prune, or not to prune", 2017, section 3: from step t_0 to step t_1 the share of zeros goes from s_i
to s_f, fast while there are many weights to choose from and slowly at the end:

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3

Those go whose scores are the smallest, of each layer or of all layers together. Scores are |w|, or those of movement
pruning (Sanh, Wolf, Rush, "Movement Pruning", 2020, section 4), which sum up over the steps how far a weight moves away
from zero, M being the mask and the gradient passing straight through it:

    w' = w M(S)          S <- S - dL/dw' w

A constant rate in front of the sum changes no order, so there is none (the authors' code has Adam move S instead). What
is masked keeps its value, so that it can come back while sparsity grows. A pattern n:m grows alike: of the weights that
it takes out (the m - n smallest of every m neighbours) the smallest go first, and all of them at the end.

Left out: soft movement pruning (a threshold on sigmoid(S), whose sparsity is found by trying penalties). Gates that are
drawn at random, for whole units: `gates`.

Shape suffixes: O rows, I inputs, N weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.techniques.prune.masks import Pattern, kept


def grown(start: float, final: float, progress: float) -> float:
    """Return the share of zeros at a progress between 0 and 1.

    >>> grown(0.0, 0.8, 0.5)
    0.7000000000000001
    """
    return final + (start - final) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def smallest(scores_N: Tensor, share: float, ties_N: Tensor) -> Tensor:
    """Return which floor(share N) scores are the smallest, bool [N]; of equal ones those smallest in `ties_N`.

    >>> smallest(torch.tensor([0.0, 2.0, 0.0, 1.0]), 0.5, torch.tensor([2.0, 1.0, 1.0, 1.0])).tolist()
    [True, False, True, False]
    """
    count = math.floor(share * len(scores_N) + 1e-6)  # 0.7 of 10 is 7, whatever floats say
    if count == 0:
        return torch.zeros_like(scores_N, dtype=torch.bool)
    last = scores_N.kthvalue(count).values  # finds the bound without sorting the rest
    gone_N = scores_N < last
    tied = (scores_N == last).nonzero().squeeze(1)
    order = torch.argsort(ties_N[tied], stable=True)
    gone_N[tied[order[: count - int(gone_N.sum())]]] = True
    return gone_N


def gone_of_layers(scores: Sequence[Tensor], share: float, ties: Sequence[Tensor]) -> list[Tensor]:
    """Return what is gone of each of some layers [O, I], the smallest scores of all of them together."""
    together = smallest(_flat(scores), share, _flat(ties))
    parts = torch.split(together, [layer.numel() for layer in scores])
    return [part.reshape(layer.shape) for part, layer in zip(parts, scores, strict=True)]


def gone_of_pattern(scores_OI: Tensor, pattern: Pattern, share: float, ties_OI: Tensor) -> Tensor:
    """Return what is gone of a layer, bool [O, I]: a share of its weights, all of them outside of the pattern n:m.

    A share of 1 - n/m is the whole pattern.
    """
    n, m = pattern
    outside_OI = ~kept(scores_OI, 0.0, pattern, ties_OI=ties_OI)
    if share >= 1 - n / m:
        return outside_OI
    gone_OI = torch.zeros_like(outside_OI)
    some = smallest(scores_OI[outside_OI], share / (1 - n / m), ties_OI[outside_OI])
    gone_OI[outside_OI] = some
    return gone_OI


def _flat(layers: Sequence[Tensor]) -> Tensor:
    return torch.cat([layer.flatten() for layer in layers])
