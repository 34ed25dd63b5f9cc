"""Resident memory of this process, in bytes, as the kernel counts it.

Linux keeps the most that was ever resident (`VmHWM` in /proc/self/status), and lets a process reset the mark by writing
5 to /proc/self/clear_refs (proc(5)), so that opening an artifact and running it can be told apart. Elsewhere
`resource.getrusage` knows the mark, cannot reset it, and what is resident now is not known: the mark stands in for it.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
LARGE_BYTES = 4 << 20
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Return the bytes that are resident now (off Linux: the most so far)."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Return the most bytes that were resident since the start or the last reset."""
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Set the mark of `peak_bytes` back to what is resident now; False where the system does not permit it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def release_unused() -> None:
    """Collect garbage and hand the allocator's free pages back, so that what is resident is what is in use (glibc)."""
    gc.collect()
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_nothing_large() -> None:
    """Have the allocator hand large blocks back as soon as they are freed, for the rest of this process (glibc).

    Left to itself it takes blocks of up to 32 MiB from its heap once such a one was freed: layers that come and go then
    leave holes, a GiB of them for a model of 7B.
    """
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(MMAP_THRESHOLD, LARGE_BYTES)


def _of_glibc(function: str) -> Any:
    """Return a function of the C library, None where it has none of that name (musl, macOS)."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def _status(field: str) -> int | None:
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
