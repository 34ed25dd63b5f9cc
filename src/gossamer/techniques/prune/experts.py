"""Which experts of a block go: those that add least to what their tokens become.

    score of expert e = mean over the tokens x sent to it of g_e(x) |f_e(x)|

with g_e the weight that the router gives it and f_e what it computes: Lasby et al., "REAP the Experts", 2025. One that
no token was sent to scores 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.blocks import find_stacks
from gossamer.models.candidate import Candidate
from gossamer.models.roles import Dimension
from gossamer.models.walker import Forward, Walker


def kept_experts(
    candidate: Candidate, sizes: Mapping[Dimension, int], forward: Forward, samples: Sequence[dict[str, Tensor]]
) -> dict[Dimension, list[int]]:
    """Return the experts of each block that stay: those that add most, over all samples."""
    walker = Walker(candidate.module, forward, samples)  # all samples pass a block before the next one is read
    passes = partial(walker.outputs, find_stacks(candidate.module)[0], candidate.held)
    scores = expert_scores(candidate.module, list(sizes), passes)
    most = {one: scores[one].argsort(descending=True, stable=True)[:size] for one, size in sizes.items()}
    return {one: sorted(chosen.tolist()) for one, chosen in most.items()}


def expert_scores(
    module: nn.Module, dimensions: Sequence[Dimension], passes: Callable[[], Iterator[Any]]
) -> dict[Dimension, Tensor]:
    """Return the score of every expert, [E], by dimension, from all passes that `passes` makes.

    Raises TechniqueError where one is not finite, or experts are never called.
    """
    sums = {one: torch.zeros(one.size, dtype=torch.float64) for one in dimensions}
    tokens = {one: torch.zeros(one.size, dtype=torch.float64) for one in dimensions}
    running = False

    def note(one: Dimension, experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Any) -> None:
        nonlocal running
        if running:  # asked by this very function
            return
        running = True
        try:
            hidden_TH, chosen_TK, weights_TK = (*args, *kwargs.values())[:3]
            hidden_TH = hidden_TH.reshape(-1, hidden_TH.shape[-1])
            for expert in chosen_TK.unique().tolist():
                if expert >= one.size:  # a token that is masked out
                    continue
                token_N, place_N = torch.where(chosen_TK == expert)
                alone_N1 = torch.full_like(token_N[:, None], expert)
                ones_N1 = torch.ones_like(weights_TK[token_N, place_N])[:, None]
                found_NH = experts(hidden_TH[token_N], alone_N1, ones_N1)
                lengths_N = found_NH.double().norm(dim=-1) * weights_TK[token_N, place_N].double()
                sums[one][expert] += float(lengths_N.sum())
                tokens[one][expert] += len(token_N)
        finally:
            running = False

    with ExitStack() as hooks, torch.no_grad():
        for one in dimensions:
            part = module.get_submodule(one.name)
            hooks.callback(part.register_forward_hook(partial(note, one), with_kwargs=True).remove)
        for _ in passes():
            pass
    for one, total in sums.items():
        if not bool(torch.isfinite(total).all()) or not bool(tokens[one].any()):
            raise TechniqueError(
                f"what the experts of {one.name} add is {'not finite' if bool(tokens[one].any()) else 'never seen'}",
                "look at the calibration rows",
            )
    return {one: total / tokens[one].clamp(min=1) for one, total in sums.items()}
