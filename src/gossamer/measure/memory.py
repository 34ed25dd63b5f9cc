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
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _status(field: str) -> int | None:
    if not STATUS.exists():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
