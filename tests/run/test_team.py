"""A team: alone nothing is sent; several processes get what one gave, in the order of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer
from gossamer.cli import main
from gossamer.run.team import ALONE, assembled, num_processes, started_rank

TALK = """
import json, sys
import torch
from gossamer.cli import main
from gossamer.run.team import assembled
with assembled() as team:
    heard = [team.everywhere({"from": team.rank, "word": "straße", "nan": float("nan")}, source) for source in (0, 1)]
    assert heard[0].pop("nan") != 0 and heard[1].pop("nan") != 0
    gathered = team.gathered([team.rank, None, 0.1 + team.rank])
    values = torch.full((2, 3), float(team.rank))
    if team.rank:
        team.send(values.t(), 0)
    else:
        arrived = torch.empty(3, 2)
        team.receive(arrived, 1)
        heard.append(arrived.tolist())
    team.broadcast(values, 1)
    line = json.dumps([team.rank, team.size, team.local_size, team.leads, heard, gathered, values.tolist()])
    sys.stdout.write(line + "\\n")  # at once: the other one writes to the same pipe
    sys.stdout.flush()
"""


def together(words: list[str], num: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes under torchrun."""
    inherited = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}", *words],
        env={**inherited, "PYTHONPATH": str(Path(gossamer.__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_alone_nothing_is_sent() -> None:
    assert num_processes() == 1
    assert started_rank() == 0
    with assembled() as team:
        assert team == ALONE
        assert team.leads
        assert team.everywhere({"a": 1}) == {"a": 1}
        assert team.gathered([2]) == [[2]]


@pytest.mark.timeout(150)
def test_two_processes_hear_each_other(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(TALK, encoding="utf-8")
    ran = together([str(tmp_path / "talk.py")])
    assert ran.returncode == 0, ran.stderr
    lines = sorted(json.loads(line) for line in ran.stdout.splitlines())
    for rank, line in enumerate(lines):
        found_rank, size, local_size, leads, heard, gathered, values = line
        assert (found_rank, size, local_size, leads) == (rank, 2, 2, rank == 0)
        assert heard[:2] == [{"from": 0, "word": "straße"}, {"from": 1, "word": "straße"}]
        assert gathered == [[0, None, 0.1], [1, None, 1.1]]
        assert values == [[1, 1, 1], [1, 1, 1]]
    assert lines[0][4][2] == [[1, 1], [1, 1], [1, 1]]


def test_what_one_process_does_is_refused_to_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    words = ["--task", "causal-lm", "--data", "x.jsonl", "--goal", "size <= 50%"]
    assert main(["optimize", str(tmp_path), *words, "--out", str(tmp_path / "out"), "--json"]) == 1
    said = capsys.readouterr()
    assert "error of process 1: `optimize` works in one process, 2 were started" in said.err
    assert not said.out  # the document is printed by the process that leads
    assert not (tmp_path / "out").exists()
