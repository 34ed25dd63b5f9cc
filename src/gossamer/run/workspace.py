"""A run folder: every finished step is kept under the hash of what went into it, so the same command goes on.

    RUN/run.json                    what this run is about (model, data, task, goal...): anything else is refused
    RUN/journal.jsonl               what happened, in order
    RUN/lock                        held by the one process that writes
    RUN/steps/<kind>-<key>/         a finished step, and result.json: inputs, value, each file's size and sha256
    RUN/scratch/                    half-built steps; emptied when the run is opened
    RUN/cache/                      work that may be lost and made again

A step is built in scratch/, flushed to disk, described in result.json, and renamed into steps/ in one move: a name in
steps/ always stands for a whole step. The key is sha256(kind, inputs, version of this code), so a change in any of
them is another step; equal keys hold equal bytes as long as `build` is deterministic.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gossamer.errors import RunError
from gossamer.run.atomic import check_space, storage_errors, sync, sync_tree, write_text
from gossamer.run.fingerprint import Json, canonical, code_version, files_below, hash_file, hash_json
from gossamer.run.journal import Entry, Journal

RESULT = "result.json"
REMEDY = "use another folder with --out, or --fresh to start this one again"


@dataclass(frozen=True)
class StepResult:
    """Hold a finished step: its folder of files, the JSON value of `build`, and whether it was there before."""

    folder: Path
    value: Any
    reused: bool


class Run:
    """Open a run folder for writing, in a `with`; one process at a time.

    `identity` says what the run is about, one entry a part ({"model": sha256, "goal": "...", ...}); an existing run of
    another identity is refused naming the parts that differ, unless `fresh` asks to empty it. Raises RunError for that,
    for a folder another process holds (with its pid), a damaged one, a full disk and a folder that cannot be written.

    >>> with Run(Path("build/run"), {"model": hash_folder(model), "goal": str(goal)}) as run:
    ...     step = run.step("profile", {"rows": 64}, build=lambda folder: measure_into(folder))
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Json], *, fresh: bool = False, code: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.identity: dict[str, Any] = json.loads(canonical(identity))
        self.code = code if code is not None else code_version()
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.folder)
            try:
                self._prepare(fresh)
                self._journal = Journal(self.folder / "journal.jsonl")
            except BaseException:
                os.close(self._lock)
                raise
        self._finished = {entry["key"] for entry in self._journal.entries if entry["event"] == "finished"}

    @property
    def cache(self) -> Path:
        """Return the folder of work that may be lost and made again (an exported graph); it exists."""
        return self.folder / "cache"

    def record(self, event: str, **fields: Json) -> Entry:
        """Append a decision or a measurement to the journal, flushed to disk, and return the entry."""
        return self._journal.append(event, **fields)

    def journal(self) -> list[Entry]:
        """Return every journal entry so far, oldest first: {"time", "event", ...}."""
        return list(self._journal.entries)

    def step(
        self,
        kind: str,
        inputs: Mapping[str, Json],
        build: Callable[[Path], Json],
        *,
        needed_bytes: int = 0,
        verify: bool = False,
    ) -> StepResult:
        """Return the step made by `build(folder)` from `inputs`, building it only when it is not there yet.

        `build` writes its files into the folder that it is given (empty, and renamed afterwards: keep no absolute
        paths) and returns a JSON value. A finished step is checked before it is used again: every file's size, and with
        `verify` its sha256 too. `needed_bytes` refuses early where the disk cannot hold it. Raises RunError when files
        of a finished step were changed, when the disk is full or cannot be written; what `build` raises is journaled.
        """
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", kind), kind
        key, name = self._name(kind, inputs)
        folder = self.folder / "steps" / name
        if folder.exists():
            value = _check_step(folder, key, verify)
            if key not in self._finished:  # killed between the rename and the journal's line
                self._note_finished(kind, key, name, recovered=True)
            self.record("reused", kind=kind, key=key, folder=f"steps/{name}")
            return StepResult(folder, value, reused=True)
        check_space(self.folder, needed_bytes)
        self.record("started", kind=kind, key=key, inputs=inputs)
        began = time.monotonic()
        scratch = self.folder / "scratch" / name
        try:
            with storage_errors(self.folder, needed_bytes or None):
                value = self._build(scratch, folder, {"kind": kind, "key": key, "inputs": inputs}, build)
        except BaseException as error:
            self._note_failure(kind, key, scratch, error)
            raise
        self._note_finished(kind, key, name, seconds=round(time.monotonic() - began, 3))
        return StepResult(folder, value, reused=False)

    def has(self, kind: str, inputs: Mapping[str, Json]) -> bool:
        """Say whether the step made from `inputs` is there already."""
        return (self.folder / "steps" / self._name(kind, inputs)[1]).exists()

    def discard(self, kind: str, inputs: Mapping[str, Json]) -> None:
        """Remove a finished step that nothing will ask for again; does nothing where there is none."""
        key, name = self._name(kind, inputs)
        folder = self.folder / "steps" / name
        if not folder.exists():
            return
        self._finished.discard(key)
        self.record("discarded", kind=kind, key=key, folder=f"steps/{name}")
        scratch = self.folder / "scratch" / f"discarded-{name}"
        with storage_errors(self.folder):
            folder.rename(scratch)  # whole or gone: a kill leaves rubbish in scratch/, never half a step
            shutil.rmtree(scratch)

    def _name(self, kind: str, inputs: Mapping[str, Json]) -> tuple[str, str]:
        """Return (key, folder's name) of a step."""
        key = hash_json({"kind": kind, "inputs": inputs, "code": self.code})
        return key, f"{kind}-{key[:12]}"

    def close(self) -> None:
        """Release the lock."""
        self._journal.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _build(self, scratch: Path, folder: Path, described: Mapping[str, Json], build: Callable[[Path], Json]) -> Json:
        scratch.mkdir()
        value: Json = json.loads(canonical(build(scratch)))  # what a later run will read: tuples become lists
        files = {name: _describe(scratch / name) for name in files_below(scratch)}
        sync_tree(scratch)
        result = {**described, "code": self.code, "value": value, "files": files}
        write_text(scratch / RESULT, json.dumps(result, sort_keys=True, indent=1) + "\n")
        scratch.rename(folder)
        sync(folder.parent)
        sync(scratch.parent)
        return value

    def _prepare(self, fresh: bool) -> None:
        """Check or write run.json, then make the folders and empty scratch/."""
        described = self.folder / "run.json"
        if fresh:
            _empty(self.folder)
        if described.exists():
            _refuse_other_identity(self.folder, read_identity(self.folder), self.identity)
        if (self.folder / "scratch").exists():
            shutil.rmtree(self.folder / "scratch")
        for name in ("steps", "scratch", "cache"):
            (self.folder / name).mkdir(exist_ok=True)
        if not described.exists():
            write_text(described, json.dumps({"format": 1, "identity": self.identity}, sort_keys=True, indent=1) + "\n")

    def _note_finished(self, kind: str, key: str, name: str, **fields: Json) -> None:
        self.record("finished", kind=kind, key=key, folder=f"steps/{name}", **fields)
        self._finished.add(key)

    def _note_failure(self, kind: str, key: str, scratch: Path, error: BaseException) -> None:
        """Remove the half-built step first: that may be what makes room for the journal's line."""
        try:
            if scratch.exists():
                shutil.rmtree(scratch)
            self.record("failed", kind=kind, key=key, error=type(error).__name__, message=str(error)[:500])
        except (RunError, OSError) as second:
            error.add_note(f"and the journal could not be written: {second}")


