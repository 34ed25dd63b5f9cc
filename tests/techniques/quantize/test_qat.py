"""`qat` on tiny models: nearer to the original with the files' own values, and nothing kept that is not better."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.recipe import Recipe
from gossamer.run.workspace import Run
from gossamer.techniques.registry import resolve

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
logits, opened, carried_out = TINY["logits"], TINY["opened"], TINY["carried_out"]
rows, llama = TINY["rows_to_learn"], TINY["llama"]
SHORT: dict[str, Any] = {
    "epochs": 4, "batch_size": 8, "rate": 2e-3, "code_rate": 0.03, "precision": "fp32", "labels": 0, "hidden": 0,
}  # fmt: skip
GPTQ = ("gptq", {"bits": 3, "group_size": 16})
TABLE = ("quantize", {"bits": 4, "group_size": 16, "targets": ["embedding"]})
QAT = ("qat", SHORT)


def made(entries: list[tuple[str, dict[str, Any]]], **more: Any) -> Candidate:
    found = TINY["made"](llama(), entries, **more)
    assert isinstance(found, Candidate)
    return found


def distance(candidate: Candidate) -> float:
    return float(TINY["distance_from"](llama(), candidate))


def test_it_comes_nearer_and_the_module_holds_the_codes_values() -> None:
    rounded = made([GPTQ, TABLE])
    found = made([GPTQ, TABLE, QAT])
    assert distance(found) < 0.8 * distance(rounded)
    assert set(found.quantized) == set(rounded.quantized)
    for name, codes in found.quantized.items():
        assert torch.equal(found.module.get_parameter(name), codes.dequantize())
        assert codes.spec == rounded.quantized[name].spec
        assert not torch.equal(codes.codes, rounded.quantized[name].codes)
    plain = [name for name, _ in found.module.named_parameters() if name not in found.quantized]
    assert plain
    assert all(torch.equal(found.module.get_parameter(n), rounded.module.get_parameter(n)) for n in plain)
    assert list(found.module.state_dict()) == list(rounded.module.state_dict())


def test_inputs_that_are_rounded_are_rounded_in_training() -> None:
    static = ("quantize", {"bits": 7, "activations": "static"})
    rounded, found = made([static]), made([static, QAT])
    assert found.activations == rounded.activations
    assert found.activations
    with rounded.simulated(), found.simulated():
        assert distance(found) < 0.97 * distance(rounded)


def test_a_mask_outlives_it() -> None:
    sparse = ("gptq", {"bits": 4, "group_size": 16, "sparsity": 0.5})
    before, found = made([sparse]), made([sparse, QAT])
    name = "model.layers.1.mlp.up_proj.weight"
    was, now = (one.module.get_parameter(name) for one in (before, found))
    assert bool((now[was == 0] == 0).all())
    assert not torch.equal(was, now)


def test_what_is_not_better_is_not_kept() -> None:
    rounded, found = made([GPTQ]), made([GPTQ, ("qat", {**SHORT, "code_rate": 0.9, "rate": 0.09, "epochs": 1})])
    assert all(torch.equal(found.quantized[n].codes, codes.codes) for n, codes in rounded.quantized.items())
    assert all(torch.equal(found.quantized[n].scale, codes.scale) for n, codes in rounded.quantized.items())


def test_a_run_that_is_there_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with Run(tmp_path / "run", {"verb": "test"}) as run:
            candidate = made([GPTQ, QAT], run=run, identity={"model": "tiny"})
        found.append({name: values.clone() for name, values in candidate.module.state_dict().items()})
    assert list(found[0]) == list(found[1])
    assert all(torch.equal(found[1][name], values) for name, values in found[0].items())


def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_in(folder: Path) -> dict[str, Tensor]:
        with Run(folder, {"verb": "test"}) as run:
            candidate = made([GPTQ, QAT], run=run, identity={"model": "tiny"})
        return {name: values.clone() for name, values in candidate.module.state_dict().items()}

    whole = run_in(tmp_path / "whole")
    TINY["stop_at_step"](monkeypatch, 12)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut")
    monkeypatch.undo()
    again = run_in(tmp_path / "cut")
    assert all(torch.equal(again[name], values) for name, values in whole.items())


def test_what_it_cannot_train_is_said() -> None:
    with pytest.raises(TechniqueError, match="qat trains integer codes, and nothing is rounded"):
        made([QAT])
    with pytest.raises(TechniqueError, match="qat trains integer codes, and 14 weights are nf4 group 16"):
        made([("quantize", {"format": "nf4", "group_size": 16}), QAT])
    for wrong in ("- qat: {}\n- gptq: {bits: 4}", "- gptq: {bits: 4}\n- compensate: {rank: 4}\n- qat: {}"):
        with pytest.raises(RecipeError):
            resolve(Recipe.from_yaml(wrong))
