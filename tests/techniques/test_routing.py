"""Experts in the sweep: the moments of each are those of a slow loop; one that saw too few tokens is told by name."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.experts import take_apart
from gossamer.models.quantized import QuantSpec
from gossamer.models.roles import LayerInfo
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.run.workspace import Run
from gossamer.tasks import get_task
from gossamer.tasks.base import Batch
from gossamer.techniques import routing
from gossamer.techniques.base import Context
from gossamer.techniques.block import observe
from gossamer.techniques.blockwise import BlockTechnique
from gossamer.techniques.prune.sparsify import Sparsify
from gossamer.techniques.quantize.calibrated import Gptq, LearnedRounding
from gossamer.techniques.quantize.gptq import gptq, output_error
from gossamer.techniques.quantize.grid import quantize_weight
from gossamer.techniques.quantize.moments import Moments
from gossamer.techniques.quantize.scaled import Awq, Smooth
from gossamer.techniques.routing import SHRINKAGE, shrunk, tokens_needed, told

TINY = runpy.run_path(str(Path(__file__).parents[1] / "models" / "tiny_experts.py"))
ids, mixtral, qwen3_moe, gpt_oss = TINY["ids"], TINY["mixtral"], TINY["qwen3_moe"], TINY["gpt_oss"]
SPEAK = get_task("causal-lm")


class Heard(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def prepared(model: PreTrainedModel, rows: int = 8, run: Run | None = None) -> tuple[Candidate, Any, Context, Heard]:
    """Return a candidate, its map and a context with that many calibration samples of 24 tokens."""
    source = Source.open(model, forward=lambda module, inputs: module(**inputs).logits)
    module = source.module(SPEAK)
    example = {"input_ids": ids().numpy()}
    heard = Heard()
    batches = [Batch({"input_ids": row[None]}, np.array([i])) for i, row in enumerate(ids(rows).numpy())]
    context = Context(SPEAK, example, batches, heard, run=run, identity={"test": "experts"})
    return Candidate(source, module), map_model(module, {"input_ids": ids()}), context, heard


@pytest.mark.parametrize("family", [mixtral, gpt_oss], ids=lambda family: family.__name__)
def test_moments_of_each_expert_are_those_of_a_slow_loop(family: Any) -> None:
    model = family()
    block = model.model.layers[0].mlp
    seen: list[tuple[Tensor, Tensor]] = []  # what reaches the experts, and where the router sends it

    def note(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        values = [*args, *kwargs.values()]
        chosen = next(value for value in values[1:] if not value.is_floating_point())
        seen.append((values[0].detach().clone(), chosen.detach().clone()))

    up, down = block.experts.gate_up_proj.detach().clone(), block.experts.down_proj.detach().clone()
    take_apart(model)
    layers = {name: part for name, part in block.experts.named_modules() if isinstance(part, torch.nn.Linear)}
    handle = block.experts.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        found = observe(layers, (partial(model, row[None]) for row in ids(4)))
    handle.remove()
    states, chosen = torch.cat([s for s, _ in seen]), torch.cat([c for _, c in seen])
    gate_name, down_name = ("w1", "w2") if "0.w1" in layers else ("gate_proj", "down_proj")
    for expert in range(4):
        mine = [state for state, experts in zip(states, chosen, strict=True) if expert in experts]
        if not mine:
            assert f"{expert}.{gate_name}" not in found
            continue
        rows = torch.stack(mine).double()
        moments = found[f"{expert}.{gate_name}"]
        assert moments.num_tokens == len(rows)
        torch.testing.assert_close(moments.second_II.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
        if family is mixtral:  # what the down layer reads, from the stacked weights
            gate, value = (rows @ up[expert].double().T).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * value
        else:
            both = rows @ up[expert].double() + block.experts.gate_up_proj_bias[expert].double()
            gate, value = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            inner = (value + 1) * gate * torch.sigmoid(1.702 * gate)
        torch.testing.assert_close(
            found[f"{expert}.{down_name}"].second_II.double(), inner.T @ inner / len(rows), rtol=1e-4, atol=1e-5
        )
    assert sum(found[name].num_tokens for name in found if name.endswith(down_name)) == chosen.numel()
    assert down.shape[0] == 4


def test_codes_of_the_pieces_are_those_of_the_stack() -> None:
    torch.manual_seed(0)
    stack, inputs = torch.randn(32, 64), torch.randn(500, 64)
    second = inputs.T @ inputs / 500
    for bits, group in ((4, 32), (3, None), (8, None)):
        spec = QuantSpec(bits=bits, group_size=group)
        for rounded in (quantize_weight, lambda w, s: gptq(w, second, s)):
            whole, gate, up = rounded(stack, spec), rounded(stack[:16], spec), rounded(stack[16:], spec)
            assert torch.equal(whole.codes, torch.cat([gate.codes, up.codes]))
            assert torch.equal(whole.scale, torch.cat([gate.scale, up.scale]))


def test_a_starved_expert_is_rounded_without_data_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TOKENS_PER_INPUT", 3.0)  # 96 tokens for gate and up, 144 for down
    model = mixtral()
    candidate, found, context, heard = prepared(model, rows=8)
    before = {name: values.clone() for name, values in candidate.module.named_parameters()}
    Gptq(bits=4, group_size=16, symmetric=True).apply(candidate, found, context)
    noted = candidate.routed["model.layers.0.mlp.experts"]
    fewest = int(np.argmin(noted["tokens"]))
    assert sum(noted["tokens"]) == 8 * 24 * 2
    assert noted["tokens"][fewest] < 96 < max(noted["tokens"])
    name = f"model.layers.0.mlp.experts.{fewest}.w1"
    assert any(words.startswith(f"{name}: {noted['tokens'][fewest]} of 96 tokens, rounded plainly")
               for words in noted["starved"])  # fmt: skip
    plain = quantize_weight(before[f"{name}.weight"], QuantSpec(bits=4, group_size=16), scale="mse")
    assert torch.equal(candidate.quantized[f"{name}.weight"].codes, plain.codes)
    line = next(line for line in heard.lines if line.startswith("model.layers.0: "))
    assert "4 experts saw" in line
    assert "too few for model.layers.0.mlp.experts." in line
    other = f"model.layers.0.mlp.experts.{int(np.argmax(noted['tokens']))}.w1"
    assert not any(words.startswith(other) for words in noted["starved"])
    plainly = quantize_weight(before[f"{other}.weight"], QuantSpec(bits=4, group_size=16), scale="mse")
    assert not torch.equal(candidate.quantized[f"{other}.weight"].codes, plainly.codes)
    # every expert has codes, the router has none
    assert len([name for name in candidate.quantized if ".experts." in name]) == 2 * 4 * 3
    router = "model.layers.1.mlp.gate.weight"
    assert router not in candidate.quantized
    assert torch.equal(candidate.module.get_parameter(router), before[router])


def test_layers_that_see_every_token_are_never_starved() -> None:
    seen = LayerInfo("q", "linear", "q", (64, 64), 4096)
    routed = LayerInfo("experts.1.up", "linear", "expert_up", (64, 60), 3840, experts="experts")
    assert tokens_needed(seen) == 1
    assert tokens_needed(routed) == 4
    assert told({}, {}) == ""
    assert told({"experts": [5, 0, 9]}, {}) == "; 3 experts saw 0 to 9 tokens each, 5 in the middle"


@pytest.mark.parametrize("step", [
    Awq(bits=4, group_size=16, symmetric=True, exponents=2), Smooth(), Sparsify(sparsity=0.5, passes=0),
    LearnedRounding(bits=4, group_size=16, symmetric=True, steps=2, batch_size=2),
], ids=lambda step: step.name)  # fmt: skip
def test_other_techniques_work_on_experts_too(step: BlockTechnique) -> None:
    candidate, found, context, _ = prepared(qwen3_moe())
    before = {name: values.clone() for name, values in candidate.module.named_parameters()}
    step.apply(candidate, found, context)
    experts = [name for name in before if ".experts." in name]
    changed = [name for name in experts if not torch.equal(candidate.module.get_parameter(name), before[name])]
    assert len(experts) == 8 * 3
    assert len(changed) == (0 if isinstance(step, Smooth) else len(experts))
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(candidate.module.get_parameter(router), before[router])
    assert sum(candidate.routed["model.layers.1.mlp.experts"]["tokens"]) == 8 * 24 * 2


def test_a_killed_sweep_still_tells_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TOKENS_PER_INPUT", 3.0)
    found = []
    for _ in range(2):
        with Run(tmp_path / "run", {"verb": "test"}) as run:
            candidate, model, context, _ = prepared(mixtral(), run=run)
            Gptq(bits=4, group_size=16, symmetric=True).apply(candidate, model, context)
            found.append(candidate.routed)
    assert found[0] == found[1]
    assert any(told["starved"] for told in found[0].values())
    assert list(found[0]) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_a_group_that_does_not_divide_an_expert_names_it() -> None:
    _, found, _, _ = prepared(qwen3_moe())
    with pytest.raises(TechniqueError, match=r"in_features 16 of model.layers.1.mlp.experts.0.down_proj"):
        Gptq(bits=4, group_size=32).resolve(found)


def test_moments_of_few_tokens_are_drawn_towards_equal_channels_and_that_pays() -> None:
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=draw) * torch.logspace(0, -1.5, 64)[:, None]
    spec, weight = QuantSpec(bits=4, group_size=32), torch.randn(32, 64, generator=draw)
    later = torch.randn(4000, 64, generator=draw) @ mixing
    for tokens in (8, 16):
        error = []
        for drawn in (False, True):
            seen = Moments.empty(64)
            seen.add(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)) @ mixing)
            plain = seen.second_II.clone()
            if drawn:
                shrunk([seen, seen])  # gate and up share their moments
                extra = SHRINKAGE * 64 / tokens * plain.diagonal().mean()
                torch.testing.assert_close(seen.second_II, plain + extra * torch.eye(64))
            codes = gptq(weight, seen.second_II, spec)
            error.append(output_error(weight, codes.dequantize(), later.T @ later / len(later)))
        assert error[1] < 0.9 * error[0]
