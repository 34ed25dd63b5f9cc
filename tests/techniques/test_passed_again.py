"""Every step that trains learns the same where blocks are passed again on the way back."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_candidates.py"))
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 20, "micro_batch": 10, "precision": "fp32", "rate": 5e-4}
PRUNED = ("prune", {"what": "ffn", "to": "25%", "by": "magnitude", "refit": False})
ROUNDED = ("quantize", {"bits": 3, "group_size": 16, "targets": ["q", "k", "v", "o", "up", "gate", "down"]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "name", "settings"),
    [
        ([PRUNED], "distill", {"relations": 1, "attention": 0}),
        ([], "gradual", {"sparsity": 0.5}),
        ([], "gates", {"ffn": "50%", "epochs": 2}),
        ([ROUNDED], "qat", {}),
        ([ROUNDED], "lora", {"rank": 4, "merge": True}),
    ],
)
def test_it_learns_the_same(before: list[Any], name: str, settings: dict[str, Any]) -> None:
    ways = [{}, {"checkpointing": True}]
    plain, again = (
        TINY["made"](TINY["llama"](2), [*before, (name, {**SHORT, **settings, **way})]).module.state_dict()
        for way in ways
    )
    untouched = TINY["made"](TINY["llama"](2), before).module.state_dict() if before else TINY["llama"](2).state_dict()
    assert any(not torch.equal(values, untouched[key]) for key, values in plain.items() if key in untouched)
    assert plain.keys() == again.keys()
    for key, values in plain.items():
        torch.testing.assert_close(again[key], values, rtol=0, atol=0, msg=key)
