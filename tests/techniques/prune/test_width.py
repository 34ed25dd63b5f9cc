"""The width of residual streams: found in many architectures, cut as the masked model computes, fitted, saved."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gossamer.errors import RecipeError, TechniqueError
from gossamer.models.example import made_up_example
from gossamer.models.experts import take_apart
from gossamer.models.reduced_map import reduced_map
from gossamer.models.roles import Cut, Dimension
from gossamer.models.structure import map_model
from gossamer.runtimes import get_runtime
from gossamer.techniques.prune.prune import Prune
from gossamer.techniques.prune.width import common_factor, narrowed
from gossamer.techniques.prune.width_fit import Pairs, fit_narrower, fitted

carried_out = runpy.run_path(str(Path(__file__).parents[1] / "tiny_candidates.py"))["carried_out"]
DIMENSIONS = runpy.run_path(str(Path(__file__).parents[2] / "models" / "test_dimensions.py"))
EXPERTS = runpy.run_path(str(Path(__file__).parents[2] / "models" / "tiny_experts.py"))
PRUNE = runpy.run_path(str(Path(__file__).parent / "test_prune.py"))
NAMED, logits, opened, candidate_of = (DIMENSIONS[name] for name in ("NAMED", "logits", "opened", "candidate_of"))
FAMILIES = [name for name in DIMENSIONS["EXPECTED"] if name != "resnet"]
SIZES = PRUNE["SIZES"]


def three_quarters(widths: list[Dimension]) -> dict[Dimension, list[int]]:
    return {one: sorted(set(range(one.size)) - set(range(1, one.size, 4))) for one in widths}


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_in_another_order_compute_the_same(family: str) -> None:
    module, example, model = opened(NAMED[family])
    expected = logits(module, example)
    done: set[tuple[int, int]] = set()
    for one in (one for one in model.dimensions if one.kind == "width"):
        order = torch.randperm(one.size, generator=torch.Generator().manual_seed(1))
        for member in one.members:
            parameter = module.get_parameter(member.parameter)
            if (id(parameter), member.axis) not in done:  # tied ones have several names
                done.add((id(parameter), member.axis))
                with torch.no_grad():
                    parameter.copy_(parameter.index_select(member.axis, order).clone())
    assert done
    torch.testing.assert_close(logits(module, example), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_narrower_model_is_the_masked_one_and_its_class_opens_it(family: str, tmp_path: Path) -> None:
    module, example, model = opened(NAMED[family])
    kept = three_quarters([one for one in model.dimensions if one.kind == "width"])
    smaller, before, _ = narrowed(candidate_of(module), kept, logits, example)  # compares the two
    assert {name: value.shape for name, value in before.named_parameters()} == {
        name: value.shape for name, value in NAMED[family]().named_parameters()
    }
    predicted = reduced_map(model, {one: len(units) for one, units in kept.items()})
    assert sum(parameter.numel() for parameter in smaller.module.parameters()) == predicted.num_parameters
    names = {name: tuple(value.shape) for name, value in smaller.module.named_parameters()}
    for layer in predicted.layers:
        if f"{layer.name}.weight" in names:
            assert names[f"{layer.name}.weight"] == (layer.shape[::-1] if layer.transposed else layer.shape)
    possible = all(one.attributes for one in kept)
    assert smaller.stock is possible
    for one, units in kept.items():
        assert (get_runtime("torch").cut_refusal(Cut(one, len(units))) is None) is possible
        assert get_runtime("onnxruntime").cut_refusal(Cut(one, len(units))) is None
    if possible:
        smaller.module.save_pretrained(tmp_path)  # type: ignore[operator]
        again = type(smaller.module).from_pretrained(tmp_path, attn_implementation="eager").eval()  # type: ignore[attr-defined]
        torch.testing.assert_close(logits(again, example), logits(smaller.module, example))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_cut_fitting_changes_nothing(family: str) -> None:
    module, example, model = opened(NAMED[family])
    expected = logits(module, example)
    kept = {one: list(range(one.size)) for one in model.dimensions if one.kind == "width"}
    smaller, before, _ = narrowed(candidate_of(module), kept, logits, example)
    fit_narrower(before, smaller.module, kept, model.stacks, logits, [example], damping=0.01, advance=lambda _: None)
    torch.testing.assert_close(logits(smaller.module, example), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", [PRUNE["llama"], PRUNE["bert"]], ids=["llama", "bert"])
def test_what_stays_makes_up_for_channels_that_went(network: Any) -> None:
    with torch.no_grad():
        blind = PRUNE["distance"](Prune(what="width", to="75%", samples=12, refit=False), network())
        made_up = PRUNE["distance"](Prune(what="width", to="75%", samples=12), network())
    assert made_up < blind


@pytest.mark.parametrize("by", ["activation", "fisher", "taylor", "magnitude", "obs"])
def test_a_channel_that_does_nothing_goes(by: Any) -> None:
    network = PRUNE["llama"]()
    _, model, _ = PRUNE["opened"](network, rows=8)
    (one,) = [one for one in model.dimensions if one.kind == "width"]
    with torch.no_grad():
        for member in one.members:
            network.get_parameter(member.parameter).select(member.axis, 5).zero_()
    candidate, model, context = PRUNE["opened"](network, rows=8)
    smaller = Prune(what="width", to=28, by=by, refit=False).apply(candidate, model, context)
    assert (smaller.module.get_parameter("model.embed_tokens.weight") != 0).any(0).all()


@pytest.mark.parametrize("family", EXPERTS["FAMILIES"], ids=lambda family: family.__name__)
def test_streams_that_experts_read_are_cut_and_fitted(family: Any) -> None:
    module, inputs = family(), {"input_ids": EXPERTS["ids"]()}
    take_apart(module)
    model = map_model(module, inputs)
    kept = three_quarters([one for one in model.dimensions if one.kind == "width"])
    if not kept:
        assert any("residual stream" in note for note in model.notes), model.notes
        return
    if family.__name__ == "olmoe":  # derives heads from its width, and its routers hold the width as a number
        with pytest.raises(TechniqueError, match="computes with its width"):
            narrowed(candidate_of(module), kept, logits, inputs)
        return
    smaller, before, _ = narrowed(candidate_of(module), kept, logits, inputs)
    fit_narrower(before, smaller.module, kept, model.stacks, logits, [inputs], damping=0.01, advance=lambda _: None)
    assert bool(torch.isfinite(logits(smaller.module, inputs)).all())


def test_the_fit_is_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    x_tI, x_tK = torch.randn(200, 6, generator=draw), torch.randn(200, 4, generator=draw)
    x_tK += x_tI[:, :4]
    weight_OI, bias_O = torch.randn(3, 6, generator=draw), torch.randn(3, generator=draw)
    pairs = Pairs.empty(6, 4)
    pairs.add(x_tI[:70], x_tK[:70])
    pairs.add(x_tI[70:], x_tK[70:])
    found_OK, _ = fitted(weight_OI, weight_OI[:, :4], pairs, centred=False, damping=1e-9)
    wanted = torch.linalg.lstsq(x_tK, x_tI @ weight_OI.t()).solution.t()
    torch.testing.assert_close(found_OK, wanted, rtol=1e-3, atol=1e-4)
    found_OK, shift_O = fitted(weight_OI, weight_OI[:, :4], pairs, centred=True, damping=1e-9)
    ones_t1 = torch.ones(200, 1)
    wanted = torch.linalg.lstsq(torch.cat([x_tK, ones_t1], 1), x_tI @ weight_OI.t() + bias_O).solution.t()
    torch.testing.assert_close(torch.cat([found_OK, (bias_O + shift_O)[:, None]], 1), wanted, rtol=1e-3, atol=1e-4)


def test_a_recipe_goes_on_with_the_narrower_model() -> None:
    candidate, model, context = PRUNE["opened"](PRUNE["llama"]())
    entries = [("prune", {"what": "width", "to": "75%", "samples": 8})]
    entries += [("prune", {"what": "ffn", "to": "50%", "samples": 8})]
    entries += [("gptq", {"bits": 8, "group_size": 8, "samples": 8, "targets": ["down", "q"]})]
    candidate, model, decisions = carried_out(candidate, model, context, entries)
    assert str(decisions[0].cut) == "32 to 24 width"
    assert candidate.module.config.hidden_size == 24  # type: ignore[union-attr]
    assert candidate.module.config.head_dim == 8  # type: ignore[union-attr]
    shapes = {name: tuple(codes.codes.shape) for name, codes in candidate.quantized.items()}
    assert shapes == {f"{one.layer.name}.weight": one.layer.shape for one in decisions if one.weight}


def test_a_width_that_the_config_does_not_take_is_refused_with_those_near() -> None:
    _, _, model = opened(NAMED["llama"])
    one = next(one for one in model.dimensions if one.kind == "width")
    refusal = get_runtime("torch").cut_refusal(Cut(one, 21))
    assert refusal is not None
    assert "does not take 21 width" in refusal
    assert "20, 24" in refusal


def test_a_stream_that_the_model_gives_back_is_not_cut() -> None:
    module = hf.BertModel(hf.BertConfig(**SIZES)).eval()
    example = made_up_example(module)
    assert example is not None
    model = map_model(module, example)
    assert any("gives back the residual stream" in note for note in model.notes)
    with pytest.raises(RecipeError, match="no width of this model can be cut"):
        Prune(what="width", to="75%").resolve(model)


def test_a_stream_that_is_read_in_pieces_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.merge = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.merge(torch.cat([x[:, :2], x[:, 2:]], -1))

    model = map_model(Network().eval(), {"x": torch.ones(1, 4, 8)}, lambda module, inputs: module(inputs["x"]))
    assert any("read in pieces" in note and "merge" in note for note in model.notes)
    assert not [one for one in model.dimensions if one.kind == "width"]


def test_a_model_that_computes_with_its_width_is_refused() -> None:
    torch.manual_seed(0)
    config = hf.GemmaConfig(**{**SIZES, "num_hidden_layers": 2}, num_key_value_heads=2, head_dim=8)
    module = hf.GemmaForCausalLM(config).eval()
    example = made_up_example(module)
    assert example is not None
    model = map_model(module, example)
    kept = three_quarters([one for one in model.dimensions if one.kind == "width"])
    with pytest.raises(TechniqueError, match="computes with its width"):
        narrowed(candidate_of(module), kept, logits, example)


def test_a_factor_in_common_is_found() -> None:
    found = torch.randn(3, 5)
    assert common_factor(0.5 * found, found) == pytest.approx(0.5)
    assert common_factor(found, found) == 1
    assert common_factor(torch.randn(3, 5), found) == 1
