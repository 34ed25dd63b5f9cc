from __future__ import annotations

import pytest
from torch import nn

from gossamer.models.blocks import block_of, find_stacks


class Block(nn.Module):
    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, out or width), nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3))


def names(module: nn.Module) -> dict[str, int]:
    return {stack.name: stack.num_blocks for stack in find_stacks(module)[0]}


def test_the_outermost_list_of_like_blocks_wins() -> None:
    module = nn.ModuleDict({"body": nn.ModuleList(Block(4) for _ in range(3)), "head": nn.Linear(4, 2)})
    stacks, members = find_stacks(module)
    assert [(stack.name, stack.num_blocks, stack.kind) for stack in stacks] == [("body", 3, "Block")]
    assert stacks[0].num_parameters == sum(p.numel() for p in Block(4).parameters())
    assert block_of("body.2.experts.1.0", members) == ("body", 2, "experts.1.0")
    assert block_of("head", members) is None
    assert block_of("body", members) is None


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)), {}),  # layers are no blocks
        (nn.Sequential(Block(3), nn.Dropout(), Block(3)), {"": 2}),  # what owns nothing does not count
        (nn.Sequential(Block(3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())), {"0.experts": 3}),
        (nn.ModuleList([Block(4, out=6), Block(4), Block(4)]), {"": 3}),  # the first differs a little
        (
            nn.ModuleList(nn.ModuleList(Block(width) for _ in range(2)) for width in (3, 5)),
            {"0": 2, "1": 2},
        ),  # stages of different width
        (nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])), {"0": 1}),  # one block only
    ],
)
def test_what_is_a_stack(module: nn.Module, expected: dict[str, int]) -> None:
    assert names(module) == expected


def test_blocks_are_numbered_in_order_whatever_their_keys() -> None:
    module = nn.Sequential(nn.Dropout(), Block(3), nn.Dropout(), Block(3))
    assert find_stacks(module)[1] == {"1": ("", 0), "3": ("", 1)}
