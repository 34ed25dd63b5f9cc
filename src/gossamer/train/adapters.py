"""Thin trainable layers beside frozen ones, by `peft`: put in while a `with` lasts, then read and taken out again.

    lora     y = W x + (alpha / R) U D x           Hu et al., "LoRA", 2021
    rslora   y = W x + (alpha / sqrt R) U D x      Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023
    dora     y = m (W + (alpha / R) U D) / |W + (alpha / R) U D| x, m and the norm by output: Liu et al., "DoRA", 2024

    adalora  y = (W + (alpha / R) U diag(e) D) x   Zhang et al., "AdaLoRA", 2023, ranks move between layers (`ranks.py`)
    ia3      y = l * (W x + b), or W (l * x)       Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning", 2022: lengths
                                                   of keys, values, and of what a feed-forward layer has inside

The first two are thin layers that can stay beside a weight. dora's length is of the sum of both, adalora's ranks are
known at the end only, and ia3's lengths are a weight's own: of these only what the weight becomes can be kept. Left
out: prefixes and prompts, which are tokens that no weight can take in.

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gossamer.train import ranks

Kind = Literal["lora", "rslora", "dora", "adalora", "ia3"]
Layer = LoraLayer | IA3Layer
NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """Hold what an adapter became: its thin layers, and what the weight becomes with them (in the weight's shape).

    `thin` is (U [O, R], D [R, I]), None of lengths; `merged_bias` is None where a bias stays as it is.
    """

    thin: tuple[Tensor, Tensor] | None
    merged: Tensor
    merged_bias: Tensor | None = None


@contextmanager
def adapters(
    module: nn.Module,
    names: Sequence[str],
    *,
    rank: int,
    alpha: int,
    kind: Kind = "lora",
    of_inputs: Sequence[str] = (),
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> Iterator[Mapping[str, Layer]]:
    """Put trainable thin layers beside the named layers of a module while the `with` lasts; yield them by name.

    They change nothing at first, or begin as `start` says, (U [O, R], D [R, I]) by name. All other parameters are
    frozen meanwhile. `of_inputs`: the names whose inputs ia3 gives lengths, instead of their outputs.
    """
    flags = {id(parameter): parameter.requires_grad for parameter in module.parameters()}
    settings = _settings(list(names), rank, alpha, kind, list(of_inputs))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, module)
    found: dict[str, Layer] = {
        name: part for name in names if isinstance(part := module.get_submodule(name), (LoraLayer, IA3Layer))
    }
    assert len(found) == len(names), "peft left out layers that it was asked for"
    for name, (up_OR, down_RI) in (start or {}).items():
        begun = found[name]
        assert isinstance(begun, LoraLayer)
        up, down = _thin(begun)
        with torch.no_grad():
            up.copy_(up_OR / begun.scaling[NAME])
            down.copy_(down_RI)
    try:
        yield found
    finally:
        for name, layer in found.items():
            parent, _, local = name.rpartition(".")
            module.get_submodule(parent).register_module(local, layer.get_base_layer())
        del module.peft_config
        for parameter in module.parameters():
            parameter.requires_grad_(flags[id(parameter)])


def _settings(names: list[str], rank: int, alpha: int, kind: Kind, of_inputs: list[str]) -> PeftConfig:
    if kind == "adalora":
        return ranks.settings(rank, alpha, names)
    if kind == "ia3":
        return IA3Config(target_modules=names, feedforward_modules=of_inputs)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=names,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        bias="none",
    )


def read_adapter(layer: Layer) -> Adapter:
    """Return what an adapter is by now; the layer stays as it is."""
    base = layer.get_base_layer()
    held = {name: part for name in ("weight", "bias") if (part := getattr(base, name, None)) is not None}
    before = {name: part.detach().clone() for name, part in held.items()}
    layer.merge(safe_merge=True)
    merged = {name: part.detach().clone() for name, part in held.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # taking it apart again leaves rounding behind: the values are put back
        layer.unmerge()
    with torch.no_grad():
        for name, part in held.items():
            part.copy_(before[name])
    moved = "bias" in held and not torch.equal(merged["bias"], before["bias"])
    thin = None
    if isinstance(layer, LoraLayer) and not isinstance(layer, AdaLoraLayer):
        up_OR, down_RI = (weight.detach() for weight in _thin(layer))
        thin = (up_OR * layer.scaling[NAME], down_RI.clone())
    return Adapter(thin, merged["weight"], merged["bias"] if moved else None)


def _thin(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weights of a layer's thin ones: U [O, R], not scaled, and D [R, I]."""
    assert isinstance(layer, nn.Module)
    return layer.get_parameter(f"lora_B.{NAME}.weight"), layer.get_parameter(f"lora_A.{NAME}.weight")
