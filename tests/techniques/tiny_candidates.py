"""A network with random token ids as a candidate with its map and calibration batches: what a technique is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.models.candidate import Candidate
from gossamer.models.roles import ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.recipe import Recipe, Step
from gossamer.run.progress import Silent
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques.base import Context, Decision, resolved
from gossamer.techniques.registry import resolve

TASK = get_task("causal-lm")


class Told(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a model predicts."""
    found = module(**inputs).logits
    assert isinstance(found, Tensor)
    return found


def opened(network: nn.Module, rows: int = 32, **more: Any) -> tuple[Candidate, ModelMap, Context]:
    """Return a copy of the network as a candidate; `more` is for its context."""
    draw = np.random.default_rng(0)
    batches = [Batch({"input_ids": draw.integers(1, 64, (1, 16))}, np.array([index])) for index in range(rows)]
    source = Source.open(network, forward=logits)
    candidate = Candidate(source=source, module=source.module(TASK))
    example = {"input_ids": torch.from_numpy(batches[0].inputs["input_ids"])}
    context = Context(task=TASK, example=batches[0].inputs, calibration=batches, **{"progress": Silent(), **more})
    return candidate, map_model(candidate.module, example, source.forward), context


def carried_out(
    candidate: Candidate, model: ModelMap, context: Context, entries: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[Candidate, ModelMap, list[Decision]]:
    """Return a candidate and its map after a recipe, and what was decided beforehand; both agree on what is left."""
    steps = resolve(Recipe(steps=tuple(Step(technique=name, settings=settings) for name, settings in entries)))
    decisions, after = resolved(model, steps)
    for step in steps:
        candidate = step.apply(candidate, model, context)
        model = step.after(model)
    assert model == after
    assert candidate.applied == [step.entry() for step in steps]
    return candidate, model, decisions


def rows_to_learn(count: int = 160) -> list[Batch]:
    """Return rows of random token ids, one a batch: the first 160 for learning, those behind to judge on."""
    draw = np.random.default_rng(1)
    return [Batch({"input_ids": draw.integers(1, 64, (1, 16))}, np.array([index])) for index in range(count)]


def distance_from(original: nn.Module, candidate: Candidate) -> float:
    """Return the mean divergence of a candidate from the original on rows that nothing learned from."""
    total = 0.0
    for row in rows_to_learn(200)[160:]:
        inputs = {"input_ids": torch.from_numpy(row.inputs["input_ids"])}
        with torch.no_grad():
            p, q = (logits(module, inputs).log_softmax(-1) for module in (original, candidate.module))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / 40


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Have a training end as by Ctrl-C behind a step; return a list that holds the step once it was reached."""
    from gossamer.train import watch

    reached: list[int] = []
    before: Callable[..., None] = watch.Watch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        before(self, args, state, control, **more)
        if state.global_step == step:
            reached.append(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.Watch, "on_step_end", on_step_end)
    return reached


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of every step that is taken from here on."""
    from gossamer.train import watch

    taken: list[int] = []
    before: Callable[..., None] = watch.Watch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        taken.append(state.global_step)
        before(self, args, state, control, **more)

    monkeypatch.setattr(watch.Watch, "on_step_end", on_step_end)
    return taken


def llama(num_layers: int = 2, *, tied: bool = True, biases: bool = False) -> LlamaForCausalLM:
    """Return a tiny language model, four times louder than random ones are: rounding and cutting it shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=32, tie_word_embeddings=tied,
        attention_bias=biases, mlp_bias=biases,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
            parameter.normal_(std=0.1) if name.endswith("bias") else None
    return model


def made(network: nn.Module, entries: Sequence[tuple[str, dict[str, Any]]], **more: Any) -> Candidate:
    """Return a copy of the network after a recipe, with rows to learn from; `more` is for its context."""
    candidate, model, context = opened(network, **more)
    context = dataclasses.replace(context, training=rows_to_learn, training_print="rows")
    return carried_out(candidate, model, context, entries)[0]
