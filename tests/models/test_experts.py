"""Experts taken apart: the model computes the same, and every name, value and count is the one that stacking hid."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.errors import ModelError
from gossamer.models.experts import find_experts, layouts, stacked_again, take_apart
from gossamer.models.inspect import describe
from gossamer.models.scalings import find_scalings
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.models.walker import Call
from gossamer.tasks import get_task
from gossamer.techniques.match import layers_matching

Family = Callable[..., PreTrainedModel]
TINY = runpy.run_path(str(Path(__file__).parent / "tiny_experts.py"))
FAMILIES, ids, saved = TINY["FAMILIES"], TINY["ids"], TINY["saved"]
mixtral, qwen2_moe, qwen3_moe, gpt_oss = (TINY[name] for name in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_model_taken_apart_computes_the_same_and_is_put_together_again(family: Family) -> None:
    model = family()
    stacked = {name: values.clone() for name, values in model.named_parameters()}
    with torch.no_grad():
        wanted = model(ids(2)).logits
        take_apart(model)
        assert not {name for name, _ in model.named_parameters()} & {f"{n}.{x.parameter}" for n, x in layouts(model)}
        torch.testing.assert_close(model(ids(2)).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(model)(ids(2)).logits, wanted, rtol=1e-4, atol=1e-5)
        for holder, layout in layouts(model):  # views: what changes a layer changes the stack, and nothing was copied
            assert torch.equal(layout.assembled(holder, model.get_parameter), stacked[f"{holder}.{layout.parameter}"])
        with stacked_again(model) as whole:
            assert {name for name, _ in whole.named_parameters()} == stacked.keys()
            torch.testing.assert_close(whole(ids(2)).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids(2)).logits, wanted, rtol=1e-4, atol=1e-5)


def test_an_expert_is_a_view_of_the_stack() -> None:
    model = qwen3_moe()
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    take_apart(model)
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(experts.get_parameter("3.gate_proj.weight"), stack[3, :16])
    assert torch.equal(experts.get_parameter("3.up_proj.weight"), stack[3, 16:])
    with torch.no_grad():
        experts.get_parameter("3.up_proj.weight").fill_(5.0)
    assert bool((stack[3, 16:] == 5.0).all())
    assert not bool((stack[3, :16] == 5.0).any())


def test_gate_and_up_that_lie_in_turns_are_told_apart() -> None:
    model = gpt_oss()
    stack = model.model.layers[0].mlp.experts.gate_up_proj.clone()
    take_apart(model)
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.get_parameter("2.gate_proj.weight"), stack[2][:, 0::2].t())
    assert torch.equal(experts.get_parameter("2.up_proj.weight"), stack[2][:, 1::2].t())
    assert experts.gate_up_proj_bias.shape == (4, 32)  # biases stay where they are


def test_a_use_that_is_not_known_is_an_error_and_not_another_result() -> None:
    model = mixtral()
    take_apart(model)
    matrix = model.model.layers[0].mlp.experts.gate_up_proj[1]
    with pytest.raises(ModelError, match="gate_up_proj of MixtralExperts is used by matmul"):
        torch.ones(3, 32) @ matrix
    with pytest.raises(ModelError, match="relu"):
        torch.relu(matrix)


def test_roles_of_experts_routers_and_what_is_beside_them() -> None:
    model = qwen2_moe()
    take_apart(model)
    found = map_model(model, {"input_ids": ids()})
    assert found.layer("model.layers.0.mlp.experts.3.gate_proj").role == "expert_gate"
    assert found.layer("model.layers.0.mlp.experts.3.up_proj").role == "expert_up"
    assert found.layer("model.layers.0.mlp.experts.0.down_proj").role == "expert_down"
    assert found.layer("model.layers.0.mlp.shared_expert.gate_proj").role == "gate"
    assert found.layer("model.layers.0.mlp.gate").role == "router"
    assert found.layer("model.layers.0.mlp.shared_expert_gate").role == "router"
    assert [(e.name, e.num_experts, e.stacked, e.alone) for e in found.experts] == [
        ("model.layers.0.mlp.experts", 4, True, True), ("model.layers.1.mlp.experts", 4, True, True),
    ]  # fmt: skip
    assert [stack.num_blocks for stack in found.stacks] == [2]
    # every token passes two experts, whichever they are
    inside = [layer for layer in found.layers if layer.role.startswith("expert_")]
    assert sum(layer.macs for layer in inside) == 2 * 24 * 2 * (3 * 32 * 16)
    assert found.num_parameters == sum(values.numel() for values in qwen2_moe().parameters())
    names = {layer.name for layer in layers_matching(found, ["linear"], "targets")}
    assert "model.layers.0.mlp.shared_expert_gate" not in names
    assert "model.layers.1.mlp.experts.2.up_proj" in names
    assert len(layers_matching(found, ["expert"], "targets")) == 2 * 4 * 3
    assert len(layers_matching(found, ["down"], "targets")) == 2 * (4 + 1)
    assert len(layers_matching(found, ["expert_down"], "targets")) == 2 * 4
    assert len(layers_matching(found, ["model.layers.0.mlp.experts.3"], "targets")) == 3
    assert [layer.name for layer in layers_matching(found, ["router"], "targets")][:1] == ["model.layers.0.mlp.gate"]


def test_blocks_with_and_without_experts_are_one_stack() -> None:
    model = qwen3_moe(num_experts=64)
    take_apart(model)
    found = map_model(model, {"input_ids": ids()})
    assert [(stack.name, stack.num_blocks) for stack in found.stacks] == [("model.layers", 2)]
    assert [experts.name for experts in found.experts] == ["model.layers.1.mlp.experts"]
    assert any("64 experts in 1 blocks: the example's tokens are sent to" in note for note in found.notes)


class Listed(nn.Module):
    """A block whose experts are an ordinary list, with a router beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False)) for _ in range(3)
        )
        self.choose = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        best = self.choose(x).argmax(-1)
        rows = zip(best.flatten(), x.flatten(0, 1), strict=True)
        return x + torch.stack([self.experts[int(expert)](row) for expert, row in rows]).view_as(x)


