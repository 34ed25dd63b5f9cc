"""How passes are computed changes what they cost: blocks passed again or compiled learn what they did before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from gossamer.errors import TechniqueError
from gossamer.run.progress import Silent
from gossamer.tasks.base import Batch
from gossamer.train import passes
from gossamer.train.fitting import kept, kept_bytes
from gossamer.train.lesson import Lesson, Outcome, Plan
from gossamer.train.loop import train
from gossamer.train.objectives import Hidden, Logits
from gossamer.train.passes import blocks_in, check_passes, in_fp8, passed_again

PLAN = Plan(epochs=2, batch_size=8, rate=1e-3, micro_batch=4)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
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


def learned(folder: Path, **settings: Any) -> tuple[Outcome, dict[str, Tensor]]:
    asked = lesson()
    modules = dict(asked.student.named_modules())
    outcome = train(asked, replace(PLAN, **settings), folder / "checkpoints", Silent(), label="distill")
    assert dict(asked.student.named_modules()) == modules
    assert not any("forward" in module.__dict__ for module in modules.values())
    return outcome, dict(asked.student.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_that_are_passed_again_learn_the_same(tmp_path: Path, precision: str) -> None:
    plain, values = learned(tmp_path / "plain", precision=precision)
    again, others = learned(tmp_path / "again", precision=precision, checkpointing=True)
    assert plain == again
    assert plain.better
    for name, value in values.items():
        assert torch.equal(value, others[name]), name


def test_what_is_kept_is_what_was_predicted() -> None:
    asked = lesson()
    blocks = blocks_in(asked.student)
    batch = {name: torch.from_numpy(values) for name, values in row(0).inputs.items()}

    def run() -> Tensor:
        return asked.forward(asked.student, batch).sum()

    predicted = kept(run, blocks)
    assert predicted.again < 0.8 * predicted.all
    with passed_again(blocks):
        outside = kept_bytes(run)
    hidden = 4 * 12 * 32
    assert outside + 2 * hidden <= predicted.again  # and besides what one block keeps while it is passed back


@pytest.mark.slow
def test_compiled_blocks_learn_much_the_same(tmp_path: Path) -> None:
    plain, values = learned(tmp_path / "plain")
    found, others = learned(tmp_path / "compiled", compiled=True, checkpointing=True)
    assert found.after == pytest.approx(plain.after, rel=1e-3)
    for name, value in values.items():
        torch.testing.assert_close(value, others[name], rtol=0.05, atol=2e-3)


def not_installed(name: str) -> str:
    raise passes.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"precision": "fp8"}, r"precision: fp8 needs a GPU of compute capability 8\.9 .*: here is no GPU"),
        ({"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit needs torchao, which is not installed"),
        ({"compiled": True}, r"compiled: true needs a C\+\+ compiler"),
    ],
)
def test_what_this_machine_lacks_is_said_before_anything_is_begun(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(passes, "version", not_installed)
    check_passes(network(0), PLAN, "distill")
    with pytest.raises(TechniqueError, match=message):
        check_passes(network(0), replace(PLAN, **asked), "distill")


def test_an_older_gpu_is_named_by_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    plan = replace(PLAN, precision="fp8", device=torch.device("cuda", 0))
    with pytest.raises(TechniqueError, match=r"its compute capability is 8\.6"):
        check_passes(network(0), plan, "distill")


@pytest.mark.parametrize("asked", [{"checkpointing": True}, {"compiled": True}, {"precision": "fp8"}])
def test_a_model_without_blocks_is_refused(asked: dict[str, Any]) -> None:
    alone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(TechniqueError, match="is a matter of blocks"):
        check_passes(alone, replace(PLAN, **asked), "distill")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(passes, "EMULATED", True)


@pytest.mark.torchao
def test_fp8_multiplies_in_blocks_alone(emulated: None) -> None:
    del emulated
    asked = lesson()
    before = dict(asked.student.named_parameters())
    batch = {name: torch.from_numpy(values) for name, values in row(0).inputs.items()}
    with torch.no_grad():
        exact = asked.forward(asked.student, batch)
        with in_fp8(asked.student):
            kinds = {name: type(module).__name__ for name, module in asked.student.named_modules()}
            found = asked.forward(asked.student, batch)
            assert dict(asked.student.named_parameters()) == before
    assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == {
        f"bert.encoder.layer.{block}.{layer}"
        for block in (0, 1)
        for layer in (
            *(f"attention.self.{one}" for one in ("query", "key", "value")), "attention.output.dense",
            "intermediate.dense", "output.dense",
        )
    }  # fmt: skip
    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.1


@pytest.mark.torchao
def test_fp8_learns_nearly_what_bf16_does(tmp_path: Path, emulated: None) -> None:
    del emulated
    plain, _ = learned(tmp_path / "bf16", precision="bf16")
    found, _ = learned(tmp_path / "fp8", precision="fp8", checkpointing=True)
    assert found.better
    assert found.before != plain.before  # judged in FP8 as well
    assert found.after == pytest.approx(plain.after, rel=0.1)


@pytest.mark.torchao
def test_adam_in_8_bits_learns_nearly_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    plain, _ = learned(tmp_path / "plain")
    found, _ = learned(tmp_path / "8-bit", optimizer="adamw_8bit")
    assert found.better
    assert found.after == pytest.approx(plain.after, rel=0.1)
