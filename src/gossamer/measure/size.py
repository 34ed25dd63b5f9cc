"""Size: the bytes that a user must ship, counted on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gossamer.errors import MeasureError

DECIMAL = ("B", "kB", "MB", "GB", "TB")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def shipped_bytes(files: Iterable[Path]) -> int:
    """Count the bytes of files, and of all files in folders; what is named twice or linked counts once.

    Links are followed: what is shipped is the content. Raises MeasureError naming a path that does not exist.
    Example: `shipped_bytes([folder / "model.onnx", folder / "tokenizer.json"])`.
    """
    counted: dict[tuple[int, int], int] = {}
    for path in files:
        if not path.exists():
            raise MeasureError(f"cannot count the size of {path}: it does not exist", "was the artifact moved?")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                status = file.stat()
                counted[status.st_dev, status.st_ino] = status.st_size
    return sum(counted.values())


def human_size(num_bytes: float, *, binary: bool = False) -> str:
    """Write bytes for people: `90.9 MB` (1 MB = 1e6 bytes), or with `binary` `86.7 MiB` (1 MiB = 2^20 bytes)."""
    base, units = (1024.0, BINARY) if binary else (1000.0, DECIMAL)
    size, power = float(num_bytes), 0
    while abs(size) >= base * 0.99995 and power < len(units) - 1:
        size, power = size / base, power + 1
    return (
        f"{size:.0f} B"
        if power == 0
        else f"{size:.3g} {units[power]}"
        if abs(size) < 100
        else f"{size:.1f} {units[power]}"
    )
