"""How passes are computed changes what they cost: blocks passed again or compiled learn what they did before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.run.progress import Silent
from gossamer.train import passes
from gossamer.train.fitting import kept, kept_bytes
from gossamer.train.lesson import Lesson, Outcome, Plan
from gossamer.train.loop import train
from gossamer.train.passes import blocks_in, check_passes, in_fp8, passed_again

Learn = Callable[..., tuple[Outcome, dict[str, Tensor]]]


@pytest.fixture
def learned(make_lesson: Callable[[], Lesson], plan: Plan, tmp_path: Path) -> Learn:
    """Train in some way; the networks are as they were, but for their values."""

    def learned(name: str, **settings: Any) -> tuple[Outcome, dict[str, Tensor]]:
        asked = make_lesson()
        modules = dict(asked.student.named_modules())
        outcome = train(asked, replace(plan, **settings), tmp_path / name, Silent(), label="distill")
        assert dict(asked.student.named_modules()) == modules
        assert not any("forward" in module.__dict__ for module in modules.values())
        return outcome, dict(asked.student.named_parameters())

    return learned


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_that_are_passed_again_learn_the_same(learned: Learn, precision: str) -> None:
    plain, values = learned("plain", precision=precision)
    again, others = learned("again", precision=precision, checkpointing=True)
    assert plain == again
    assert plain.better
    for name, value in values.items():
        assert torch.equal(value, others[name]), name


def test_what_is_kept_is_what_was_predicted(make_lesson: Callable[[], Lesson]) -> None:
    asked = make_lesson()
    blocks = blocks_in(asked.student)
    batch = {name: torch.from_numpy(values) for name, values in asked.learned[0].inputs.items()}

    def run() -> Tensor:
        return asked.forward(asked.student, batch).sum()

    predicted = kept(run, blocks)
    assert predicted.again < 0.8 * predicted.all
    with passed_again(blocks):
        outside = kept_bytes(run)
    hidden = 4 * 12 * 64
    assert outside + 2 * hidden <= predicted.again  # and besides what one block keeps while it is passed back


@pytest.mark.slow
def test_compiled_blocks_learn_much_the_same(learned: Learn) -> None:
    plain, values = learned("plain")
    found, others = learned("compiled", compiled=True, checkpointing=True)
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
    monkeypatch: pytest.MonkeyPatch, make_lesson: Callable[[], Lesson], plan: Plan, asked: dict[str, Any], message: str
) -> None:
    student = make_lesson().student
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(passes, "version", not_installed)
    check_passes(student, plan, "distill")
    with pytest.raises(TechniqueError, match=message):
        check_passes(student, replace(plan, **asked), "distill")


def test_an_older_gpu_is_named_by_what_it_has(
    monkeypatch: pytest.MonkeyPatch, make_lesson: Callable[[], Lesson], plan: Plan
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    plan = replace(plan, precision="fp8", device=torch.device("cuda", 0))
    with pytest.raises(TechniqueError, match=r"its compute capability is 8\.6"):
        check_passes(make_lesson().student, plan, "distill")


@pytest.mark.parametrize("asked", [{"checkpointing": True}, {"compiled": True}, {"precision": "fp8"}])
def test_a_model_without_blocks_is_refused(plan: Plan, asked: dict[str, Any]) -> None:
    alone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(TechniqueError, match="is a matter of blocks"):
        check_passes(alone, replace(plan, **asked), "distill")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(passes, "EMULATED", True)


@pytest.mark.torchao
def test_fp8_multiplies_in_blocks_alone(make_lesson: Callable[[], Lesson], emulated: None) -> None:
    del emulated
    asked = make_lesson()
    before = dict(asked.student.named_parameters())
    batch = {name: torch.from_numpy(values) for name, values in asked.learned[0].inputs.items()}
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
def test_fp8_learns_nearly_what_bf16_does(learned: Learn, emulated: None) -> None:
    del emulated
    plain, _ = learned("bf16", precision="bf16")
    found, _ = learned("fp8", precision="fp8", checkpointing=True)
    assert found.better
    assert found.before != plain.before  # judged in FP8 as well
    assert found.after == pytest.approx(plain.after, rel=0.1)


@pytest.mark.torchao
def test_adam_in_8_bits_learns_nearly_the_same(learned: Learn) -> None:
    pytest.importorskip("torchao")
    plain, _ = learned("plain")
    found, _ = learned("8-bit", optimizer="adamw_8bit")  # of weights of 4096 values and more
    assert found.better
    assert found.after != plain.after
    assert found.after == pytest.approx(plain.after, rel=0.1)
