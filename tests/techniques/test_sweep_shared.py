"""Several processes: sums do not depend on their number, and two real ones give the bytes of one, killed or not."""

from __future__ import annotations

import json
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gossamer.models.roles import LayerInfo
from gossamer.run.fingerprint import hash_file
from gossamer.run.journal import read_journal
from gossamer.run.team import ALONE, Team
from gossamer.techniques import routing
from gossamer.techniques.base import Decision
from gossamer.techniques.quantize.moments import Moments
from gossamer.techniques.sweep_shared import NUM_CHUNKS, owners_of, share_of, summed

SCRIPT = Path(__file__).parent / "shared_sweep.py"
together: Callable[..., subprocess.CompletedProcess[str]] = runpy.run_path(
    str(Path(__file__).parents[1] / "run" / "test_team.py")
)["together"]


@pytest.mark.parametrize("num_samples", [1, 4, 8, 9, 21, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
def test_every_sample_has_one_process_and_every_chunk_the_same_samples(num_samples: int, size: int) -> None:
    shares = [share_of(num_samples, Team(rank, size, size)) for rank in range(size)]
    assert sorted(number for share in shares for number in share.numbers) == list(range(num_samples))
    assert len({len(share.rounds) for share in shares}) == 1  # all meet in every round
    chunks = {c: [share.numbers[p] for p in places] for share in shares for c, places in share.rounds if places}
    (alone,) = [share_of(num_samples, ALONE)]
    assert chunks == {c: [alone.numbers[p] for p in places] for c, places in alone.rounds if places}
    order = [shares[turn % size].rounds[turn // size][0] for turn in range(len(shares[0].rounds) * size)]
    assert order[:NUM_CHUNKS] == list(range(NUM_CHUNKS))
    assert [share.first(4) for share in shares] == [sum(n < 4 for n in share.numbers) for share in shares]


def test_sums_of_chunks_are_the_moments_of_all_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randn(5, 3, generator=draw) for _ in range(21)]

    def observe_part(places: range) -> dict[str, Moments]:
        q, other = Moments.empty(3), Moments.empty(3)
        for place in places:
            q.add(samples[place])
            other.add(2 * samples[place])
        # the first samples never reach `expert`; later ones reach it with the tensor that `other` reads
        return {"q": q, "k": q, "other": other} | ({"expert": other} if places.start > 5 else {})

    found = summed(ALONE, share_of(21, ALONE), observe_part, dict.fromkeys(("q", "k", "other", "expert"), 0))
    rows = torch.cat(samples).double()
    assert found["q"] is found["k"]
    assert found["q"].num_tokens == 105
    torch.testing.assert_close(found["q"].second_II.double(), rows.t() @ rows / 105)
    torch.testing.assert_close(found["q"].mean_I.double(), rows.mean(0))
    torch.testing.assert_close(found["q"].mean_abs_I.double(), rows.abs().mean(0))
    assert torch.equal(found["q"].max_abs_I.double(), rows.abs().amax(0))
    torch.testing.assert_close(found["other"].second_II.double(), 4 * rows.t() @ rows / 105)
    late = 2 * rows[30:]
    assert found["expert"].num_tokens == 75
    torch.testing.assert_close(found["expert"].second_II.double(), late.t() @ late / 75)


def test_the_dearest_layers_are_shared_out_first() -> None:
    shapes = {"q": (64, 64), "k": (32, 64), "down": (64, 256), "up": (256, 64), "head": (512, 64)}
    decisions = [
        Decision(name, LayerInfo(name=name, kind="linear", role="linear", shape=shape, num_parameters=0))
        for name, shape in shapes.items()
    ]
    owners = owners_of(decisions, Team(0, 2, 2), split=True)
    assert owners["down"] == 0
    assert {owners[name] for name in ("up", "head", "q", "k")} == {1}
    assert set(owners_of(decisions, Team(1, 2, 2), split=False).values()) == {0}


@pytest.mark.timeout(900)  # four times Python starts, on a machine that may be busy
def test_two_processes_give_the_bytes_of_one_also_when_one_dies_on_the_way(tmp_path: Path) -> None:
    for name in ("alone", "two", "again", "three"):
        (tmp_path / name).mkdir()
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "alone")
    wanted = hash_file(tmp_path / "alone" / "found-0.safetensors")
    ran = together([str(SCRIPT), str(tmp_path / "two")])
    assert ran.returncode == 0, ran.stderr
    assert {hash_file(path) for path in (tmp_path / "two").glob("found-*")} == {wanted}
    assert len(list((tmp_path / "two").glob("found-*"))) == 2
    assert blocks(tmp_path / "two") == blocks(tmp_path / "alone")
    assert not list((tmp_path / "two" / "run" / "steps").glob("stream-*"))

    assert together([str(SCRIPT), str(tmp_path / "again"), "fail"]).returncode != 0
    solved = len(blocks(tmp_path / "again"))
    assert solved == 2  # the one that failed took the other with it
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "again")  # any number of processes goes on
    assert hash_file(tmp_path / "again" / "found-0.safetensors") == wanted
    done = [entry["key"] for entry in read_journal(tmp_path / "again" / "run" / "journal.jsonl")
            if entry["event"] == "finished"]  # fmt: skip
    assert len(done) == len(set(done))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_tell_what_each_expert_saw_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "TOKENS_PER_INPUT", routing.TOKENS_PER_INPUT)  # the script sets another here too
    for name in ("alone", "two"):
        (tmp_path / name).mkdir()
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "alone", "experts")
    wanted = json.loads((tmp_path / "alone" / "routed-0.json").read_text())
    assert [sum(told["tokens"]) for told in wanted.values()] == [21 * 12 * 2] * 2
    starved = sum(len(told["starved"]) for told in wanted.values())
    assert 0 < starved < 2 * 4 * 3
    ran = together([str(SCRIPT), str(tmp_path / "two"), "experts"])
    assert ran.returncode == 0, ran.stderr
    for rank in range(2):
        assert json.loads((tmp_path / "two" / f"routed-{rank}.json").read_text()) == wanted
    hashes = {hash_file(path) for path in (tmp_path / "two").glob("found-*")}
    assert hashes == {hash_file(tmp_path / "alone" / "found-0.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_on_gpus_give_the_bytes_of_one(tmp_path: Path) -> None:
    for name in ("alone", "two"):
        (tmp_path / name).mkdir()
    runpy.run_path(str(SCRIPT))["main"](tmp_path / "alone", "gpu")
    ran = together([str(SCRIPT), str(tmp_path / "two"), "gpu"])
    assert ran.returncode == 0, ran.stderr
    hashes = {hash_file(path) for path in (tmp_path / "two").glob("found-*")}
    assert hashes == {hash_file(tmp_path / "alone" / "found-0.safetensors")}


def blocks(folder: Path) -> dict[str, str]:
    """Return the hashes of the codes that a run holds."""
    return {path.parent.name: hash_file(path) for path in (folder / "run" / "steps").glob("block-*/codes.safetensors")}
