"""What a Hugging Face folder's weight files will hold, and what makes it: one parameter or layer at a time.

Three kinds: a float tensor, the tensors of a layer with codes (its layout is told in torch_lowering.py), and experts
that are not quantized, stacked as their architecture has them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.errors import RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.experts import Layout, layouts
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.shards import Entry
from gossamer.runtimes import torch_lowering as lowering
from gossamer.runtimes.torch_adapters import adapter_names
from gossamer.runtimes.torch_caches import cache_entries, cache_tensors
from gossamer.runtimes.torch_floats import float_refusal, refusal_beside

FLOAT_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Layer = tuple[QuantSpec, ActivationSpec | None, lowering.Layout, str]  # the last: whose codes (parameter name)


def quantized_layers(candidate: Candidate) -> dict[str, Layer]:
    """Return every quantized module by name, the second module of a tied table too."""
    sharers: dict[int, list[str]] = {}
    for name, parameter in candidate.module.named_parameters(remove_duplicate=False):
        sharers.setdefault(id(parameter), []).append(name)
    layers: dict[str, Layer] = {}
    of_experts = {n for holder, held in layouts(candidate.module) for names in held.names(holder) for n in names}
    for names in sharers.values():  # in the module's order: that in which codes were made must not reach the file
        parameter_name = next((name for name in names if name in candidate.quantized), None)
        if parameter_name is None:
            continue
        outline = candidate.outline(parameter_name)
        for name in names:
            owner, _, local = name.rpartition(".")
            module = candidate.module.get_submodule(owner)
            if local != "weight" or not isinstance(module, nn.Linear | nn.Embedding) or outline.transposed:
                raise RuntimeUnavailable(
                    f"{name} belongs to a {type(module).__name__}: compressed-tensors holds linear and embedding "
                    "weights only",
                    f"name {owner} under `ignore`, or choose another runtime",
                )
            activation = candidate.activations.get(owner)
            is_table = isinstance(module, nn.Embedding) or len(names) > 1
            is_expert = parameter_name in of_experts
            reason = float_refusal("embedding" if is_table else "linear", outline.spec, activation)
            reason = reason or refusal_beside(outline.spec, FLOAT_NAMES[candidate.dtype])
            if reason is not None:
                raise RuntimeUnavailable(f"{name}: {reason}", f"name {owner} under `ignore`, or use integers there")
            layout = lowering.layout_of(outline.spec, activation, is_table, is_expert)
            layers[owner] = (outline.spec, activation, layout, parameter_name)
    for name in candidate.activations:
        if name not in layers:
            raise RuntimeUnavailable(
                f"the inputs of {name} are rounded but its weight is not quantized: compressed-tensors needs both",
                f"quantize the weight of {name} too",
            )
    return layers


@dataclass(frozen=True)
class Part:
    """Hold what the file will say of one parameter or layer, and what makes its tensors: one part at a time."""

    entries: list[Entry]
    tensors: Callable[[], dict[str, Tensor]]


def file_parts(candidate: Candidate, layers: Mapping[str, Layer]) -> list[Part]:
    """Return the parts of the file; a parameter that two modules share appears under its first name."""
    parts = []
    replaced = {f"{owner}.weight" for owner in layers}
    replaced |= adapter_names(candidate.module)  # which have a file of their own
    for holder, layout in layouts(candidate.module):
        names = [name for expert in layout.names(holder) for name in expert]
        if _stays_stacked(layout, holder, [name for name in names if name not in replaced], bool(layers)):
            parts.append(_stacked_part(candidate, holder, layout))
            replaced.update(names)
    for name, tensor in _unique_tensors(candidate.module):
        if name not in replaced:
            parts.append(_float_part(candidate, name, tensor))
    sharing: dict[str, list[str]] = {}
    for owner, (_, _, _, parameter_name) in layers.items():
        sharing.setdefault(parameter_name, []).append(owner)
    for parameter_name, owners in sharing.items():
        entries = [entry for owner in owners for entry in _layer_entries(candidate, owner, layers[owner])]
        made = partial(_layer_tensors, candidate, {owner: layers[owner] for owner in owners}, parameter_name)
        parts.append(Part(entries, made))
    for name, cache in candidate.caches.items():
        entries = cache_entries(name, cache, candidate.dtype)
        parts.append(Part(entries, partial(cache_tensors, name, cache, candidate.dtype)))
    return parts


def tensors_of(parts: Iterable[Part], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of some names; of parts that have others too, those are made and left out."""
    for part in parts:
        if any(entry.name in names for entry in part.entries):
            yield from ((name, tensor) for name, tensor in part.tensors().items() if name in names)


