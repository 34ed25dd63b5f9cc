"""One process for several measurements of one artifact: stopped in between, and gone once something failed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gossamer.plan.lending import Lent
from gossamer.runtimes.process import Served

X = {"x": np.ones((1, 5), dtype=np.float32)}
Start = Callable[[], Served]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Give what starts a process that serves a small matrix."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "runtimes"))
    save_file({"weight": np.ones((3, 5), dtype=np.float32)}, tmp_path / "model.safetensors")
    return partial(Served, "linear_runtime:LinearRuntime", tmp_path, threads=1, timeout=60)


def state(pid: int) -> str:
    """Return what the kernel says of a process: S waits, T is stopped; empty where there is none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return status.partition("State:")[2].split()[0]


def test_who_asks_for_the_same_gets_the_same_process_which_is_stopped_in_between(start: Start) -> None:
    lent = Lent()
    with lent.out("one", start) as served:
        first = served.pid
        assert served.run(X)["logits"].tolist() == [[5, 5, 5]]
    os.waitid(os.P_PID, first, os.WSTOPPED | os.WNOWAIT)
    assert state(first) == "T"
    with lent.out("one", start) as served:
        assert served.pid == first
        assert served.run(X)["logits"].tolist() == [[5, 5, 5]]
    with lent.out("other", start) as served:
        assert served.pid != first
        assert state(first) == ""
        second = served.pid
    lent.close()
    assert state(second) == ""
    lent.close()  # harmless
    with lent.out("other", start) as served:
        assert served.run(X)["logits"].tolist() == [[5, 5, 5]]
    lent.close()


def test_one_that_ended_while_it_stood_by_is_opened_anew(start: Start) -> None:
    lent = Lent()
    with lent.out("one", start) as served:
        first = served.pid
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    with lent.out("one", start) as served:
        assert served.pid != first
        assert served.run(X)["logits"].tolist() == [[5, 5, 5]]
    lent.close()


def test_one_that_failed_its_borrower_is_not_lent_again(start: Start) -> None:
    lent, seen = Lent(), []

    def fail() -> None:
        with lent.out("one", start) as served:
            seen.append(served.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state(seen[0]) == ""
    with lent.out("one", start) as served:
        assert served.pid != seen[0]
    lent.close()
