"""Kill `gossamer optimize` at twenty moments, `gptq` at thirty, whole and piece by piece: the bytes are the same."""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest

import gossamer
from gossamer.run.fingerprint import files_below, hash_file
from gossamer.run.journal import Entry, read_journal
from gossamer.runtimes.manifest import CARD

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gossamer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
GOAL = "quality >= 97%, size <= 45%"  # nothing in it hangs on a latency, so the same recipe is chosen every time
RECIPE = """
- gptq: {bits: 4, group_size: 16, targets: [q, k, v, o, up, down]}
- quantize: {bits: 8, targets: [embedding]}
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny job of tests/plan: model/, train.jsonl, test.jsonl."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "plan" / "tiny_job.py"))
    folder: Path = script["write_job"](tmp_path_factory.mktemp("job"))
    return folder


@dataclass(frozen=True)
class Verb:
    """Say what is killed how often: the words of a command, the kinds of its steps whose bytes must be the same."""

    words: tuple[str, ...]
    kills: int
    kinds: tuple[str, ...]
    script: str = "brief_gossamer.py"


OPTIMIZE = Verb(("optimize", "MODEL", "--goal", GOAL, "--runtime", "onnxruntime"), 20, ("artifact", "unchanged"))
APPLY = Verb(("apply", "RECIPE", "MODEL", "--runtime", "torch"), 30, ("artifact", "block"))
STREAMED = Verb((*APPLY.words, "--memory", "8GiB"), 30, APPLY.kinds, "streamed_gossamer.py")


def start(tiny: Path, out: Path, verb: Verb = OPTIMIZE) -> subprocess.Popen[str]:
    (tiny / "recipe.yaml").write_text(RECIPE)
    places = {"MODEL": str(tiny / "model"), "RECIPE": str(tiny / "recipe.yaml")}
    words = [
        *(places.get(word, word) for word in verb.words),
        *("--task", "text-classification", "--out", str(out)),
        *("--data", str(tiny / "train.jsonl"), "--eval", str(tiny / "test.jsonl")),
        *("--threads", "1", "--calibration-rows", "24", "--quiet"),
    ]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / verb.script), *words], env=ENVIRONMENT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        # what runs in a shell's background ignores interrupts, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def finish(tiny: Path, out: Path, verb: Verb) -> None:
    process = start(tiny, out, verb)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def journal(out: Path) -> list[Entry]:
    return read_journal(out / "journal.jsonl")


def artifact(out: Path) -> dict[str, str]:
    """Return the hash of every file but the card, which tells measured latencies."""
    folder = out / "artifact"
    return {name: hash_file(folder / name) for name in files_below(folder) if name != CARD}


@dataclass(frozen=True)
class Moment:
    """Name a moment of a run: `after` seconds after the step of that key began, or after the start when it is empty."""

    key: str
    kind: str
    after: float


def spread_moments(entries: list[Entry], started_at: float, draw: random.Random, kills: int) -> list[Moment]:
    """Return moments spread evenly at random over an uninterrupted run, in order."""
    begun = [(datetime.fromisoformat(e["time"]).timestamp(), e) for e in entries if e["event"] == "started"]
    last = datetime.fromisoformat(entries[-1]["time"]).timestamp()
    moments = []
    for seconds in sorted(draw.uniform(started_at, last + 0.2) for _ in range(kills)):
        before = [(at, entry) for at, entry in begun if at <= seconds]
        at, entry = before[-1] if before else (started_at, {"key": "", "kind": "start"})
        moments.append(Moment(entry["key"], entry["kind"], seconds - at))
    return moments


def kill_at(tiny: Path, out: Path, moment: Moment, verb: Verb) -> bool:
    """Start the command, kill it at that moment (or where it then is, when the step is done), and see its children die.

    Returns whether it was killed: False when it had ended before.
    """
    seen = len(journal(out)) if out.exists() else 0
    process = start(tiny, out, verb)
    reached = not moment.key
    while not reached and process.poll() is None:
        reached = any(entry.get("key") == moment.key for entry in journal(out)[seen:]) if out.exists() else False
        time.sleep(0.01)
    deadline = time.monotonic() + moment.after
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert wait_until(lambda: not children_of(process.pid)), "a child outlived its killed parent by ten seconds"
    return process.returncode == -signal.SIGKILL


def children_of(pid: int) -> list[int]:
    """Return the serving processes that were told this parent's number."""
    wanted = b"\0gossamer.runtimes.child\0" + str(pid).encode() + b"\0"
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                alive = wanted in (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
                continue
            found += [int(folder.name)] * alive
    return found


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for orphans in /proc")
@pytest.mark.parametrize("verb", [OPTIMIZE, APPLY, STREAMED], ids=["optimize", "gptq", "gptq-streamed"])
def test_killed_at_many_moments_it_ends_with_the_same_bytes_and_builds_nothing_twice(
    tiny: Path, tmp_path: Path, verb: Verb
) -> None:
    expected, out = tmp_path / "uninterrupted", tmp_path / "build"
    started_at = time.time()
    finish(tiny, expected, verb)
    moments = spread_moments(journal(expected), started_at, random.Random(20), verb.kills)
    killed = [moment for moment in moments if kill_at(tiny, out, moment, verb)]
    finish(tiny, out, verb)
    assert len(killed) >= verb.kills / 2  # the last moments may fall behind the end of a run on a less busy machine
    kinds = {moment.kind for moment in killed}
    assert len(kinds) >= 3
    if verb is STREAMED:
        assert "shard" in {entry["kind"] for entry in journal(out) if entry["event"] == "finished"}
        assert not list((out / "steps").glob("shard-*"))  # the artifact has them
    assert artifact(out) == artifact(expected)
    assert not any((out / "scratch").iterdir())
    finished: set[str] = set()
    for entry in journal(out):
        assert not (entry["event"] == "started" and entry["key"] in finished), f"{entry['kind']} was built twice"
        if entry["event"] == "finished":
            finished.add(entry["key"])
    assert set(Counter(e["key"] for e in journal(out) if e["event"] == "finished").values()) == {1}
    assert finished == {e["key"] for e in journal(expected) if e["event"] == "finished"}
    for entry in journal(expected):  # what is measured differs; what is built does not
        if entry["event"] == "finished" and entry["kind"] in verb.kinds:
            step = Path(entry["folder"])
            names = [name for name in files_below(out / step) if name != "result.json"]
            assert {n: hash_file(out / step / n) for n in names} == {n: hash_file(expected / step / n) for n in names}


def test_an_interrupt_ends_cleanly_and_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "build"
    process = start(tiny, out)
    assert wait_until(lambda: bool(children_of(process.pid)), 120)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert f"--out {out}" in said
    assert "Traceback" not in said
    assert not children_of(process.pid)
    assert not any((out / "scratch").iterdir())
    assert journal(out)[-1]["event"] == "failed"
