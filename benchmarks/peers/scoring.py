"""Score logits against the original's: the one piece of code that every peer, and gossamer, is judged by.

For a window of T + 1 tokens, p the original's and q the candidate's distribution of each of the T next tokens:

    loss = -sum_t log q_t(token_t)    KL = sum_t sum_v p_t(v) (log p_t(v) - log q_t(v))    agree = sum_t [same argmax]

in nats, over the whole vocabulary, in float64. Sums are kept by window, so that bounds can be had over windows:

    perplexity = exp(sum of loss / tokens)    mean KL = sum of KL / tokens    top-1 agreement = sum of agree / tokens

The original's logits are computed again beside the candidate's, one window at a time: nothing large is stored, and no
bucket stands for a part of the vocabulary. Needs numpy and torch alone, so it runs in every peer's environment.

Shape suffixes: T scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLICE = 64  # positions worked on at once: float64 of the whole vocabulary is large

Logits = Callable[[NDArray[np.int64]], Any]
"""Token ids [tokens] to logits [tokens, V], as a tensor or an array."""


class NotComparable(Exception):
    """Say that two models' logits cannot be compared, or are no numbers."""


@dataclass
class WindowScores:
    """Hold sums over the tokens of each window, in the order of the windows."""

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    original_loss: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return perplexities, mean KL in nats a token, and the share of equal choices."""
        tokens = sum(self.tokens)
        return {
            "tokens": tokens,
            "perplexity": float(np.exp(sum(self.loss) / tokens)),
            "original_perplexity": float(np.exp(sum(self.original_loss) / tokens)),
            "divergence": sum(self.divergence) / tokens,
            "agreement": sum(self.agreement) / tokens,
        }


def score(original: Logits, candidate: Logits, windows: Iterable[NDArray[np.int64]]) -> WindowScores:
    """Return sums by window. Raises NotComparable for vocabularies of two sizes, or logits that are not finite."""
    found = WindowScores()
    for window in windows:
        targets_T = torch.from_numpy(np.ascontiguousarray(window[1:]))
        original_TV, candidate_TV = (_rows(logits(window), len(window)) for logits in (original, candidate))
        add(found, original_TV, candidate_TV, targets_T)
    return found


def add(found: WindowScores, original_TV: Tensor, candidate_TV: Tensor, targets_T: Tensor) -> None:
    """Add one window's sums to `found`; logits stand at the position before each target."""
    if original_TV.shape != candidate_TV.shape:
        raise NotComparable(
            f"logits {list(candidate_TV.shape)} stand beside the original's {list(original_TV.shape)}: "
            "another vocabulary or another window"
        )
    loss = original_loss = divergence = 0.0
    agreement = 0
    for start in range(0, len(targets_T), SLICE):
        part = slice(start, start + SLICE)
        targets = targets_T[part, None]
        log_p, log_q = (torch.log_softmax(logits[part].double(), dim=-1) for logits in (original_TV, candidate_TV))
        if not bool(torch.isfinite(log_q).all()):
            raise NotComparable("the candidate's logits are not finite")
        loss -= float(log_q.gather(1, targets).sum())
        original_loss -= float(log_p.gather(1, targets).sum())
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        agreement += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
    found.tokens.append(len(targets_T))
    found.loss.append(loss)
    found.original_loss.append(original_loss)
    found.divergence.append(divergence)
    found.agreement.append(agreement)


def _rows(logits: Any, tokens: int) -> Tensor:
    """Return logits [T, V] of all positions but the last, which predicts what the window does not hold."""
    tensor = logits if isinstance(logits, Tensor) else torch.from_numpy(np.asarray(logits))
    if tensor.shape[0] != tokens:
        raise NotComparable(f"{tensor.shape[0]} rows of logits for a window of {tokens} tokens")
    return tensor[:-1]
