"""How many rows of a step fit into memory at once: found by one pass forward of one row, and one of two.

What a pass keeps for its way back is counted as autograd saves it, each storage once: a part that every pass keeps
(weights in another precision) and a part for each row. Beside it lie gradients, two moments and the start of what is
trained. A step's rows are then taken in parts of one size, so the gradient is that of the whole step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

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


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of one pass forward; leaves (parameters, inputs) are not counted.

    >>> weight = torch.ones(4, 4, requires_grad=True)
    >>> kept_bytes(lambda: (torch.ones(2, 4) @ weight).exp().sum())  # the exponentials, and the rows they came from
    64
    """
    kept: dict[int, int] = {}

    def note(values: Tensor) -> Tensor:
        if not values.is_leaf or not values.requires_grad:
            storage = values.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return values

    with torch.autograd.graph.saved_tensors_hooks(note, lambda values: values):
        loss = forward()
        total = sum(kept.values())  # while the graph is there, so that no storage is used twice
    del loss
    return total


def fitting_rows(
    batch_size: int, longest: Sequence[Batch], run: Pass, trained: int, free: int, progress: Progress, label: str
) -> int:
    """Return the most rows of a step that fit at once: a divisor of its size. `longest` are the two longest rows.

    `trained` is the number of values that are trained. Says so where it is less than the step; raises TechniqueError
    where not even one row fits.
    """
    one = kept_bytes(lambda: run(longest[:1]))
    two = kept_bytes(lambda: run(longest[:2])) if len(longest) > 1 else 2 * one
    each, always = max(1, two - one), max(0, 2 * one - two)
    fixed = always + COPIES * 4 * trained
    room = SHARE_OF_FREE * free - fixed
    fits = int(room / (OVERHEAD * each))
    if fits < 1:
        raise TechniqueError(
            f"{label} needs about {readable_bytes(fixed + int(OVERHEAD * each))} for one row of a step, "
            f"{readable_bytes(int(SHARE_OF_FREE * free))} may be used",
            "give shorter rows, or train fewer weights (lora)",
        )
    found = max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and size <= fits)
    if found < batch_size:
        progress.say(
            f"{label}: {found} rows at a time: a step of {batch_size} would keep about "
            f"{readable_bytes(fixed + int(OVERHEAD * each * batch_size))}"
        )
    return found


def free_bytes(device: torch.device, *networks: nn.Module | None, sharing: int = 1) -> int:
    """Return the bytes that are free where training takes place: on the GPU, or in main memory.

    On a GPU these are what is left once the `networks`, which may lie in main memory still, were moved there; main
    memory is divided among `sharing` processes.
    """
    if device.type == "cpu":
        return memory_bytes()[1] // sharing
    held = {values for one in networks if one is not None for values in (*one.parameters(), *one.buffers())}
    return device_free_bytes(device) - sum(values.nbytes for values in held if values.device.type == "cpu")


def remembered(folder: Path, find: Callable[[], int], team: Team = ALONE) -> int:
    """Return what was found when the training in `folder` began: a killed one goes on with the same parts.

    Of several processes the one that can hold the least says how much, and the leader keeps it.
    """
    path = folder / FILE
    known = json.loads(path.read_text("utf-8"))["rows"] if team.leads and path.exists() else None
    known = team.everywhere(known)
    if known is not None:
        return int(known)
    found = min(team.gathered(find()))
    if team.leads:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"rows": found}) + "\n")
    return int(found)
