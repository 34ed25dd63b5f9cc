"""How many rows of a step fit into memory at once: found by one pass forward of one row, and one of two.

What a pass keeps for its way back is counted as autograd saves it, each storage once: a part that every pass keeps
(weights in another precision) and a part for each row. Beside it lie gradients, two moments and the start of what is
trained. A step's rows are then taken in parts of one size, so the gradient is that of the whole step. Where blocks are
passed again on the way back, a pass keeps what goes into each, and all of one block at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import TechniqueError
from gossamer.measure.machine import memory_bytes
from gossamer.run.atomic import readable_bytes, write_text
from gossamer.run.device import free_bytes as device_free_bytes
from gossamer.run.progress import Progress
from gossamer.run.team import ALONE, Team
from gossamer.tasks.base import Batch

SHARE_OF_FREE = 0.8
OVERHEAD = 1.4  # what the way back makes besides, and what the allocator leaves unused
COPIES = 4  # gradient, two moments, the start
FILE = "micro-batch.json"
Pass = Callable[[Sequence[Batch]], Tensor]


@dataclass(frozen=True)
class Kept:
    """Hold the bytes that are kept of a pass for its way back: all, and where blocks are passed again."""

    all: int
    again: int


@dataclass(frozen=True)
class Fit:
    """Say how many rows are passed at once, and whether blocks are passed again on the way back."""

    rows: int
    checkpointing: bool = False


def smaller(fit: Fit, share: int, *, may_pass_again: bool) -> Fit | None:
    """Return how to pass less at once: fewer rows of a process's share of a step, then blocks again; None: no way.

    >>> smaller(Fit(8), 16, may_pass_again=True), smaller(Fit(1), 16, may_pass_again=True)
    (Fit(rows=4, checkpointing=False), Fit(rows=1, checkpointing=True))
    """
    fewer = [size for size in range(1, fit.rows) if share % size == 0]
    if fewer:
        return Fit(fewer[-1], fit.checkpointing)
    return Fit(1, checkpointing=True) if may_pass_again and not fit.checkpointing else None


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of one pass forward; leaves (parameters, inputs) are not counted.

    >>> weight = torch.ones(4, 4, requires_grad=True)
    >>> kept_bytes(lambda: (torch.ones(2, 4) @ weight).exp().sum())  # the exponentials, and the rows they came from
    64
    """
    return kept(forward).all


def kept(forward: Callable[[], Tensor], blocks: Sequence[nn.Module] = ()) -> Kept:
    """Return what autograd keeps of one pass forward, as a whole and where these blocks are passed again."""
    held: dict[int, int] = {}
    inputs: dict[int, int] = {}
    begun: list[int] = []
    inside: list[int] = [0]

    def note(values: Tensor) -> Tensor:
        if not values.is_leaf or not values.requires_grad:
            storage = values.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return values

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        storages = [each.untyped_storage() for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        inputs.update({storage.data_ptr(): storage.nbytes() for storage in storages})
        begun.append(sum(held.values()))

    def leave(*_: Any) -> None:
        inside.append(sum(held.values()) - begun.pop())

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(note, lambda values: values))
        loss = forward()
        total = sum(held.values())  # while the graph is there, so that no storage is used twice
    del loss
    return Kept(total, total - sum(inside) + sum(inputs.values()) + max(inside))


def fitting_rows(
    batch_size: int,
    longest: Sequence[Batch],
    run: Pass,
    trained: int,
    free: int,
    progress: Progress,
    label: str,
    *,
    blocks: Sequence[nn.Module] = (),
    checkpointing: bool | None = False,
) -> Fit:
    """Return the most rows of a step that fit at once: a divisor of its size. `longest` are the two longest rows.

    `trained` is the number of values that are trained. Where `checkpointing` is None, `blocks` are passed again if not
    one row fits otherwise. Says so, and where it is less than the step; raises TechniqueError where not even one row
    fits.
    """
    one = kept(lambda: run(longest[:1]), blocks)
    two = kept(lambda: run(longest[:2]), blocks) if len(longest) > 1 else Kept(2 * one.all, 2 * one.again)
    ways = [(False, one.all, two.all)] if not checkpointing else []
    ways += [(True, one.again, two.again)] if checkpointing or (checkpointing is None and blocks) else []
    needed: list[int] = []
    for again, first, second in ways:
        each, always = max(1, second - first), max(0, 2 * first - second)
        fixed = always + COPIES * 4 * trained
        fits = int((SHARE_OF_FREE * free - fixed) / (OVERHEAD * each))
        needed.append(fixed + int(OVERHEAD * each))
        if fits < 1:
            continue
        if again and len(needed) > 1:
            progress.say(
                f"{label}: blocks are passed again on the way back: a row would keep about {readable_bytes(needed[0])}"
            )
        found = max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and size <= fits)
        if found < batch_size:
            progress.say(
                f"{label}: {found} rows at a time: a step of {batch_size} would keep about "
                f"{readable_bytes(fixed + int(OVERHEAD * each * batch_size))}"
            )
        return Fit(found, again)
    raise TechniqueError(
        f"{label} needs about {readable_bytes(needed[-1])} for one row of a step, "
        f"{readable_bytes(int(SHARE_OF_FREE * free))} may be used",
        "give shorter rows, or train fewer weights (lora)" + ("" if ways[-1][0] else ", or set checkpointing"),
    )


def free_bytes(device: torch.device, *networks: nn.Module | None, sharing: int = 1) -> int:
    """Return the bytes that are free where training takes place: on the GPU, or in main memory.

    On a GPU these are what is left once the `networks`, which may lie in main memory still, were moved there; main
    memory is divided among `sharing` processes.
    """
    if device.type == "cpu":
        return memory_bytes()[1] // sharing
    held = {values for one in networks if one is not None for values in (*one.parameters(), *one.buffers())}
    return device_free_bytes(device) - sum(values.nbytes for values in held if values.device.type == "cpu")


def remembered(folder: Path, find: Callable[[], Fit], team: Team = ALONE) -> Fit:
    """Return what was found when the training in `folder` began: a killed one goes on with the same parts.

    Of several processes the one that can hold the least says how much, and the leader keeps it.
    """
    path = folder / FILE
    known = json.loads(path.read_text("utf-8")) if team.leads and path.exists() else None
    known = team.everywhere(known)
    if known is not None:
        return Fit(**known)
    mine = find()
    found = Fit(min(team.gathered(mine.rows)), any(team.gathered(mine.checkpointing)))
    if team.leads:
        remember(folder, found)
    return found


def remember(folder: Path, fit: Fit) -> None:
    """Keep what was found beside the checkpoints of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps({"rows": fit.rows, "checkpointing": fit.checkpointing}) + "\n")
