"""Where calibration and training compute: the CPU, or one GPU for each process.

    auto    the GPU where torch sees one (CUDA, or ROCm, which torch calls cuda too), else the CPU
    cuda    the GPU; an error where there is none
    cpu     the CPU, whatever there is

Of processes that were started together each has the GPU of its number on its machine (torchrun's LOCAL_RANK). What is
opened, kept and written lies in main memory: a device holds what is computed with, while it is. Left out: Apple's MPS,
which has no float64, and solvers factor in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gossamer.errors import RunError
from gossamer.run.team import ALONE, Team

CHOICES = ("auto", "cpu", "cuda")
CPU = torch.device("cpu")


def chosen_device(choice: str = "auto", team: Team = ALONE) -> torch.device:
    """Return where this process computes.

    Raises RunError for a choice that is none, for `cuda` without a GPU, and for fewer GPUs than processes.
    """
    if choice not in CHOICES:
        raise RunError(
            f"--device {choice!r} is none of {', '.join(CHOICES)}", "leave it out to take a GPU if there is one"
        )
    found = torch.cuda.is_available()
    if choice == "cuda" and not found:
        raise RunError(
            f"--device cuda: torch {torch.__version__} sees no GPU here",
            "install a build of torch for this GPU and its driver, or use --device cpu",
        )
    if choice == "cpu" or not found:
        return CPU
    if team.local_size > torch.cuda.device_count():
        raise RunError(
            f"each process has a GPU to itself: {team.local_size} were started on this machine, "
            f"{torch.cuda.device_count()} GPUs are there",
            "start as many processes as there are GPUs, or use --device cpu",
        )
    return torch.device("cuda", team.local_rank)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def in_main_memory(values: Tensor) -> Tensor:
    """Return values in main memory: those from a GPU in pinned pages, which it reads again without a copy between."""
    if values.device.type == "cpu":
        return values
    kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=torch.cuda.is_available())
    return kept.copy_(values)


def pinned_bytes(num_bytes: int) -> int:
    """Return what values take in pinned pages: torch hands these out in powers of two.

    >>> pinned_bytes(5), pinned_bytes(8)
    (8, 8)
    """
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


@contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply float32 numbers as such while the `with` lasts, and the same way each time.

    By default torch rounds them to 10 bits (TF32) in convolutions.
    """
    if device.type == "cpu":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
