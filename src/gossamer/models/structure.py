"""Map a model: its layers with their roles, its stacks of like blocks, tied weights, parameters, bytes and MACs.

What a layer is (linear, convolution, embedding, norm) is read from its parameters; what it is for (q, k, v, o, gate,
up, down, head, classifier) from where its output goes in one forward pass, see `dataflow`. Names only break ties, and
only where nothing could be run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.models import dataflow, purpose
from gossamer.models.blocks import block_of, find_stacks
from gossamer.models.channels import find_channels
from gossamer.models.dimensions import find_dimensions
from gossamer.models.example import made_up_example
from gossamer.models.experts import find_experts, layouts
from gossamer.models.fused_heads import find_fused_heads
from gossamer.models.roles import Experts, LayerInfo, ModelMap, Role
from gossamer.models.width import find_widths

Kind = Literal["linear", "conv", "embedding", "norm", "other"]


def map_model(
    module: nn.Module,
    example: Mapping[str, Tensor] | None = None,
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None = None,
    held: Callable[[nn.Module], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> ModelMap:
    """Return the map of a model, from its structure and one forward pass on `example` (inputs by argument name).

    Without an example one is made up from the model's config (its shapes stand in the notes); where that is not
    possible, roles come from shapes alone and MACs are 0. MACs count linear layers, convolutions and the products of
    attention, for this one example; parameters and bytes count tied tensors once (the later layer reports 0).
    `held` keeps the values of a part in memory, where the model's are not all there. A layer whose role is not
    understood is "linear" or "other", and the notes name it. Raises ModelError when the model cannot run on the
    example that was given.

    >>> map_model(model, {"input_ids": ids}).layer("model.layers.0.self_attn.q_proj").role  # doctest: +SKIP
    'q'
    """
    leaves = dict(_leaves(module, held))
    stacks, members = find_stacks(module)
    notes: list[str] = []
    if not stacks:
        notes.append("no stack of like blocks was found")
    experts = tuple(found for found in find_experts(module) if block_of(found.name, members))
    layers = _without_roles(leaves, members, experts)
    flow = _follow(module, leaves, example, forward, notes)
    roles = purpose.assign_roles(layers, flow) | _roles_of_experts(module, experts)
    roles |= {name: "positions" for name, leaf in leaves.items() if _takes_more_than_rows(leaf)}
    macs = flow.macs if flow is not None else {}
    layers = [replace(layer, role=roles[layer.name], macs=macs.get(layer.name, 0)) for layer in layers]
    notes.extend(purpose.remarks(layers, flow))
    given = example if example is not None else made_up_example(module)
    fused = find_fused_heads(module, layers, flow, given, forward, held)
    dimensions, unknown = find_dimensions(module, layers, stacks, flow, fused, experts)
    notes.extend(unknown)
    channels, unknown = find_channels(module, layers, flow, given, forward, dimensions)
    notes.extend(unknown)
    if flow is not None and given is not None:
        widths, unclear = find_widths(module, layers, given, forward)
        dimensions += widths
        notes.extend(unclear)
    tensors = _distinct([*module.parameters()])
    return ModelMap(
        layers=tuple(layers),
        stacks=stacks,
        num_parameters=sum(tensor.numel() for tensor in tensors),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        macs=sum(macs.values()) + (flow.other_macs if flow is not None else 0),
        notes=tuple(notes),
        experts=experts,
        dimensions=(*dimensions, *channels),
    )


@dataclass(frozen=True)
class _Leaf:
    """Hold a module that owns parameters, its kind, and whether its weight is stored [in, out]."""

    module: nn.Module
    kind: Kind
    transposed: bool
    parameters: dict[str, nn.Parameter]


def _leaves(
    module: nn.Module, held: Callable[[nn.Module], AbstractContextManager[None]]
) -> Iterator[tuple[str, _Leaf]]:
    for name, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False, remove_duplicate=False))
        if own:
            known = type(part) in (nn.Linear, nn.Embedding)
            with nullcontext() if known else held(part):
                kind, transposed = layer_kind(part)
            yield name, _Leaf(part, kind, transposed, own)


def layer_kind(module: nn.Module) -> tuple[Kind, bool]:
    """Return what a module with parameters of its own is, and whether its weight is stored turned, as [in, out].

    A linear layer of any class is known by what it computes: x W^T + b, or x W + b, on one probing row.
    """
    weight = module._parameters.get("weight")
    alone = next(module.children(), None) is None
    if weight is None or not alone:
        return "other", False
    if isinstance(module, nn.Embedding):
        return "embedding", False
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv", False
    if weight.dim() == 2 and (turned := _turned(module, weight)) is not None:
        return "linear", turned
    one_row = all(p.dim() == 1 and p.shape == weight.shape for p in module.parameters(recurse=False))
    if one_row and weight.dim() == 1 and not isinstance(module, nn.PReLU):
        return "norm", False
    return "other", False


def _takes_more_than_rows(leaf: _Leaf) -> bool:
    """Say whether a table is called with more than row numbers (learned positions of Whisper, BART, OPT)."""
    return leaf.kind == "embedding" and len(inspect.signature(type(leaf.module).forward).parameters) > 2


def _turned(module: nn.Module, weight: Tensor) -> bool | None:
    """Return whether a layer computes x W + b (True) or x W^T + b (False), or None when it computes neither."""
    if type(module) is nn.Linear:
        return False
    bias = module._parameters.get("bias")
    if bias is not None and bias.dim() != 1:
        return None
    for turned, matrix in ((False, weight), (True, weight.t())):
        if bias is not None and bias.shape[0] != matrix.shape[0]:
            continue
        row = torch.linspace(-1.0, 1.0, matrix.shape[1], dtype=weight.dtype, device=weight.device).unsqueeze(0)
        try:
            with dataflow.evaluating(module):
                result = module(row)
                expected = nn.functional.linear(row, matrix, bias)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue  # it does not take rows of this width: not a linear layer this way round
        same_shape = isinstance(result, Tensor) and result.shape == expected.shape
        if same_shape and (weight.is_meta or torch.allclose(result, expected, rtol=1e-3, atol=1e-4)):
            return turned
    return None


def _roles_of_experts(module: nn.Module, experts: Iterable[Experts]) -> dict[str, Role]:
    """Return the roles that the layout of stacked experts tells, and those of routers."""
    roles: dict[str, Role] = {router: "router" for found in experts for router in found.routers}
    for name, layout in layouts(module):
        for weights in layout.names(name):
            for weight, role in zip(weights, layout.roles, strict=True):
                roles[weight.removesuffix(".weight")] = role
    return roles


def _without_roles(
    leaves: Mapping[str, _Leaf], members: dict[str, tuple[str, int]], experts: Iterable[Experts]
) -> list[LayerInfo]:
    """Return the layers with everything but role and MACs; tied tensors count where they stand first."""
    owners: dict[tuple[Any, ...], str] = {}
    layers: list[LayerInfo] = []
    holders = [found.name for found in experts]
    for name, leaf in leaves.items():
        count, tied_to = 0, None
        for key, parameter in leaf.parameters.items():
            full = f"{name}.{key}" if name else key
            owner = owners.setdefault(_identity(parameter), full)
            if owner == full:
                count += parameter.numel()
            elif key == "weight" or tied_to is None:
                tied_to = owner
        weight = leaf.parameters.get("weight", max(leaf.parameters.values(), key=Tensor.numel))
        shape = tuple(weight.shape[::-1]) if leaf.transposed else tuple(weight.shape)
        place = block_of(name, members)
        stack, block, path = place if place is not None else (None, None, name)
        role: Role = "linear" if leaf.kind == "linear" else "other"
        holder = next((holder for holder in holders if name.startswith(f"{holder}.")), None)
        layers.append(
            LayerInfo(
                name,
                leaf.kind,
                role,
                shape,
                count,
                leaf.transposed,
                stack,
                block,
                tied_to,
                experts=holder,
                path=path,
                groups=int(getattr(leaf.module, "groups", 1)),
            )
        )
    return layers


def _follow(
    module: nn.Module,
    leaves: Mapping[str, _Leaf],
    example: Mapping[str, Tensor] | None,
    forward: Callable[[nn.Module, dict[str, Tensor]], Any] | None,
    notes: list[str],
) -> dataflow.Flow | None:
    watched = {name: leaf.module for name, leaf in leaves.items() if leaf.kind in ("linear", "conv", "embedding")}
    if example is not None:
        try:
            return dataflow.follow(module, watched, example, forward)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in example.items())
            raise ModelError(
                f"the model does not run on the example ({shapes}): {error}",
                "give inputs by the names of the model's arguments, or a forward function",
            ) from error
    example = made_up_example(module)
    if example is None:
        notes.append("no example was given and none could be made up: roles come from shapes and names, MACs are 0")
        return None
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in example.items())
    try:
        flow = dataflow.follow(module, watched, example)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        notes.append(f"the model does not run on made-up inputs ({shapes}: {error}): roles come from shapes and names")
        return None
    notes.append(f"MACs are of a made-up request: {shapes}")
    return flow


def _identity(parameter: Tensor) -> tuple[Any, ...]:
    """Return what two parameters share when they are one: the same memory read in the same way."""
    if parameter.is_meta or parameter.numel() == 0:
        return (id(parameter),)
    storage = parameter.untyped_storage()
    return storage.data_ptr(), parameter.storage_offset(), parameter.shape, parameter.stride()


def _distinct(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({_identity(parameter): parameter for parameter in parameters}.values())
