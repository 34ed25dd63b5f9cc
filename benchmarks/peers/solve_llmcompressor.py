"""llm-compressor's own solvers on single layers: GPTQ, the search of AWQ, SparseGPT and Wanda.

Its functions are called as its modifiers call them. GPTQ is handed the grid, which an observer finds otherwise.
AWQ looks for factors with readers side by side, all of their outputs counted, and rounds by its own min-max observer;
`scale_dtype` makes these scales the float16 numbers that ours are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    disable_quantization,
    fake_quantize,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight as sparsegpt_weight
from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight as wanda_weight
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from llmcompressor.pipelines.cache import IntermediatesCache
from places import BLOCK, DAMPING, EXPONENTS, GRIDS, Place, Solve, run
from torch import Tensor, nn

SPARSITY = 0.5


class SideBySide(nn.Module):
    """Return the outputs of all layers of a place, next to each other."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, values: Tensor) -> Tensor:
        """Compute all layers."""
        return torch.cat([layer(values) for layer in self.layers], dim=-1)


def linear(weight: Tensor) -> nn.Linear:
    """Return a layer with this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def args_of(grid: str, **more: Any) -> QuantizationArgs:
    """Return a grid in the tool's own words."""
    settings = GRIDS[grid]
    size = settings["group_size"]
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return QuantizationArgs(num_bits=settings["bits"], symmetric=settings["symmetric"], **strategy, **more)


def gptq(place: Place, grid: str, order: str | None) -> dict[str, Tensor]:
    """Solve each layer by GPTQ on the given grid."""
    found = {}
    for name, weight in place.weights.items():
        scale, zero = place.grids[grid][name]
        made, _, _ = quantize_weight(
            weights=weight[None].clone(),
            hessians=place.second_II[None].clone(),
            scale=scale[None],
            zero_point=zero[None].to(torch.int8),
            global_scale=None,
            quant_args=args_of(grid, actorder=order),
            blocksize=BLOCK,
            percdamp=DAMPING,
        )
        found[name] = made[0]
    return found


def awq(place: Place, grid: str, duo_scaling: bool) -> dict[str, Tensor]:
    """Round each layer to the nearest behind the factors found for the place."""
    layers = {name: linear(weight) for name, weight in place.weights.items()}
    args = args_of(grid, scale_dtype=torch.float16)
    for layer in layers.values():
        layer.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=args)
        initialize_module_for_quantization(layer)
        disable_quantization(layer)  # as while calibrating: a layer computes with the weight that it holds
    parent = SideBySide(list(layers.values()))
    producer = nn.LayerNorm(len(place.mean_abs_I))
    mapping = ResolvedMapping("producer", producer, list(layers.values()), list(layers), parent, "place")
    modifier = AWQModifier(mappings=[], duo_scaling=duo_scaling, n_grid=EXPONENTS)
    modifier._parent_args_cache[parent] = IntermediatesCache(None, None)
    modifier._parent_args_cache[parent].append({"values": place.inputs()[None]})
    modifier._smooth_activation_stats["producer"] = [place.mean_abs_I, torch.tensor(1)]
    originals = {layer: layer.weight.clone() for layer in layers.values()}
    factors = modifier._compute_best_scale(mapping, modifier._run_samples(parent), originals)
    return {name: rounded(weight * factors, args) / factors for name, weight in place.weights.items()}


def rounded(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Round a weight to the nearest on its min-max grid."""
    groups = weight.unflatten(1, (-1, args.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return fake_quantize(weight, scale, zero, args)


def sparsegpt(place: Place, keep: int, of: int) -> dict[str, Tensor]:
    """Take weights out by SparseGPT: half of them, or all but `keep` of every `of`."""
    found = {}
    for name, weight in place.weights.items():
        layer = linear(weight)
        hessians = {layer: place.second_II.clone()}
        _, found[name] = sparsegpt_weight(layer, hessians, SPARSITY, of - keep, of, BLOCK, DAMPING, False)
    return found


def wanda(place: Place, keep: int, of: int) -> dict[str, Tensor]:
    """Take weights out by Wanda."""
    found = {}
    for name, weight in place.weights.items():
        layer = linear(weight)
        squares = {layer: place.second_II.diagonal().clone()}
        found[name] = wanda_weight(layer, squares, SPARSITY, of - keep, of)
    return found


SOLVERS: Mapping[str, Solve] = {
    "gptq int4-g64 static": partial(gptq, grid="int4-g64", order="static"),
    "gptq int4-channel static": partial(gptq, grid="int4-channel", order="static"),
    "gptq int4-channel none": partial(gptq, grid="int4-channel", order=None),
    "awq int4-g64": partial(awq, grid="int4-g64", duo_scaling=False),
    "awq int4-g64 duo": partial(awq, grid="int4-g64", duo_scaling=True),
    "sparsegpt 50%": partial(sparsegpt, keep=0, of=0),
    "sparsegpt 2:4": partial(sparsegpt, keep=2, of=4),
    "wanda 50%": partial(wanda, keep=0, of=0),
    "wanda 2:4": partial(wanda, keep=2, of=4),
}

if __name__ == "__main__":
    sys.exit(run(SOLVERS, ("llmcompressor", "compressed-tensors")))
