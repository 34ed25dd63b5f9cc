"""What can be cut, found in small models of many architectures; cut, they compute what they did masked."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.models.candidate import Candidate
from gossamer.models.example import made_up_example
from gossamer.models.experts import take_apart
from gossamer.models.quantized import QuantSpec
from gossamer.models.reduced_map import reduced_map
from gossamer.models.reduction import reduced
from gossamer.models.roles import Cut, Dimension, ModelMap
from gossamer.models.source import Source
from gossamer.models.stock import Change, Stock, changed_config, shapes_of
from gossamer.models.structure import map_model
from gossamer.runtimes import get_runtime
from gossamer.techniques.quantize.grid import quantize_weight

STRUCTURE = runpy.run_path(str(Path(__file__).parent / "test_structure.py"))
EXPERTS = runpy.run_path(str(Path(__file__).parent / "tiny_experts.py"))
NAMED = {build.__name__: build for build in STRUCTURE["FAMILIES"]}
IMPOSSIBLE: tuple[str, ...] = ()  # no number of the config
# kind -> (number of dimensions, units of each, what config.json calls them)
EXPECTED: dict[str, dict[str, tuple[int, int, tuple[str, ...]]]] = {
    "bert": {
        "ffn": (2, 64, ("intermediate_size",)),
        "heads": (2, 4, IMPOSSIBLE),
        "layers": (1, 2, ("num_hidden_layers",)),
        "width": (1, 32, IMPOSSIBLE),
    },
    "distilbert": {
        "ffn": (2, 64, ("hidden_dim",)),
        "heads": (2, 4, IMPOSSIBLE),
        "layers": (1, 2, ("n_layers",)),
        "width": (1, 32, IMPOSSIBLE),
    },
    "llama": {
        "ffn": (2, 64, ("intermediate_size",)),
        "heads": (2, 2, ("num_attention_heads", "num_key_value_heads")),
        "layers": (1, 2, ("num_hidden_layers",)),
        "width": (1, 32, ("hidden_size",)),
    },
    "qwen3": {
        "ffn": (2, 64, ("intermediate_size",)),
        "heads": (2, 2, ("num_attention_heads", "num_key_value_heads")),
        "layers": (1, 2, ("num_hidden_layers",)),
        "width": (1, 32, ("hidden_size",)),
    },
    "phi3": {
        "ffn": (2, 64, ("intermediate_size",)),
        "heads": (2, 4, ("num_attention_heads", "head_dim", "num_key_value_heads")),
        "layers": (1, 2, ("num_hidden_layers",)),
        "width": (1, 32, ("hidden_size", "head_dim")),
    },
    "gpt2": {
        "ffn": (2, 128, ("n_inner",)),
        "heads": (2, 4, IMPOSSIBLE),
        "layers": (1, 2, ("n_layer",)),
        "width": (1, 32, IMPOSSIBLE),
    },
    "t5": {
        "ffn": (4, 64, ("d_ff",)),
        "heads": (1, 4, ("num_heads",)),
        "layers": (2, 2, ()),
        "width": (1, 32, ("d_model",)),
    },
    "whisper": {"ffn": (4, 64, ()), "heads": (6, 4, IMPOSSIBLE), "layers": (2, 2, ()), "width": (2, 32, IMPOSSIBLE)},
    "vit": {
        "ffn": (2, 64, ("intermediate_size",)),
        "heads": (2, 4, ("num_attention_heads", "head_dim")),
        "layers": (1, 2, ("num_hidden_layers",)),
        "width": (1, 32, ("hidden_size", "head_dim")),
    },
    "resnet": {},
}  # fmt: skip


def opened(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor], ModelMap]:
    torch.manual_seed(0)
    module = build().eval()
    module.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        for values in module.parameters():  # biases and norms that start at 0 and 1 would hide what is left out
            values.add_(0.02 * torch.randn_like(values))
    example = made_up_example(module)
    assert example is not None
    return module, example, map_model(module, example)


def logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = module(**inputs).logits
    assert isinstance(found, Tensor)
    return found


def candidate_of(module: nn.Module) -> Candidate:
    return Candidate(source=Source.open(module, forward=logits), module=module)


def mask(module: nn.Module, dimension: Dimension, kept: list[int]) -> None:
    """Set to zero what reads the units that go."""
    for member in dimension.members:
        if member.parameter in dimension.readers:
            columns = module.get_parameter(member.parameter).detach().movedim(member.axis, 0)
            for unit in set(range(dimension.size)) - set(kept):
                columns[member.offset + unit * member.unit :][: member.unit] = 0


@pytest.mark.parametrize("family", EXPECTED)
def test_dimensions_and_what_the_config_calls_them(family: str) -> None:
    _, _, model = opened(NAMED[family])
    found: dict[str, list[Dimension]] = {}
    for one in model.dimensions:
        if one.kind not in ("channels", "vocabulary"):  # those have test files of their own
            found.setdefault(one.kind, []).append(one)
    assert {kind: (len(ones), ones[0].size) for kind, ones in found.items()} == {
        kind: expected[:2] for kind, expected in EXPECTED[family].items()
    }
    for kind, (_, _, attributes) in EXPECTED[family].items():
        if (family, kind) in (("whisper", "ffn"), ("whisper", "layers"), ("t5", "layers")):  # one number for each half
            assert len({one.attributes for one in found[kind]}) == 2
            assert all(one.attributes for one in found[kind])
        else:
            assert {one.attributes for one in found[kind]} == {attributes}


@pytest.mark.parametrize("kind", ["ffn", "heads", "layers"])
@pytest.mark.parametrize("family", [name for name in EXPECTED if name != "resnet"])
def test_the_cut_model_is_the_masked_one_and_its_class_opens_it(family: str, kind: str, tmp_path: Path) -> None:
    module, example, model = opened(NAMED[family])
    ones = [one for one in model.dimensions if one.kind == kind]
    sizes = {one: one.size // 2 for one in ones}
    kept = {one: [number for number in range(one.size) if number % 2 == 1 - (0 in one.held)] for one in ones}
    kept = {one: units[: sizes[one]] for one, units in kept.items()}
    if kind != "layers":
        for one, units in kept.items():
            mask(module, one, units)
        expected = logits(module, example)
    smaller = reduced(candidate_of(module), kept)
    found = logits(smaller.module, example)
    if kind != "layers":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    predicted = reduced_map(model, sizes)
    names = {name: tuple(value.shape) for name, value in smaller.module.named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in names.values()) == predicted.num_parameters
    for layer in predicted.layers:
        shape = layer.shape[::-1] if layer.transposed else layer.shape
        if f"{layer.name}.weight" in names:
            assert names[f"{layer.name}.weight"] == shape
    if kind == "layers":  # which ones stay is known: the map is that of the smaller model
        told, seen = reduced_map(model, sizes, kept), map_model(smaller.module, example, logits)
        assert {one.name: one.shape for one in told.layers} == {one.name: one.shape for one in seen.layers}
    possible = ones[0].attributes != IMPOSSIBLE
    assert smaller.stock is possible
    refusals = {get_runtime("torch").cut_refusal(Cut(one, sizes[one])) for one in ones}
    assert (refusals == {None}) is possible
    assert all(get_runtime("onnxruntime").cut_refusal(Cut(one, sizes[one])) is None for one in ones)
    if possible:
        smaller.module.save_pretrained(tmp_path)  # type: ignore[operator]
        again = type(smaller.module).from_pretrained(tmp_path, attn_implementation="eager").eval()  # type: ignore[attr-defined]
        torch.testing.assert_close(logits(again, example), found)


def test_blocks_that_stay_close_ranks() -> None:
    module, example, model = opened(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**STRUCTURE["TEXT"], "num_hidden_layers": 4}))
    )
    depth = next(one for one in model.dimensions if one.kind == "layers")
    wanted = module.get_parameter("model.layers.2.mlp.down_proj.weight").detach().clone()
    for number in (0, 3):  # a block that adds nothing is as good as none
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            module.get_parameter(f"model.layers.{number}.{name}.weight").detach().zero_()
    expected = logits(module, example)
    smaller = reduced(candidate_of(module), {depth: [1, 2]})
    assert torch.equal(smaller.module.get_parameter("model.layers.1.mlp.down_proj.weight"), wanted)
    torch.testing.assert_close(logits(smaller.module, example), expected, rtol=1e-4, atol=1e-5)


def test_a_config_that_does_not_take_a_size_says_which_it_takes() -> None:
    text = {**STRUCTURE["TEXT"], "num_attention_heads": 8, "hidden_size": 32}
    _, _, model = opened(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**text)))
    heads = next(one for one in model.dimensions if one.kind == "heads")
    assert heads.sizes == (1, 2, 4)  # 32 is no multiple of the others
    refusal = get_runtime("torch").cut_refusal(Cut(heads, 6))
    assert refusal is not None
    assert "does not take 6 heads" in refusal
    assert "4 it takes" in refusal


def test_codes_are_not_cut() -> None:
    module, _, model = opened(NAMED["llama"])
    candidate = candidate_of(module)
    name = "model.layers.0.mlp.down_proj.weight"
    candidate.set_quantized(name, quantize_weight(candidate.values(name), QuantSpec(bits=8)))
    with pytest.raises(TechniqueError, match="1 parameters were rounded before this step"):
        reduced(candidate, {model.dimensions[0]: [0]})


def test_a_network_without_config_is_cut_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(), Block()])
            self.end = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.end(x)

    torch.manual_seed(0)
    network, example = Network().eval(), {"x": torch.randn(3, 8)}
    model = map_model(network, example, lambda module, inputs: module(inputs["x"]))
    ffn = [one for one in model.dimensions if one.kind == "ffn"]
    depth = next(one for one in model.dimensions if one.kind == "layers")
    assert [one.size for one in ffn] == [24, 24, 24]
    assert depth.attributes is None
    kept = [1, 5, 7]
    for one in ffn:
        mask(network, one, kept)
    expected = network(example["x"])
    source: Any = Source.open(network, forward=lambda module, inputs: module(inputs["x"]))
    smaller = reduced(Candidate(source=source, module=network), dict.fromkeys(ffn, kept))
    assert smaller.module.blocks[0].up.out_features == 3  # type: ignore[index, union-attr]
    torch.testing.assert_close(smaller.module(example["x"]), expected)
    fewer = reduced(smaller, {depth: [0, 2]})
    assert len(fewer.module.blocks) == 2  # type: ignore[arg-type]


def test_the_change_of_a_config_is_the_least_that_gives_the_shapes() -> None:
    module, _, _ = opened(NAMED["llama"])
    assert isinstance(module, hf.PreTrainedModel)
    stock = Stock(module)
    shapes = shapes_of(module)
    wanted = shapes_of(type(module)(changed_config(module.config, Change({("intermediate_size",): 40}))))
    fit = stock.fit(wanted, {64: 40})
    assert fit is not None
    assert fit.change.names() == ("intermediate_size",)
    uneven = {**shapes, "model.layers.0.mlp.up_proj.weight": (40, 32)}
    near = stock.fit(uneven, {64: 40})
    assert near is None or near.differs


@pytest.mark.parametrize("family", EXPERTS["FAMILIES"], ids=lambda family: family.__name__)
def test_channels_of_experts_are_cut_in_each_and_said_by_the_config(family: Callable[[], nn.Module]) -> None:
    module, inputs = family(), {"input_ids": EXPERTS["ids"]()}
    take_apart(module)
    model = map_model(module, inputs)
    ones = [one for one in model.dimensions if one.kind == "ffn"]
    if family.__name__ == "gpt_oss":  # its stacked biases have gates and ups in turns
        assert not ones
        assert any("gate_up_proj_bias" in note and "no ffn are cut" in note for note in model.notes)
        return
    assert len({reader for one in ones for reader in one.readers}) == sum(
        layer.role in ("down", "expert_down") for layer in model.layers
    )
    assert all(one.attributes for one in ones)
    kept = {one: list(range(1, one.size, 2)) for one in ones}
    for one, units in kept.items():
        mask(module, one, units)
    expected = logits(module, inputs)
    smaller = reduced(candidate_of(module), kept)
    assert smaller.stock
    torch.testing.assert_close(logits(smaller.module, inputs), expected, rtol=1e-4, atol=1e-4)
