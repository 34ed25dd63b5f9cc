"""Turn a float ONNX graph and the codes that were decided into the graph that is served. Nothing is rounded here.

Every parameter by itself is `onnx_parameters.py`'s.

Tensors that stay floating point are stored as `candidate.dtype`, with a Cast to float32 in front that is folded when
the file is opened: the CPU kernels are float32 only, so a cast halves the file and leaves the arithmetic as it is.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gossamer.errors import ArtifactError
from gossamer.models.candidate import Candidate
from gossamer.runtimes.onnx_convolution import lower_convolution
from gossamer.runtimes.onnx_experts import DOMAIN as EXPERTS_DOMAIN
from gossamer.runtimes.onnx_experts import lower_experts
from gossamer.runtimes.onnx_fuse import fuse_attention, keep_layer_norms_apart
from gossamer.runtimes.onnx_graph import tensors_of
from gossamer.runtimes.onnx_parameters import Parameters
from gossamer.runtimes.onnx_rewrite import CONTRIB, Rewriter, tidy
from gossamer.runtimes.onnx_storage import INT8_DOT_PRODUCTS, LEDGER, NEEDS

if TYPE_CHECKING:
    import onnx_ir as ir


def lower(model: ir.Model, candidate: Candidate) -> None:
    """Rewrite `model` (from `base_graph`) in place so that it holds the candidate's codes and none of their floats.

    Raises ArtifactError naming a parameter that the graph does not use, or that cannot be held as asked.
    """
    ledger: dict[str, Any] = {}
    graph = model.graph
    owners = _owners(candidate.module)
    rounded = {owner for name in candidate.quantized for owner in owners.get(name, ())}
    if unmatched := sorted(set(candidate.activations) - rounded):
        raise ArtifactError(
            f"the input of {unmatched[0]} should be rounded, but its weight is not quantized",
            "quantize the weight of every layer whose input is rounded",
        )
    fuse_attention(model)
    keep_layer_norms_apart(graph)
    lowering = Parameters(Rewriter(graph))
    of_experts, float_stacks = lower_experts(lowering.rewriter, candidate)
    ledger |= of_experts
    for name in sorted(name for name in candidate.quantized if name not in of_experts):
        specs = [candidate.activations[owner] for owner in owners.get(name, ()) if owner in candidate.activations]
        ledger[name] = lowering.parameter(name, candidate.quantized[name], specs[0] if specs else None)
    places = {node: place for place, node in enumerate(graph)}
    # from the last to the first: a convolution joins with the rounding of its output only when no float Conv reads it
    for convolution in sorted(lowering.convolutions, key=lambda c: places[c.node], reverse=True):
        lower_convolution(lowering.rewriter, convolution)
    for name in lowering.stored:
        lowering.rewriter.drop(name)
    for name, tensor in tensors_of(candidate.module).items():
        if name in graph.initializers and tensor.is_floating_point():
            if candidate.dtype != torch.float32:
                lowering.cast(name, candidate.dtype)
            ledger[name] = {"shape": list(tensor.shape)}
    for name in float_stacks:
        shape = graph.initializers[name].shape
        assert shape is not None
        ledger[name] = {"shape": list(shape.numpy())}
        if candidate.dtype != torch.float32:
            lowering.cast(name, candidate.dtype)
    lowering.rewriter.finish()
    tidy(model)
    model.opset_imports.pop(EXPERTS_DOMAIN, None)
    model.opset_imports[CONTRIB] = 1
    model.opset_imports[""] = max(model.opset_imports[""], 21)
    ledger = {name: entry for name, entry in ledger.items() if "bits" in entry or name in graph.initializers}
    model.metadata_props[LEDGER] = json.dumps(ledger, sort_keys=True)
    if lowering.needs_dot_products:
        model.metadata_props[NEEDS] = INT8_DOT_PRODUCTS


def _owners(module: nn.Module) -> dict[str, list[str]]:
    """Return the modules that hold each parameter, by the parameter's first name: a tied one has several."""
    first = {id(tensor): name for name, tensor in reversed(list(module.named_parameters()))}
    owners: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        for tensor in part.parameters(recurse=False):
            owners.setdefault(first[id(tensor)], []).append(name)
    return owners
