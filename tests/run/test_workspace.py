from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gossamer
from gossamer.errors import RunError
from gossamer.run.workspace import Run, read_identity

IDENTITY: dict[str, Any] = {"model": "a" * 64, "goal": "size <= 30%", "task": {"name": "lm", "context": 512}}


class Builder:
    """Write a file, and count how often."""

    def __init__(self, content: bytes = b"weights") -> None:
        self.content, self.calls = content, 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        assert not any(folder.iterdir())
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(self.content)
        return {"shape": (2, 3), "name": "é"}


def events(run: Run) -> list[str]:
    return [entry["event"] for entry in run.journal()]


def test_a_step_is_built_once_and_then_reused(tmp_path: Path) -> None:
    build = Builder()
    with Run(tmp_path / "run", IDENTITY) as run:
        first = run.step("export", {"bits": 4}, build)
        assert (first.reused, first.value) == (False, {"shape": [2, 3], "name": "é"})
    with Run(tmp_path / "run", IDENTITY) as run:
        second = run.step("export", {"bits": 4}, build, verify=True)
        assert (second.reused, second.value, second.folder) == (True, first.value, first.folder)
        assert events(run) == ["started", "finished", "reused"]
        assert run.cache.is_dir()
    assert build.calls == 1
    assert (second.folder / "deep" / "file").read_bytes() == b"weights"


def test_another_kind_input_or_code_is_another_step(tmp_path: Path) -> None:
    build = Builder()
    folders = set()
    for code in ("1", "2"):
        with Run(tmp_path / "run", IDENTITY, code=code) as run:
            folders |= {run.step(kind, {"bits": bits}, build).folder for kind in ("a", "b") for bits in (4, 8)}
    assert build.calls == len(folders) == 8


def test_result_json_says_nothing_about_when(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with Run(tmp_path / name, IDENTITY) as run:
            folder = run.step("export", {}, Builder()).folder
    first, second = ((tmp_path / name / "steps" / folder.name / "result.json").read_bytes() for name in ("one", "two"))
    assert first == second
    assert json.loads(first)["files"]["deep/file"]["bytes"] == 7


def test_another_identity_is_refused_by_name(tmp_path: Path) -> None:
    with Run(tmp_path / "run", IDENTITY):
        pass
    changed = {"model": "b" * 64, "goal": "size <= 30%", "task": {"name": "lm", "context": 256}, "version": 2}
    with pytest.raises(RunError) as caught:
        Run(tmp_path / "run", changed)
    assert "(model, task.context, version changed)" in caught.value.message
    assert "task.context: 512 -> 256" in caught.value.message
    assert "version: absent -> 2" in caught.value.message
    assert "aaaaaaaaaaaa...aaaaaaaaaaaa -> bbbbbbbbbbbb" in caught.value.message
    assert "goal:" not in caught.value.message
    assert "--fresh" in caught.value.hint
    assert read_identity(tmp_path / "run") == IDENTITY
    with Run(tmp_path / "run", IDENTITY):  # the refusal released the lock
        pass


def test_fresh_empties_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    with Run(tmp_path / "run", IDENTITY) as run:
        run.step("export", {}, Builder())
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with Run(tmp_path / "run", {"goal": "other"}, fresh=True) as run:
        assert run.journal() == []
        assert not any((run.folder / "steps").iterdir())
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"
    assert read_identity(tmp_path / "run") == {"goal": "other"}


def test_a_second_writer_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    script = (
        "import sys; from gossamer.run.workspace import Run\n"
        f"with Run({str(tmp_path / 'run')!r}, {{}}): print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(gossamer.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
        Run(tmp_path / "run", {})
    holder.kill()
    holder.communicate()
    with Run(tmp_path / "run", {}), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        Run(tmp_path / "run", {})


def test_a_step_that_fails_is_journaled_and_can_be_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("no luck")

    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with Run(tmp_path / "run", IDENTITY) as run:
        with pytest.raises(ValueError, match="no luck"):
            run.step("export", {}, fail)
        with pytest.raises(KeyboardInterrupt):
            run.step("export", {}, interrupt)
        assert not any((run.folder / "scratch").iterdir())
        assert run.step("export", {}, Builder()).reused is False
        assert events(run) == ["started", "failed", "started", "failed", "started", "finished"]
        assert run.journal()[1]["message"] == "no luck"


def test_a_value_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with Run(tmp_path / "run", IDENTITY) as run:
        with pytest.raises(ValueError, match="float"):
            run.step("measure", {}, lambda folder: float("nan"))
        assert not any((run.folder / "steps").iterdir())


def test_steps_may_stand_in_steps(tmp_path: Path) -> None:
    inner = Builder()
    with Run(tmp_path / "run", IDENTITY) as run:
        outer = run.step("outer", {}, lambda folder: run.step("inner", {}, inner).value["name"])
        assert outer.value == "é"
        assert run.step("inner", {}, inner).reused


def test_a_killed_runs_remains_are_removed(tmp_path: Path) -> None:
    with Run(tmp_path / "run", IDENTITY):
        pass
    (tmp_path / "run" / "scratch" / "export-1" / "deep").mkdir(parents=True)
    with Run(tmp_path / "run", IDENTITY) as run:
        assert not any((run.folder / "scratch").iterdir())


def test_a_step_whose_journal_line_was_lost_is_recovered(tmp_path: Path) -> None:
    build = Builder()
    with Run(tmp_path / "run", IDENTITY) as run:
        run.step("export", {}, build)
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    with Run(tmp_path / "run", IDENTITY) as run:
        assert run.step("export", {}, build).reused
        assert events(run) == ["started", "finished", "reused"]
        assert run.journal()[1]["recovered"] is True
    assert build.calls == 1


@pytest.mark.parametrize(
    ("damage", "message", "needs_verify"),
    [
        (lambda folder: (folder / "deep" / "file").write_bytes(b"x"), "7 bytes recorded, 1 found", False),
        (lambda folder: (folder / "deep" / "file").write_bytes(b"WEIGHTS"), "sha256", True),
        (lambda folder: (folder / "deep" / "file").unlink(), "deep/file was added or removed", False),
        (lambda folder: (folder / "more").write_bytes(b""), "more was added or removed", False),
        (lambda folder: (folder / "result.json").write_bytes(b"{"), "missing or damaged", False),
        (lambda folder: (folder / "result.json").unlink(), "missing or damaged", False),
    ],
)
def test_changed_files_of_a_finished_step_are_refused(
    tmp_path: Path, damage: Any, message: str, needs_verify: bool
) -> None:
    with Run(tmp_path / "run", IDENTITY) as run:
        damage(run.step("export", {}, Builder()).folder)
        if needs_verify:
            assert run.step("export", {}, Builder()).reused
        with pytest.raises(RunError, match=message) as caught:
            run.step("export", {}, Builder(), verify=needs_verify)
        assert "remove" in caught.value.hint


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "identity": {}}', '{"format": 1}'])
def test_a_damaged_run_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        Run(tmp_path / "run", {})


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        read_identity(tmp_path)
