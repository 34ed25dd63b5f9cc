"""Writing so that a name never stands for half a file: write beside it, flush to disk, rename.

A kill or a power cut at any moment leaves the old content or the new, whole. A full disk or a folder that cannot be
written raises RunError with the numbers, and what was half-written is removed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
BLOCKED = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


@contextmanager
def storage_errors(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn a full, read-only or blocked `folder` into a RunError with the numbers and the remedy.

    Libraries that write from other languages report a full disk in words only, so those are read too. Errors about
    files elsewhere pass through.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        refusal = _refusal(error, folder, needed_bytes)
        if refusal is None:
            raise
        raise refusal from error


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start work that cannot fit: raise RunError when fewer than `needed_bytes` are free at `folder`."""
    if shutil.disk_usage(existing(folder)).free < needed_bytes:
        raise _full(folder, needed_bytes)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, flushed to disk; missing folders are made. Raises RunError as the module says.

    >>> write_bytes(Path("run/result.json"), b"{}")
    """
    partial = path.with_name(f".{path.name}.partial")
    with storage_errors(path.parent, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def publish_folder(source: Path, target: Path, *, marker: str = "gossamer.json") -> None:
    """Put a copy of `source` in the place of the folder `target`, whole; `source` stays as it is.

    The copy is made beside `target` and flushed; then the old folder is renamed aside, the new one renamed in, the old
    one removed. After a kill between the two renames the next call puts the old one back before it starts.
    `source` holds a file named `marker`; an existing target is replaced only when it does too (or is empty), so that a
    folder of somebody else's files is never removed. Raises RunError for that, and as the module says.
    """
    assert (source / marker).is_file(), f"{source} holds no {marker}"
    target = target.resolve()
    arriving, leaving = (target.with_name(f".{target.name}.{role}") for role in ("arriving", "leaving"))
    with storage_errors(target.parent):
        recover_folder(target)
        if target.exists() and not _replaceable(target, marker):
            raise RunError(
                f"{target} exists and was not written by gossamer (it holds no {marker})",
                "name another folder with --out, or remove it yourself",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(source, arriving)
            sync_tree(arriving)
            if target.exists():
                target.rename(leaving)
            arriving.rename(target)
        except BaseException:
            recover_folder(target)
            raise
        sync(target.parent)
        recover_folder(target)


def recover_folder(target: Path) -> None:
    """Finish or undo a `publish_folder` that was killed: afterwards `target` is whole and nothing lies beside it."""
    arriving, leaving = (target.with_name(f".{target.name}.{role}") for role in ("arriving", "leaving"))
    if leaving.exists() and not target.exists():
        leaving.rename(target)
    for remains in (arriving, leaving):
        if remains.exists():
            shutil.rmtree(remains)


def readable_bytes(count: int) -> str:
    """Print a number of bytes for people: "1.5 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _refusal(error: Exception, folder: Path, needed_bytes: int | None) -> RunError | None:
    code = error.errno if isinstance(error, OSError) else None
    if code in FULL or "No space left on device" in str(error) or "os error 28" in str(error):
        return _full(folder, needed_bytes)
    if not isinstance(error, OSError) or not _concerns(error, folder):
        return None
    if code in FORBIDDEN:
        return RunError(f"{folder} cannot be written: {error.strerror}", "name a folder you can write with --out")
    if code in BLOCKED:
        return RunError(f"{error.filename} is in the way: {error.strerror}", "name another folder with --out")
    return None


def _full(folder: Path, needed_bytes: int | None) -> RunError:
    free = readable_bytes(shutil.disk_usage(existing(folder)).free)
    needed = f"{readable_bytes(needed_bytes)} needed, " if needed_bytes is not None else ""
    return RunError(
        f"the disk of {folder} is full: {needed}{free} free",
        "free some space or name a folder on another disk with --out; finished steps are kept",
    )


def _concerns(error: OSError, folder: Path) -> bool:
    """Say whether an error is about `folder`: a name in or above it, or no name at all."""
    if error.filename is None:
        return True
    named, here = Path(os.fsdecode(error.filename)).absolute(), folder.absolute()
    return named.is_relative_to(here) or here.is_relative_to(named)


def _replaceable(target: Path, marker: str) -> bool:
    return target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
