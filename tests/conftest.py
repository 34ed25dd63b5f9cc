"""What every test gets: no network, one thread, a time cap by folder, and a list of the slow ones at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any import of a hub client: it reads its environment once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that press Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent

# Seconds after which a test is stopped. Far above what a test needs (TARGET_SECONDS): machines are shared, and the
# first test of a worker also pays for importing torch, or the exporter in `runtimes`.
DEFAULT_CAP = 60
CAPS = {"runtimes": 120, "properties": 120, "plan": 180, "cli": 120, "fault": 240, "e2e": 600}
SLOW_CAP = 300
TARGET_SECONDS, TARGET_FILE_SECONDS = 1.0, 20.0
# Folders whose files take longest come first: a worker that gets one last keeps the others waiting.
FIRST = ("train", "fault", "plan", "cli", "techniques", "runtimes")


def cap_of(folder: str, slow: bool) -> int:
    """Return the cap in seconds of a test in that folder of tests/."""
    cap = CAPS.get(folder, DEFAULT_CAP)
    return max(cap, SLOW_CAP) if slow else cap


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; give each test its folder's cap, unless it sets one; tests in e2e/ are marked as such."""
    places = {folder: place for place, folder in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(TESTS).parts[0], len(FIRST)))
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "e2e":
            item.add_marker(pytest.mark.e2e)
        if item.get_closest_marker("timeout") is None:
            slow = item.get_closest_marker("slow") is not None
            item.add_marker(pytest.mark.timeout(cap_of(folder, slow)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List tests above the target: a remark, not a failure, since the machine may be busy with something else."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if "e2e" not in report.keywords]
    above = sorted((r for r in passed if r.duration > TARGET_SECONDS), key=lambda report: -report.duration)
    if above:
        terminalreporter.write_line(f"{len(above)} of {len(passed)} tests took over {TARGET_SECONDS:g} s; the slowest:")
        for report in above[:10]:
            terminalreporter.write_line(f"  {report.duration:6.1f} s  {report.nodeid}")
    _list_files(terminalreporter)


def _list_files(terminalreporter: Any) -> None:
    """List the files that take longest, with the fixtures that their tests waited for."""
    files: Counter[str] = Counter()
    for report in (one for found in terminalreporter.stats.values() for one in found if hasattr(one, "duration")):
        files[report.nodeid.partition("::")[0]] += report.duration
    if files and files.most_common(1)[0][1] > TARGET_FILE_SECONDS:
        terminalreporter.write_line(f"{sum(files.values()):.0f} s in {len(files)} files; the longest, with fixtures:")
        for name, seconds in files.most_common(20):
            terminalreporter.write_line(f"  {seconds:6.1f} s  {name}")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep torch on one thread: workers side by side, and sums in one order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}: tests run without a network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount small file systems in memory, `mounted("size=128k")`; skip where that is not allowed."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a tensor may still be mapped
