"""What of the original a training follows: which of its blocks, and which layers of its attention.

A student that an earlier step made smaller has fewer blocks, heads or channels; what it follows is found here, or an
error says with both numbers why nothing fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from gossamer.errors import TechniqueError
from gossamer.models.blocks import find_stacks
from gossamer.models.self_attention import MapRule, SelfAttention
from gossamer.train.attention import Mapped, Related

Block = TypeVar("Block")
INSTEAD = "follow the original's attention by `relations` instead of `attention`"


def blocks_of(module: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the blocks of every stack, in order."""
    found: dict[str, list[nn.Module]] = {}
    for name, (stack, _) in find_stacks(module)[1].items():
        found.setdefault(stack, []).append(module.get_submodule(name))
    return found


def paired(student: Mapping[str, Sequence[Block]], teacher: Mapping[str, Sequence[Block]]) -> list[tuple[Block, Block]]:
    """Return each block of the student with the one of the teacher that it follows: evenly, the last with the last.

    >>> paired({"a": [0, 1]}, {"a": [0, 1, 2, 3, 4, 5]})
    [(0, 2), (1, 5)]
    """
    pairs = []
    for name, ours in student.items():
        theirs = teacher.get(name, [])
        if theirs:
            pairs += [(block, theirs[(i + 1) * len(theirs) // len(ours) - 1]) for i, block in enumerate(ours)]
    return pairs


def related(
    student: Sequence[SelfAttention], teacher: Sequence[SelfAttention], block: int | None, heads: int | None
) -> list[Related]:
    """Return the queries, keys and values of the student's last block and of one of the teacher's, for each stack.

    `block` is the teacher's, by default the last that attends. `heads` are the relation heads, by default as many as
    divide both widths, at most as many as the teacher has there (grouped keys and values have fewer than queries).
    """
    found = []
    for stack, ours in _by_stack(student).items():
        theirs = _by_stack(teacher).get(stack, {})
        if not theirs:
            continue
        if block is not None and block not in theirs:
            raise TechniqueError(
                f"relation_block {block} is none of the {len(theirs)} blocks of {stack} that attend to themselves "
                f"({min(theirs)} to {max(theirs)})",
                "name one of these, or leave relation_block out: the last",
            )
        one, other = ours[max(ours)], theirs[max(theirs) if block is None else block]
        for a, b, width, wide, size in zip(
            (one.q, one.k, one.v),
            (other.q, other.k, other.v),
            one.widths,
            other.widths,
            (other.key_size, other.key_size, other.value_size),
            strict=True,
        ):
            found.append(Related(a, b, relation_heads(width, wide, size, heads, a)))
    return found


def relation_heads(student: int, teacher: int, head_size: int, wanted: int | None, name: str) -> int:
    """Return into how many heads two widths are split. `head_size` is that of the teacher's heads, 0: not known.

    >>> relation_heads(224, 384, 32, None, "q")  # 7 heads beside 12
    8

    Raises TechniqueError where `wanted` does not divide both, or nothing says how many there are.
    """
    common = math.gcd(student, teacher)
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    if wanted is not None:
        if wanted not in divisors:
            raise TechniqueError(
                f"relation_heads {wanted} does not divide the {student} outputs of {name} and the original's {teacher}",
                f"use one of {', '.join(map(str, divisors[:-1] or divisors))}, or leave it out",
            )
        return wanted
    if not head_size:
        raise TechniqueError(
            f"nothing shows how many heads the {teacher} outputs of the original's {name} are",
            f"set relation_heads to one of {', '.join(map(str, divisors))}",
        )
    return max(number for number in divisors if number <= max(1, teacher // head_size))


def attention_pairs(
    student: Sequence[SelfAttention], teacher: Sequence[SelfAttention]
) -> list[tuple[SelfAttention, SelfAttention]]:
    """Return each self-attention of the student with the teacher's whose map it follows, as `paired` pairs blocks.

    Raises TechniqueError where they have different numbers of heads.
    """
    pairs = paired(
        *({stack: list(each.values()) for stack, each in _by_stack(side).items()} for side in (student, teacher))
    )
    for ours, theirs in pairs:
        heads, wanted = (one.widths[0] // one.key_size if one.key_size else 0 for one in (ours, theirs))
        if heads != wanted:
            raise TechniqueError(
                f"{ours.q} has {heads} heads and the original's {theirs.q} has {wanted}: their maps cannot be compared",
                INSTEAD,
            )
    return pairs


def mapped(
    pairs: Sequence[tuple[SelfAttention, SelfAttention]], ours: Sequence[MapRule], theirs: Sequence[MapRule]
) -> list[Mapped]:
    """Return what is compared of each pair."""
    return [
        Mapped((one.q, one.k), (other.q, other.k), rule, its)
        for (one, other), rule, its in zip(pairs, ours, theirs, strict=True)
    ]


def _by_stack(attentions: Sequence[SelfAttention]) -> dict[str, dict[int, SelfAttention]]:
    """Return the first self-attention of each block by stack and block, in order."""
    found: dict[str, dict[int, SelfAttention]] = {}
    for one in sorted(attentions, key=lambda one: one.block):
        found.setdefault(one.stack, {}).setdefault(one.block, one)
    return found
