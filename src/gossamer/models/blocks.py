"""Find stacks of like blocks: the lists in a model whose members do the same thing one after the other.

A list (nn.ModuleList, nn.Sequential) is a stack when its members that own parameters are of one type, are more than a
single layer, and neighbours agree in most of their parameters' names and shapes. The outermost such list wins: what
is repeated inside a block (experts, sub-layers) belongs to the block. Stages of a convolutional network differ in
width, so the search goes on inside them and finds each stage's own blocks. Blocks may differ a little: T5's first
holds the position bias, a ResNet stage's first the shortcut.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from gossamer.models.experts import Expert
from gossamer.models.roles import Stack


def find_stacks(module: nn.Module) -> tuple[tuple[Stack, ...], dict[str, tuple[str, int]]]:
    """Return the stacks of a model, and for each block's name (`model.layers.3`) its stack and index.

    >>> stacks, members = find_stacks(model)  # doctest: +SKIP
    >>> stacks[0].name, members["model.layers.3"]  # doctest: +SKIP
    ('model.layers', ('model.layers', 3))
    """
    found = list(_search(module, ""))
    if not found:
        found = list(_lone_blocks(module))
    stacks: list[Stack] = []
    members: dict[str, tuple[str, int]] = {}
    for name, blocks in found:
        first = next(iter(blocks.values()))
        size = max(_num_parameters(block) for block in blocks.values())
        stacks.append(Stack(name, len(blocks), size, type(first).__name__))
        for index, key in enumerate(blocks):
            members[f"{name}.{key}" if name else key] = (name, index)
    return tuple(stacks), members


def block_of(name: str, members: dict[str, tuple[str, int]]) -> tuple[str, int, str] | None:
    """Return (stack, block index, path within the block) of a module's name, or None outside of any block."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (place := members.get(".".join(parts[:end]))) is not None:
            return place[0], place[1], ".".join(parts[end:])
    return None


def _search(module: nn.Module, name: str) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and (blocks := _like_blocks(module)):
        yield name, blocks
        return
    for key, child in module.named_children():
        yield from _search(child, f"{name}.{key}" if name else key)


def _like_blocks(module: nn.Module) -> dict[str, nn.Module]:
    blocks = _members(module)
    members = list(blocks.values())
    alike = len(members) > 1 and all(_alike(first, second) for first, second in pairwise(members))
    return blocks if alike else {}


def _lone_blocks(module: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Yield the innermost lists with one block: a model that was made with a single layer."""
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(blocks := _members(part)) == 1:
            inner = any(isinstance(deeper, nn.ModuleList) and _members(deeper) for deeper in list(part.modules())[1:])
            if not inner:
                yield name, blocks


def _members(module: nn.Module) -> dict[str, nn.Module]:
    """Return the members that own parameters, or nothing when one of them is a single layer."""
    blocks = {key: child for key, child in module.named_children() if next(child.parameters(), None) is not None}
    whole = all(next(child.children(), None) is not None for child in blocks.values())
    return blocks if whole else {}


def _alike(first: nn.Module, second: nn.Module) -> bool:
    if type(first) is not type(second):
        return False
    a, b = _shapes(first), _shapes(second)
    same = sum(a[name] == b[name] for name in a.keys() & b.keys())
    return 2 * same > max(len(a), len(b))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the parameters by name; of experts that were taken apart the first stands for all."""
    experts = [name for name, part in module.named_modules() if isinstance(part, Expert)]
    others = tuple(f"{name}." for name in experts if name.rpartition(".")[2] != "0")
    return {name: parameter.shape for name, parameter in module.named_parameters() if not name.startswith(others)}


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
