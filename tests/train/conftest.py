"""A tiny encoder that learns from another one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from gossamer.tasks.base import Batch
from gossamer.train.lesson import Lesson, Plan
from gossamer.train.objectives import Hidden, Logits
from gossamer.train.passes import blocks_in


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def row(number: int) -> Batch:
    tokens = np.random.default_rng(number).integers(0, 64, (1, 12))
    return Batch({"input_ids": tokens, "attention_mask": np.ones_like(tokens)}, np.array([number % 3]))


def lesson() -> Lesson:
    student, teacher = network(0), network(1).requires_grad_(False)
    rows = [row(number) for number in range(48)]

    def forward(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return module(**inputs).logits  # type: ignore[no-any-return]

    return Lesson(
        student=student, teacher=teacher, forward=forward, objectives=[(1.0, Logits()), (0.5, Hidden())],
        student_blocks=blocks_in(student), teacher_blocks=blocks_in(teacher), learned=rows[:40], judged=rows[40:],
    )  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    """Say how it learns."""
    return Plan(epochs=2, batch_size=8, rate=1e-3, micro_batch=4)


@pytest.fixture
def make_lesson() -> Callable[[], Lesson]:
    """Make the same lesson again and again."""
    return lesson
