"""`low_rank`: the nearest outputs of that rank, two plain layers that later steps round, what it refuses, the map."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.errors import RecipeError, RuntimeUnavailable
from gossamer.models.factors import Factored, factored, factors
from gossamer.models.structure import map_model
from gossamer.plan.proof import refused_by
from gossamer.recipe import Recipe, Step
from gossamer.runtimes import get_runtime
from gossamer.techniques.prune.low_rank import LowRank
from gossamer.techniques.registry import resolve

PRUNE = runpy.run_path(str(Path(__file__).parent / "test_prune.py"))
carried_out = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))["carried_out"]
DIMENSIONS = runpy.run_path(str(Path(__file__).parents[2] / "models" / "test_dimensions.py"))
llama, bert, opened, distance = (PRUNE[name] for name in ("llama", "bert", "opened", "distance"))


def test_factors_are_those_of_a_weight_of_that_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(9, 3, generator=draw) @ torch.randn(3, 7, generator=draw)
    up_OR, down_RI = factors(weight_OI, 3)
    assert (up_OR.shape, down_RI.shape) == ((9, 3), (3, 7))
    torch.testing.assert_close(up_OR @ down_RI, weight_OI, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up_OR.norm(dim=0), down_RI.norm(dim=1))


def test_a_pair_computes_what_its_product_does() -> None:
    up_OR, down_RI, bias_O = torch.randn(5, 2), torch.randn(2, 4), torch.randn(5)
    pair, whole = Factored(up_OR, down_RI, bias_O), nn.Linear(4, 5)
    whole.weight, whole.bias = nn.Parameter(up_OR @ down_RI), nn.Parameter(bias_O)
    given = torch.randn(3, 4)
    torch.testing.assert_close(pair(given), whole(given))
    assert pair.weight.dtype == whole.weight.dtype


@pytest.mark.parametrize("network", [llama, bert], ids=["llama", "bert"])
def test_knowing_the_inputs_brings_outputs_nearer_than_truncation_alone(network: Any) -> None:
    def truncated(whole: nn.Module) -> float:
        changed = network()
        for name, layer in changed.named_modules():
            if name.endswith(("up_proj", "down_proj", "intermediate.dense", "output.dense")) and "att" not in name:
                outputs, inputs = layer.weight.shape
                up_OR, down_RI = factors(layer.weight.detach(), int(0.5 * outputs * inputs / (outputs + inputs)))
                layer.weight.data = up_OR @ down_RI
        draw = torch.Generator().manual_seed(1)
        samples = [{"input_ids": torch.randint(1, 64, (1, 16), generator=draw)} for _ in range(32)]
        with torch.no_grad():
            pairs = [(PRUNE["logits"](changed, x), PRUNE["logits"](whole, x)) for x in samples]
        return sum(float((found - wanted).square().sum()) for found, wanted in pairs)

    step = LowRank(rank="50%", targets=("up", "down"), samples=16)
    assert distance(step, network()) < truncated(network())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "vit", "whisper"])
def test_the_map_is_that_of_the_split_model(family: str) -> None:
    module, example, model = DIMENSIONS["opened"](DIMENSIONS["NAMED"][family])
    step = LowRank(rank=4, targets=("up", "down"))
    after = step.after(model)
    ranks = {one.layer.name: (4, one.layer.transposed) for one in step.resolve(model)}
    candidate = factored(DIMENSIONS["candidate_of"](module), ranks)
    assert not candidate.stock
    found = map_model(candidate.module, example)
    assert found.num_parameters == after.num_parameters
    assert found.macs == after.macs
    assert {layer.name: (layer.shape, layer.num_parameters) for layer in found.layers} == {
        layer.name: (layer.shape, layer.num_parameters) for layer in after.layers
    }
    assert {layer.role for layer in after.layers if layer.name.endswith((".0", ".1")) and layer.shape[0] == 4} <= {
        "up",
        "down",
    }


def test_a_recipe_rounds_both_layers() -> None:
    candidate, model, context = opened(bert())
    entries = [("low_rank", {"rank": "50%", "targets": ["up", "down"], "samples": 8})]
    entries += [("gptq", {"bits": 8, "group_size": None, "samples": 8, "targets": ["up"]})]
    entries += [("quantize", {"bits": 8, "targets": ["down"]})]
    cut, whole = LowRank.model_validate(entries[0][1]), model
    candidate, model, decisions = carried_out(candidate, model, context, entries)
    layer = "bert.encoder.layer.1.intermediate.dense"
    assert {f"{layer}.0.weight", f"{layer}.1.weight"} <= set(candidate.quantized)
    assert set(candidate.quantized) == {one.parameter for one in decisions if one.weight}
    assert str(decisions[0].cut) == "32 to 10 rank"
    assert refused_by(get_runtime("onnxruntime"), whole, [cut]) is None
    refusal = refused_by(get_runtime("torch"), whole, [cut])
    assert refusal is not None
    assert "no number of config.json" in refusal
    with pytest.raises(RuntimeUnavailable, match="does not say the shapes"):
        get_runtime("gguf").check_stock(candidate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": "half"}, "'half' is neither a share"),
        ({"rank": "0%"}, "'0%' is neither a share"),
        ({"rank": "100%"}, "'100%' is neither a share"),
        ({"rank": 0}, "a rank of 0 leaves nothing"),
        ({"rank": 22, "targets": ["up"]}, "rank 22 makes .* larger: 2,112 parameters, where 64 x 32 has 2,048"),
        ({"rank": 4, "targets": ["lm_head"]}, "matches no linear layer inside a block"),
        ({"rank": 4, "targets": ["upp"]}, "'upp' matches none"),
    ],
)
def test_bad_settings_are_refused_with_the_numbers(settings: dict[str, Any], message: str) -> None:
    _, model, _ = opened(llama(), rows=8)

    def asked() -> None:
        for step in resolve(Recipe(steps=(Step(technique="low_rank", settings=settings),))):
            step.resolve(model)

    with pytest.raises(RecipeError, match=message):
        asked()


def test_pruning_comes_before() -> None:
    entries = [("low_rank", {}), ("prune", {"what": "ffn", "to": "50%"})]
    with pytest.raises(RecipeError, match="low_rank stands before prune, but must come after it"):
        resolve(Recipe(steps=tuple(Step(technique=name, settings=settings) for name, settings in entries)))
