"""Channels of convolutions: found in every structure, cut to what the masked network computes, or refused by name."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gossamer.models import coupling
from gossamer.models.candidate import Candidate
from gossamer.models.channel_trials import mask
from gossamer.models.reduced_map import reduced_map
from gossamer.models.reduction import reduced
from gossamer.models.roles import Cut, Dimension, ModelMap
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.runtimes import get_runtime

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_convolutions.py"))
NETWORKS, built, forward, pictures = TINY["NETWORKS"], TINY["built"], TINY["forward"], TINY["pictures"]


def channels(model: ModelMap) -> dict[str, Dimension]:
    return {one.name: one for one in model.dimensions if one.kind == "channels"}


def thinned(dimensions: list[Dimension]) -> dict[Dimension, list[int]]:
    """Return units that stay: about half, in no regular order."""
    draw = torch.Generator().manual_seed(2)
    return {
        one: sorted(torch.randperm(one.size, generator=draw)[: max(1, one.size // 2)].tolist()) for one in dimensions
    }


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in module.named_parameters()}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_a_cut_network_computes_what_the_masked_one_does(network: Callable[[], nn.Module]) -> None:
    module = built(network)
    model = map_model(module, pictures(), forward)
    found = channels(model)
    assert {name: one.size for name, one in found.items()} == NETWORKS[network]
    assert all(one.attributes is None for one in found.values())
    for chosen in ([*found.values()], *([one] for one in found.values())):
        kept = thinned(chosen)
        masked = built(network)
        mask(masked, kept)
        source = Source.open(module, forward=forward)
        smaller = reduced(Candidate(source=source, module=built(network)), kept)
        with torch.no_grad():
            torch.testing.assert_close(forward(smaller.module, pictures()), forward(masked, pictures()))
        assert not smaller.stock
        predicted = reduced_map(model, {one: len(units) for one, units in kept.items()})
        again = map_model(smaller.module, pictures(), forward)
        for before, after in zip(predicted.layers, again.layers, strict=True):
            assert before == (after if after.kind != "other" else replace(after, shape=before.shape))
        assert (predicted.num_parameters, predicted.macs) == (again.num_parameters, again.macs)
        left = {one.name: one for one in predicted.dimensions if one.kind == "channels" and one.size > 1}
        assert left == channels(again)


def test_what_cannot_be_cut_is_named_with_the_reason() -> None:
    notes = "\n".join(map_model(built(TINY["Mixed"]), pictures(), forward).notes)
    assert "channels of one are not cut: norm (GroupNorm) computes with several channels at once" in notes
    assert "channels of three.0 are not cut: lift is a transposed convolution" in notes
    assert "channels of two.0 are not cut: the smaller network does not compute what the masked one does" in notes
    model = map_model(built(TINY["Shuffled"]), pictures(), forward)
    assert list(channels(model)) == ["two.0"]
    assert any("channels of one.0 are not cut" in note for note in model.notes)


def test_layers_that_share_a_weight_are_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.four, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.four(torch.relu(self.three(torch.relu(self.two(self.one(x))))))
            return self.head(torch.relu(x).mean((2, 3)))

    model = map_model(Shared().eval(), pictures(), forward)
    assert list(channels(model)) == ["four"]
    assert any("shares a parameter with another layer" in note and "two" in note for note in model.notes)


def test_a_network_with_attention_is_left_to_its_width() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 4}
    model = map_model(hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=1, **sizes)).eval())
    assert not channels(model)
    assert any("hidden width of a network with attention" in note for note in model.notes)


def test_a_graph_that_is_too_large_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "MAX_CALLS", 1000)
    model = map_model(built(TINY["Plain"]), pictures(), forward)
    assert not channels(model)
    assert any("too large to be walked" in note and "one.0, two" in note for note in model.notes)


def test_without_the_package_a_note_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = map_model(built(TINY["Plain"]), pictures(), forward)
    assert not channels(model)
    assert any('pip install "gossamer[torch-pruning]"' in note for note in model.notes)


def resnet(**more: Any) -> hf.ResNetForImageClassification:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 2], "num_channels": 3, "num_labels": 5}
    module = hf.ResNetForImageClassification(hf.ResNetConfig(**{**sizes, **more})).eval()
    with torch.no_grad():
        for values in module.buffers():
            if values.dim():
                values.copy_(torch.rand(values.shape) + 0.5)
    return module


def logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = module(**inputs).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_is_cut_to_what_its_config_says(layer_type: str, tmp_path: Path) -> None:
    module, inputs = resnet(layer_type=layer_type), pictures()
    found = list(channels(map_model(module, inputs)).values())
    said = {one.attributes for one in found}
    assert said == {("embedding_size",), ("hidden_sizes.0",), ("hidden_sizes.1",)}
    kept = {one: list(range(1, one.size, 2)) for one in found}
    mask(module, kept)
    expected = logits(module, inputs)
    source = Source.open(module, forward=logits)
    smaller = reduced(Candidate(source=source, module=module), kept)
    assert smaller.stock
    assert smaller.module.config.hidden_sizes == [8, 12]  # type: ignore[union-attr]
    smaller.module.save_pretrained(tmp_path)  # type: ignore[operator]
    again = hf.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_resnet_that_is_cut_unevenly_is_for_runtimes_that_hold_a_graph() -> None:
    module, inputs = resnet(layer_type="basic"), pictures()
    found = channels(map_model(module, inputs))
    inner = next(one for one in found.values() if one.block == 0 and "layers.0.layer.0" in one.name)
    kept = {inner: list(range(0, inner.size, 2))}
    refusal = get_runtime("torch").cut_refusal(Cut(inner, inner.size // 2, alike=False))
    assert refusal is not None
    assert "one number (hidden_sizes.0)" in refusal
    assert get_runtime("onnxruntime").cut_refusal(Cut(inner, inner.size // 2, alike=False)) is None
    mask(module, kept)
    expected = logits(module, inputs)
    smaller = reduced(Candidate(source=Source.open(module, forward=logits), module=module), kept)
    assert not smaller.stock
    torch.testing.assert_close(logits(smaller.module, inputs), expected, rtol=1e-4, atol=1e-5)
