"""Which blocks of a stack go: those that change least, or those without which the predictions move least.

    influence     1 - mean over tokens of cos(x_i, x_i+1)       Men et al., "ShortGPT", 2024, section 3.1, equation 1
    divergence    KL(p || p without block i), measured          one after another, what went before being gone

x_i being the hidden states in front of block i. Influence takes one pass over the samples, and looks at one block at a
time; divergence takes one pass for each block that is left, for each block that goes, and sees what blocks do together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.roles import Dimension
from gossamer.models.walker import hidden_states
from gossamer.techniques.base import Context

NUM_MEASURED = 16  # samples of `divergence`, which passes them once for each block
Samples = Sequence[dict[str, Tensor]]


def blocks_to_go(
    candidate: Candidate, stack: Dimension, count: int, by: str, samples: Samples, context: Context
) -> list[int]:
    """Return the numbers of `count` blocks of a stack that can be missed most easily, in the order in which they go."""
    container = candidate.module.get_submodule(stack.stack)
    blocks = [container.get_submodule(str(number)) for number in range(stack.size)]
    source, output = candidate.source, context.task.output
    free = [number for number in range(stack.size) if number not in stack.held]

    def forward(sample: dict[str, Tensor]) -> Tensor:
        return source.forward(candidate.module, sample, output)

    with torch.no_grad():
        if by == "influence":
            scores = influences(blocks, lambda: (forward(sample) for sample in samples))
            return sorted(free, key=lambda number: (scores[number], number))[:count]
        return _by_divergence(blocks, free, count, forward, samples[:NUM_MEASURED], context)


def influences(blocks: Sequence[nn.Module], passes: Callable[[], Iterator[Any]]) -> list[float]:
    """Return how far each block turns its hidden states: 1 - cosine, mean over tokens of all passes.

    Raises TechniqueError where one is not finite, or a block is never called.
    """
    sums, tokens = [0.0] * len(blocks), [0] * len(blocks)
    handles = []
    for number, block in enumerate(blocks):

        def note(_: nn.Module, args: Any, kwargs: Any, result: Any, number: int = number) -> None:
            before, after = entering(args, kwargs), hidden_states(result)
            cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            sums[number] += float((1 - cosine).sum())
            tokens[number] += cosine.numel()

        handles.append(block.register_forward_hook(note, with_kwargs=True))
    try:
        for _ in passes():
            pass
    finally:
        for handle in handles:
            handle.remove()
    found = [total / max(1, count) for total, count in zip(sums, tokens, strict=True)]
    if not all(tokens) or not all(map(isfinite, found)):
        raise TechniqueError(f"the influence of blocks is {found}", "look at the calibration rows, or name the blocks")
    return found


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Let a block hand on what it is given while the `with` lasts."""

    def hand_on(_: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        before = entering(args, kwargs)
        return before if isinstance(result, Tensor) else (before, *result[1:])

    handle = block.register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states that a block is called with: its first argument, unless one is named so."""
    values = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
    assert isinstance(values, Tensor)
    return values


def _by_divergence(
    blocks: Sequence[nn.Module],
    free: list[int],
    count: int,
    forward: Callable[[dict[str, Tensor]], Tensor],
    samples: Samples,
    context: Context,
) -> list[int]:
    original = [torch.log_softmax(forward(sample).float(), -1) for sample in samples]
    gone: list[int] = []

    def lost(number: int) -> float:
        with skipped(blocks[number]):
            found = [torch.log_softmax(forward(sample).float(), -1) for sample in samples]
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(original, found, strict=True))

    passes = sum(len(free) - done for done in range(count))
    with ExitStack() as without, context.progress.stage("predictions without each block", passes) as advance:
        while len(gone) < count:
            losses = {}
            for number in free:
                if number not in gone:
                    losses[number] = lost(number)
                    advance(1)
            least = min(losses, key=lambda number: (losses[number], number))
            if not isfinite(losses[least]):
                raise TechniqueError("predictions without any one block are not finite", "name the blocks that go")
            gone.append(least)
            without.enter_context(skipped(blocks[least]))
    return gone
