"""Thin trainable layers beside frozen ones, by `peft`: put in while a `with` lasts, then read and taken out again.

    lora     y = W x + (alpha / R) U D x           Hu et al., "LoRA", 2021
    rslora   y = W x + (alpha / sqrt R) U D x      Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023
    dora     y = m (W + (alpha / R) U D) / |W + (alpha / R) U D| x, m and the norm by output: Liu et al., "DoRA", 2024

The first two are thin layers that can stay beside a weight; dora's length is of the sum of both, so that only the sum
can be kept. Left out: AdaLoRA, IA3, prompts (a recipe says ranks by layer with one step for each).

Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

Kind = Literal["lora", "rslora", "dora"]
NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """Hold what an adapter became: its thin layers, and what the weight becomes with them (in the weight's shape)."""

    up_OR: Tensor
    down_RI: Tensor
    merged: Tensor


@contextmanager
def adapters(
    module: nn.Module,
    names: Sequence[str],
    *,
    rank: int,
    alpha: int,
    kind: Kind = "lora",
    start: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> Iterator[Mapping[str, LoraLayer]]:
    """Put trainable thin layers beside the named layers of a module while the `with` lasts; yield them by name.

    They change nothing at first, or begin as `start` says, (U [O, R], D [R, I]) by name. All other parameters are
    frozen meanwhile.
    """
    flags = {id(parameter): parameter.requires_grad for parameter in module.parameters()}
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(names),
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, module)
    found = {name: layer for name in names if isinstance(layer := module.get_submodule(name), LoraLayer)}
    assert len(found) == len(names), "peft left out layers that it was asked for"
    for name, (up_OR, down_RI) in (start or {}).items():
        up, down = _thin(found[name])
        with torch.no_grad():
            up.copy_(up_OR / found[name].scaling[NAME])
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


def read_adapter(layer: LoraLayer) -> Adapter:
    """Return what an adapter is by now; the layer stays as it is."""
    base = layer.get_base_layer().get_parameter("weight")
    before = base.detach().clone()
    layer.merge(safe_merge=True)
    merged = base.detach().clone()
    layer.unmerge()
    with torch.no_grad():
        base.copy_(before)  # taking the sum apart again would leave rounding behind
    up_OR, down_RI = (weight.detach() for weight in _thin(layer))
    return Adapter(up_OR * layer.scaling[NAME], down_RI.clone(), merged)


def _thin(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weights of a layer's thin ones: U [O, R], not scaled, and D [R, I]."""
    assert isinstance(layer, nn.Module)
    return layer.get_parameter(f"lora_B.{NAME}.weight"), layer.get_parameter(f"lora_A.{NAME}.weight")