def _stays_stacked(layout: Layout, holder: str, left: Sequence[str], quantized: bool) -> bool:
    """Say whether experts are stored stacked, of which `left` have no codes, in a folder that holds codes or not."""
    count = layout.num_experts * len(layout.layers)
    if len(left) == count:
        return quantized or not layout.alone
    if left or not layout.alone:
        raise RuntimeUnavailable(
            f"{holder}.{layout.parameter} holds {count} layers of which {len(left)} are not quantized, and "
            f"transformers opens {'all of them with one grid, or none' if layout.alone else 'them only as floats'}",
            "name `expert` under `ignore`",
        )
    return False


def _float_part(candidate: Candidate, name: str, tensor: Tensor) -> Part:
    dtype = tensor.dtype
    if tensor.is_floating_point():
        stored = candidate.source.stored_dtype(name)
        narrow = candidate.dtype == torch.float32 and stored in (torch.float16, torch.bfloat16)
        # what was 16 bits wide and is as it was stays so, bit for bit; loaded as float32 it is the same number
        untouched = narrow and (tensor.is_meta or torch.equal(tensor.to(stored).float(), tensor.float()))
        dtype = stored if untouched and stored is not None else candidate.dtype

    def made() -> dict[str, Tensor]:
        values = candidate.values(name) if tensor.is_meta else tensor
        return {name: values.to(dtype).contiguous()}

    return Part([Entry(name, dtype, tuple(tensor.shape))], made)


def _stacked_part(candidate: Candidate, holder: str, layout: Layout) -> Part:
    """Return the part that holds experts which are not quantized, as the architecture stacks them."""
    name = f"{holder}.{layout.parameter}"
    dtypes = set()
    for expert in layout.names(holder):
        for piece in expert:
            weight = candidate.module.get_parameter(piece)
            dtypes.add(_float_part(candidate, piece, weight.detach()).entries[0].dtype)
    dtype = dtypes.pop() if len(dtypes) == 1 else candidate.dtype

    def made() -> dict[str, Tensor]:
        return {name: layout.assembled(holder, lambda piece: candidate.values(piece).to(dtype)).contiguous()}

    return Part([Entry(name, dtype, layout.shape)], made)


def _layer_entries(candidate: Candidate, owner: str, layer: Layer) -> list[Entry]:
    spec, activation, layout, parameter_name = layer
    outline = candidate.outline(parameter_name)
    scales = lowering.scale_dtype(outline.scale_dtype, candidate.dtype, layout)
    entries = lowering.layer_entries(f"{owner}.", outline.shape, spec, layout, scales)
    if parameter_name != f"{owner}.weight":
        entries = [entry for entry in entries if entry.name != f"{owner}.weight"]
    if activation is not None:
        inputs = lowering.input_tensors(activation, candidate.dtype)
        entries += [Entry(f"{owner}.{key}", tensor.dtype, tuple(tensor.shape)) for key, tensor in inputs.items()]
    return entries


def _layer_tensors(candidate: Candidate, owners: Mapping[str, Layer], parameter_name: str) -> dict[str, Tensor]:
    """Return the tensors of every module that holds one quantized parameter."""
    codes = candidate.quantized[parameter_name]
    tensors: dict[str, Tensor] = {}
    for owner, (_, activation, layout, _) in owners.items():
        local = lowering.layer_tensors(codes, layout, candidate.dtype)
        if parameter_name != f"{owner}.weight":
            del local["weight"]  # the shared table is stored under its first name
        if activation is not None:
            local.update(lowering.input_tensors(activation, candidate.dtype))
        tensors.update({f"{owner}.{key}": value for key, value in local.items()})
    return tensors


def _unique_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers as state_dict() names them, shared ones once."""
    seen: set[int] = set()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in module.state_dict().items():
        key = id(parameters.get(name, tensor))
        if key not in seen:
            seen.add(key)
            yield name, tensor.detach()


def not_quantized(candidate: Candidate, layers: Mapping[str, Layer]) -> list[str]:
    """Return the modules that compressed-tensors could hold and that stay in floating point."""
    held = tuple(f"{holder}." for holder, _ in layouts(candidate.module))  # no modules of their own when it is opened
    names = [name for name, module in candidate.module.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    thin = {name.removesuffix(".weight") for name in adapter_names(candidate.module)}
    return [name for name in names if name not in layers and name not in thin and not name.startswith(held)]
