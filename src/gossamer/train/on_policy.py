"""Rows that the student writes itself: it learns where its own words lead it, not only where the data's do.

Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024, algorithm 1:
in a share of the steps the student continues prompts by sampling, and the divergence from the teacher is taken on what
it wrote; nothing flows back through the sampling. Prompts are the first halves of the step's own rows. What is written
is drawn from the step's number, so a training that goes on after a kill writes the same.

Left out: gradients through the choice of tokens (the paper finds that none are needed).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.errors import TechniqueError
from gossamer.tasks.base import Batch
from gossamer.train.rows import MASK

IDS = "input_ids"


@dataclass(frozen=True)
class OnPolicy:
    """Say in which share of the steps the student writes, how many tokens at most, and from which seed."""

    share: float
    new_tokens: int
    seed: int = 0

    def writes(self, step: int) -> bool:
        """Say whether the student writes the rows of this step, the same in all processes.

        >>> OnPolicy(1.0, 8).writes(3), OnPolicy(0.0, 8).writes(3)
        (True, False)
        """
        return random.Random(f"{self.seed} {step}").random() < self.share

    @torch.no_grad()
    def written(self, student: nn.Module, rows: Sequence[Batch], draw: int) -> list[Batch]:
        """Return rows that begin as the given ones (their first half) and go on as the student writes.

        `draw` numbers what is drawn. A row ends behind the first token that ends a text, or `new_tokens` on.
        """
        model: Any = student
        prompts = [row.inputs[IDS][:, : max(1, row.inputs[IDS].shape[1] // 2)] for row in rows]
        shortest = min(prompt.shape[1] for prompt in prompts)
        device = next(student.parameters()).device
        ids = torch.from_numpy(np.concatenate([prompt[:, -shortest:] for prompt in prompts])).to(device)
        ends = _ends(model)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(hash((self.seed, draw)) % 2**63)
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=min(ends, default=0),
            ).cpu()
        return [_row(row, tokens.numpy(), shortest, ends) for row, tokens in zip(rows, found, strict=True)]


def check_writes(module: nn.Module, rows: Sequence[Batch], step: str) -> None:
    """Raise TechniqueError where a model does not write on from token ids, or rows hold more than these."""
    can = getattr(module, "can_generate", None)
    if can is None or not can() or getattr(module.config, "is_encoder_decoder", False):
        raise TechniqueError(
            f"{step}: on_policy wants a language model that writes on, and {type(module).__name__} does not",
            "leave on_policy out",
        )
    if others := sorted(set(rows[0].inputs) - {IDS, MASK}):
        raise TechniqueError(
            f"{step}: on_policy continues token ids alone, and rows hold {', '.join(others)} too", "leave on_policy out"
        )


def _ends(model: Any) -> set[int]:
    """Return the tokens that end a text."""
    found = model.generation_config.eos_token_id
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _row(row: Batch, tokens: np.ndarray[Any, Any], start: int, ends: set[int]) -> Batch:
    """Return what was written as a row, up to the token that ends it."""
    ended = [place for place in range(start, len(tokens)) if int(tokens[place]) in ends]
    ids = tokens[None, : ended[0] + 1 if ended else len(tokens)].astype(np.int64)
    inputs = {IDS: ids} | ({MASK: np.ones_like(ids)} if MASK in row.inputs else {})
    return Batch(inputs, row.samples)
