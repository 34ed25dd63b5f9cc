from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, str], float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    began = time.monotonic()
    process = start(folder, PAUSE)
    assert process.wait(60) == 0
    return found(folder), time.monotonic() - began


def test_killed_at_random_moments_the_same_command_finishes_with_the_same_bytes(
    tmp_path: Path, uninterrupted: tuple[tuple[str, str], float]
) -> None:
    expected, duration = uninterrupted
    moments = random.Random(2)
    killed = 0
    for folder in (tmp_path / name for name in "abcd"):
        folder.mkdir()
        for _ in range(2):
            process = start(folder, PAUSE)
            time.sleep(moments.uniform(0.2, 0.95) * duration)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
        finish(folder)
        check_whole(folder, expected)
    assert killed >= 4


def test_killed_before_every_single_file_operation_the_same_command_finishes_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, "sweep")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors.decode()
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert len(folders) > 60
    expected = found(folders[-1])  # the run that reached its end before it could be killed
    for folder in folders:
        check_whole(folder, expected, num_steps=2)
