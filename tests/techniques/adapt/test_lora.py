"""`lora` on tiny language models: what stands still, what is kept beside, what is merged and rounded again."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.adapters import adapters_of
from gossamer.models.candidate import Candidate
from gossamer.run.workspace import Run
from gossamer.techniques.adapt.lora import Lora
from gossamer.train.adapters import adapters, read_adapter

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))
logits, opened, carried_out = TINY["logits"], TINY["opened"], TINY["carried_out"]
rows, llama = TINY["rows_to_learn"], TINY["llama"]
SHORT: dict[str, Any] = {"epochs": 4, "batch_size": 8, "rate": 5e-3, "precision": "fp32", "labels": 0, "rank": 4}
ROUNDED = ("quantize", {"bits": 3, "group_size": 16, "ignore": ["lm_head"]})


def made(entries: list[tuple[str, dict[str, Any]]], **more: Any) -> Candidate:
    found = TINY["made"](llama(tied=False), entries, **more)
    assert isinstance(found, Candidate)
    return found


def distance(candidate: Candidate) -> float:
    return float(TINY["distance_from"](llama(tied=False), candidate))


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_kept_beside_codes_it_comes_nearer_and_codes_stay(kind: str) -> None:
    rounded = made([ROUNDED])
    found = made([ROUNDED, ("lora", {**SHORT, "kind": kind})])
    assert distance(found) < 0.8 * distance(rounded)
    assert all(torch.equal(found.quantized[n].codes, codes.codes) for n, codes in rounded.quantized.items())
    assert {f"{name}.weight" for name, _ in adapters_of(found.module)} == set(rounded.quantized)
    for name, codes in rounded.quantized.items():
        assert torch.equal(found.module.get_parameter(name), codes.dequantize())


def test_it_goes_on_from_what_compensate_left() -> None:
    solved = made([ROUNDED, ("compensate", {"rank": 4})])
    found = made([ROUNDED, ("compensate", {"rank": 4}), ("lora", SHORT)])
    assert distance(found) < 0.95 * distance(solved)
    with pytest.raises(TechniqueError, match="rank 4 beside 14 weights, and this step trains lora of rank 2"):
        made([ROUNDED, ("compensate", {"rank": 4}), ("lora", {**SHORT, "rank": 2})])
    with pytest.raises(TechniqueError, match="merging would round them again"):
        made([ROUNDED, ("compensate", {"rank": 4}), ("lora", {**SHORT, "merge": True, "epochs": 1})])


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_merged_into_floats_nothing_stands_beside(kind: str) -> None:
    cut = ("sparsify", {"sparsity": 0.5})
    before = made([cut])
    found = made([cut, ("lora", {**SHORT, "kind": kind, "merge": True})])
    assert distance(found) < distance(before)
    assert not list(adapters_of(found.module))
    layer = "model.layers.0.mlp.up_proj.weight"
    was, now = (one.module.get_parameter(layer) for one in (before, found))
    assert bool((now[was == 0] == 0).all()), "a mask outlives merging"
    assert not torch.equal(was, now)


def test_merged_into_codes_they_are_rounded_again_or_stay() -> None:
    eight = ("quantize", {"bits": 4, "group_size": 16, "ignore": ["lm_head"]})
    rounded = made([eight])
    found = made([eight, ("lora", {**SHORT, "merge": True, "epochs": 8})])
    assert not list(adapters_of(found.module))
    assert set(found.quantized) == set(rounded.quantized)
    for name, codes in found.quantized.items():
        assert torch.equal(found.module.get_parameter(name), codes.dequantize())
    assert distance(found) <= distance(rounded) * 1.02
    assert found.applied[-1] == {"lora": {**SHORT, "merge": True, "epochs": 8.0}}


def test_where_codes_stay_biases_that_rounding_corrects_stay_too(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = ("gptq", {"bits": 3, "group_size": 16, "ignore": ["lm_head"]})
    network = llama(tied=False, biases=True)
    monkeypatch.setattr(Lora, "_loss", lambda *_: float("inf"))
    before = TINY["made"](network, [solved])
    after = TINY["made"](network, [solved, ("lora", {**SHORT, "merge": True, "epochs": 1})])
    corrected = dict(before.module.named_parameters())
    assert any(
        not torch.equal(value, corrected[name]) for name, value in network.named_parameters() if name.endswith("bias")
    )
    for name, value in after.module.named_parameters():
        torch.testing.assert_close(value, corrected[name], rtol=0, atol=0, msg=name)


def test_a_run_that_is_there_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        with Run(tmp_path / "run", {"verb": "test"}) as run:
            candidate = made([ROUNDED, ("lora", SHORT)], run=run, identity={"model": "tiny"})
        found.append({name: values.clone() for name, values in candidate.module.named_parameters()})
    assert all(torch.equal(found[1][name], values) for name, values in found[0].items())


@pytest.mark.parametrize("kind", ["dora", "adalora", "ia3"])
def test_some_kinds_cannot_stand_beside(kind: str) -> None:
    with pytest.raises(TechniqueError, match=f"{kind} .*") as raised:
        made([ROUNDED, ("lora", {**SHORT, "kind": kind})])
    assert "merge: true" in raised.value.hint


def test_lengths_of_keys_values_and_inner_channels_end_in_weights_and_biases() -> None:
    cut = ("sparsify", {"sparsity": 0.5, "targets": ["down"]})
    settings = {**SHORT, "kind": "ia3", "merge": True, "rate": 3e-2}
    before, found = made([cut]), made([cut, ("lora", settings)])
    assert distance(found) < distance(before)
    changed = {n for n, p in found.module.named_parameters() if not torch.equal(p, before.module.get_parameter(n))}
    scaled = {name.rsplit(".", 2)[1] for name in changed}
    assert scaled <= {"k_proj", "v_proj", "down_proj"}
    assert "down_proj" in scaled
    for name in changed:
        was, now = (one.module.get_parameter(name) for one in (before, found))
        length = (now / was).nanmedian(1 if "down" not in name else 0, keepdim=True).values
        torch.testing.assert_close(was * length, now)


def test_lengths_of_a_layer_with_a_bias_are_its_bias_s_too() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    inputs = torch.randn(5, 4)
    with adapters(network, ["0", "1"], rank=1, alpha=1, kind="ia3", of_inputs=["1"]) as layers:
        for layer in layers.values():
            assert isinstance(layer, torch.nn.Module)
            layer.get_parameter("ia3_l.default").data.uniform_(0.5, 2)
        wanted, found = network(inputs), {name: read_adapter(layer) for name, layer in layers.items()}
        torch.testing.assert_close(network(inputs), wanted, rtol=0, atol=0)  # reading changed nothing
    assert found["0"].merged_bias is not None
    assert found["1"].merged_bias is None
    with torch.no_grad():
        for name, adapter in found.items():
            network.get_parameter(f"{name}.weight").copy_(adapter.merged)
        network.get_parameter("0.bias").copy_(found["0"].merged_bias)
    torch.testing.assert_close(network(inputs), wanted)


def test_lengths_want_keys_values_or_inner_channels() -> None:
    with pytest.raises(RecipeError, match="none of them makes keys or values"):
        made([("lora", {**SHORT, "kind": "ia3", "merge": True, "targets": ["q"]})])


def test_thin_layers_read_as_peft_merges_them() -> None:
    ours, theirs = llama(tied=False), llama(tied=False)
    name = "model.layers.1.self_attn.v_proj"
    flags = {n: p.requires_grad for n, p in ours.named_parameters()}
    torch.manual_seed(3)
    up, down = torch.randn(16, 4), torch.randn(4, 32)
    with adapters(ours, [name], rank=4, alpha=2, kind="rslora", start={name: (up, down)}) as layers:
        found = read_adapter(layers[name])
    config = LoraConfig(r=4, lora_alpha=2, target_modules=[name], use_rslora=True)
    peers = get_peft_model(theirs, config)
    layer = peers.get_submodule(f"base_model.model.{name}")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up / layer.scaling["default"])
    merged = peers.merge_and_unload().get_submodule(name).weight
    torch.testing.assert_close(found.merged, merged)
    assert found.thin is not None
    torch.testing.assert_close(found.thin[0] @ found.thin[1], up @ down)
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == flags
    assert torch.equal(ours.get_submodule(name).weight, llama(tied=False).get_submodule(name).weight)
    assert not hasattr(ours, "peft_config")
