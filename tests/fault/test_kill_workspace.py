from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import gossamer
from gossamer.run.fingerprint import hash_folder
from gossamer.run.journal import read_journal

SCRIPT = Path(__file__).parent / "six_steps.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gossamer.__file__).parents[1])}
PAUSE = 0.03


def start(folder: Path, argument: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(folder), str(argument)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE)


def finish(folder: Path) -> None:
    process = start(folder, 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()


def found(folder: Path) -> tuple[str, str]:
    return hash_folder(folder / "run" / "steps"), hash_folder(folder / "out")


def check_whole(folder: Path, expected: tuple[str, str], num_steps: int = 6) -> None:
    assert found(folder) == expected
    assert sorted(path.name for path in folder.iterdir()) == ["out", "run"]
    assert not any((folder / "run" / "scratch").iterdir())
    events = [(entry["event"], entry["key"]) for entry in read_journal(folder / "run" / "journal.jsonl")]
    assert Counter(Counter(key for event, key in events if event == "finished").values()) == {1: num_steps}
    finished: set[str] = set()
    for event, key in events:
        assert not (event == "started" and key in finished), "a finished step was built again"
        if event == "finished":
            finished.add(key)


def kill_at(folder: Path, moment: float) -> bool:
    """Start the run and kill it `moment` steps further than it had come (1.5 = halfway through the second)."""
    journal = folder / "run" / "journal.jsonl"
    before = len(steps_started(journal))
    process = start(folder, PAUSE)
    while process.poll() is None and len(steps_started(journal)) - before < int(moment) + 1:
        time.sleep(0.002)
    time.sleep(PAUSE * 1.2 * (moment % 1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def steps_started(journal: Path) -> list[str]:
    return [entry["key"] for entry in read_journal(journal) if entry["event"] == "started"]


def test_killed_at_random_moments_the_same_command_finishes_with_the_same_bytes(tmp_path: Path) -> None:
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    finish(uninterrupted)
    moments = random.Random(2)
    killed = 0
    for folder in (tmp_path / name for name in "abcd"):
        folder.mkdir()
        killed += sum(kill_at(folder, moments.uniform(0, 2.5)) for _ in range(2))
        finish(folder)
        check_whole(folder, found(uninterrupted))
    assert killed > 0


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """Give a folder in memory where there is one: a kill, unlike a power cut, loses nothing that waits for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def test_killed_before_every_single_file_operation_the_same_command_finishes_with_the_same_bytes(
    memory_folder: Path,
) -> None:
    process = start(memory_folder, "sweep")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors.decode()
    folders = sorted(memory_folder.iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) > 60
    expected = found(folders[-1])  # the run that reached its end before it could be killed
    for folder in folders:
        check_whole(folder, expected, num_steps=2)