def test_a_list_of_experts_is_found_with_its_router_and_stays_ordinary() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Listed(), Listed())
    found = map_model(network, {"input": torch.randn(1, 12, 8)})
    assert [(e.name, e.num_experts, e.routers, e.stacked) for e in found.experts] == [
        ("0.experts", 3, ("0.choose",), False), ("1.experts", 3, ("1.choose",), False),
    ]  # fmt: skip
    assert found.layer("1.experts.2.0").experts == "1.experts"
    assert {layer.name for layer in layers_matching(found, ["linear"], "targets")}.isdisjoint(("0.choose", "1.choose"))


def test_inspect_lists_experts(tmp_path: Path) -> None:
    card = describe(Source.open(saved(mixtral(), tmp_path)), get_task("causal-lm"), {"input_ids": ids()})
    rows = {row.role: row for row in card.roles}
    assert rows["expert_gate"].num_layers == 2 * 4
    assert rows["expert_gate"].shapes == {"48x32": 8}
    assert rows["expert_down"].num_parameters == 2 * 4 * 32 * 48
    assert rows["expert_up"].macs == 24 * 2 * 2 * 32 * 48
    assert rows["router"].num_layers == 2
    assert next(option for option in card.options if option.family == "quantize linear").num_layers == 2 * (4 + 12) + 1
    assert any("router" in reason or "sent to" in reason for reason in card.left_out.values())


class Unknown(nn.Module):
    """Stacked matrices that are used in one product, as no interface describes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("bti,eoi->bto", x, self.up)


def test_stacked_matrices_that_are_not_understood_are_named() -> None:
    network = nn.Sequential(Unknown(), Unknown())
    take_apart(network)
    assert not find_experts(network)
    notes = map_model(network, {"input": torch.randn(1, 4, 8)}).notes
    assert any("stacked matrices (3x8x8) whose use is not understood" in note for note in notes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_checkpoint_is_read_piece_by_piece(family: Family, tmp_path: Path) -> None:
    source = Source.open(saved(family(), tmp_path))
    whole, task = source.module(get_task("causal-lm")), get_task("causal-lm")
    skeleton: Any = source.skeleton(task)
    wanted = dict(whole.named_parameters())
    assert [name for name, _ in skeleton.named_parameters()] == list(wanted)
    for name, values in wanted.items():
        assert torch.equal(source.read(name), values), name
    assert source.stored_dtype(next(name for name in wanted if ".experts." in name)) == torch.float32


def test_a_norm_in_front_of_attention_is_scaled_beside_experts_that_were_not_reached() -> None:
    model = mixtral(num_local_experts=16)
    take_apart(model)
    calls: list[Call] = []
    with torch.no_grad():
        handle = model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True
        )
        model(ids(1, 3))
        handle.remove()
    found = [str(place) for place in find_scalings(model.model.layers[0], calls[0])]
    assert found[0].startswith("input_layernorm.weight -> self_attn.q_proj.weight, self_attn.k_proj.weight")
    assert not any(place.startswith("post_attention_layernorm") for place in found)  # the router reads it too
