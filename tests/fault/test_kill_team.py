"""Kill one of two processes of `gossamer apply`: both end, and the same command ends in the bytes of a whole run.

torchrun can start them again by itself (`--max-restarts`): the training goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import gossamer
from gossamer.run.fingerprint import files_below, hash_file
from gossamer.run.journal import read_journal
from gossamer.runtimes.manifest import CARD

COMMAND = Path(__file__).parent / "brief_gossamer.py"
RECIPE = """
- smooth: {}
- gptq: {bits: 4, group_size: 16, targets: [q, k, v, o, up, down]}
- quantize: {bits: 8, targets: [embedding]}
"""
TRAINED = """
- prune: {what: ffn, to: 50%, by: magnitude}
- distill: {epochs: 40, batch_size: 8, micro_batch: 2, rate: 1.0e-4}
- quantize: {bits: 8}
"""
IN_THE_SWEEP = 3  # streams and blocks that are finished when a process is killed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny job of tests/plan, and the recipes."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "plan" / "tiny_job.py"))
    folder: Path = script["write_job"](tmp_path_factory.mktemp("job"))
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "trained.yaml").write_text(TRAINED, encoding="utf-8")
    return folder


def start(
    tiny: Path, out: Path, processes: int = 2, recipe: str = "recipe.yaml", restarts: int = 0
) -> subprocess.Popen[str]:
    words = [
        *("apply", str(tiny / recipe), str(tiny / "model"), "--task", "text-classification"),
        *("--data", str(tiny / "train.jsonl"), "--eval", str(tiny / "test.jsonl"), "--out", str(out)),
        *("--threads", "1", "--calibration-rows", "24"),
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    torchrun += [f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), str(COMMAND), *words],
        env={**os.environ, "PYTHONPATH": str(Path(gossamer.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def artifact(out: Path) -> dict[str, str]:
    folder = out / "artifact"
    return {name: hash_file(folder / name) for name in files_below(folder) if name != CARD}


def process_of(torchrun: int, rank: int) -> int:
    """Return the number of the process of a rank that a torchrun started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == torchrun and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended while we looked
                continue
    raise AssertionError(f"no process of rank {rank}")


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_two_processes_end_together_and_go_on_together(tiny: Path, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    process = start(tiny, alone, 1)
    _, errors = process.communicate()
    assert process.returncode == 0, errors

    def finished() -> int:
        entries = read_journal(out / "journal.jsonl") if (out / "journal.jsonl").exists() else []
        return sum(entry["event"] == "finished" and entry["kind"] in ("stream", "block") for entry in entries)

    for rank in (1, 0):
        process = start(tiny, out)
        before = finished()
        assert wait_until(lambda before=before: finished() >= before + IN_THE_SWEEP, 240)  # type: ignore[misc]
        os.kill(process_of(process.pid, rank), signal.SIGKILL)
        process.communicate(timeout=90)
        assert process.returncode != 0
        assert not (out / "artifact").exists()
    process = start(tiny, out)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert artifact(out) == artifact(alone)
    assert said.count("PASS") == 1  # one process prints
    assert not any((out / "scratch").iterdir())
    assert not list((out / "steps").glob("stream-*"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_training_whose_processes_die_is_started_again_and_ends_the_same(tiny: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    process = start(tiny, whole, recipe="trained.yaml")
    _, errors = process.communicate()
    assert process.returncode == 0, errors

    def reached() -> int:
        found = (out / "cache").glob("distill-*/checkpoint-*/trainer_state.json")
        return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)

    process = start(tiny, out, recipe="trained.yaml", restarts=2)
    for rank in (1, 0):
        before = reached()
        assert wait_until(lambda before=before: reached() > before, 240)  # type: ignore[misc]
        os.kill(process_of(process.pid, rank), signal.SIGKILL)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.count("PASS") == 1
    assert "the connection to another process broke" in errors
    assert artifact(out) == artifact(whole)
    entries = read_journal(out / "journal.jsonl")
    assert sum(entry["event"] == "started" and entry["kind"] == "trained" for entry in entries) == 3
    assert sum(entry["event"] == "finished" and entry["kind"] == "trained" for entry in entries) == 1
    assert not any((out / "cache").rglob("checkpoint-*"))