class Onlooker(Run):
    """Stand for a run folder that another process of the team writes: here it only has a place."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def record(self, event: str, **fields: Json) -> Entry:
        """Refuse: the process that leads keeps the journal."""
        raise AssertionError(f"{event} was to be recorded by a process that does not lead")


def read_identity(folder: Path) -> dict[str, Any]:
    """Return what a run folder is about, without opening it for writing. Raises RunError when it is none or damaged."""
    path = folder / "run.json"
    try:
        described = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} is not a run folder: it holds no run.json", "name the folder given as --out"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}", REMEDY) from error
    if not isinstance(described, dict) or described.get("format") != 1 or "identity" not in described:
        raise RunError(f"{path} was not written by this version of gossamer", REMEDY)
    identity: dict[str, Any] = described["identity"]
    return identity


def _take_lock(folder: Path) -> int:
    """Lock the run for this process's life; flock, so that the kernel releases it whatever way the process ends."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise RunError(
            f"{folder} is in use by process {holder}", "wait for it to end, stop it, or use another folder with --out"
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _empty(folder: Path) -> None:
    """Remove what a run wrote into its folder, run.json last: a kill on the way leaves a folder that still is a run."""
    for name in ("scratch", "cache", "steps"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in ("journal.jsonl", "run.json"):
        (folder / name).unlink(missing_ok=True)


def _refuse_other_identity(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, after = _leaves(old), _leaves(new)
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    if changed:
        parts = "; ".join(f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}" for name in changed)
        raise RunError(f"{folder} holds another run ({', '.join(changed)} changed): {parts}", REMEDY)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested parts into dotted names with one short text each."""
    leaves: dict[str, str] = {}
    for name, part in value.items():
        if isinstance(part, Mapping) and part:
            leaves |= _leaves(part, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = part if isinstance(part, str) else canonical(part)
    return leaves


def _short(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= 60 else f"{text[:12]}...{text[-12:]}"


def _describe(path: Path) -> dict[str, Json]:
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _check_step(folder: Path, key: str, verify: bool) -> Any:
    """Return the value of a finished step after comparing its files with what was recorded about them."""
    remedy = f"restore it, or remove {folder} to build it again"
    try:
        result = json.loads((folder / RESULT).read_text("utf-8"))
        recorded: dict[str, dict[str, Any]] = result["files"]
        value, found_key = result["value"], result["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / RESULT} is missing or damaged: {error}", remedy) from error
    if found_key != key:
        raise RunError(f"{folder} holds step {found_key}, expected {key}", remedy)
    found = [name for name in files_below(folder) if name != RESULT]
    if strange := sorted(set(found) ^ set(recorded)):
        raise RunError(f"{folder}: {', '.join(strange)} was added or removed after the step finished", remedy)
    for name, described in recorded.items():
        size = (folder / name).stat().st_size
        if size != described["bytes"]:
            raise RunError(f"{folder / name} was changed: {described['bytes']} bytes recorded, {size} found", remedy)
        if verify and (sha256 := hash_file(folder / name)) != described["sha256"]:
            raise RunError(
                f"{folder / name} was changed: sha256 {described['sha256'][:12]} recorded, {sha256[:12]} found", remedy
            )
    return value
