"""A changed calibration file, a shard cut in the middle of a tensor, a disk that fills up in the middle of a sweep.

Each is told with its numbers, corrupts nothing, and after repair the same command ends with the bytes of a run that
nothing had disturbed.
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.cli import main
from gossamer.measure.latency import time_in_turns
from gossamer.models.checkpoint import read_safetensors_header
from gossamer.run.fingerprint import files_below, hash_file
from gossamer.run.journal import read_journal
from gossamer.runtimes.manifest import CARD

RECIPE = "- gptq: {bits: 4, group_size: 16, targets: [q, k, v, o, up, down]}\n- quantize: {targets: [embedding]}\n"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time as always, in processes of their own, but for half a second instead of eight."""
    assert time_in_turns.__kwdefaults__ is not None
    monkeypatch.setitem(time_in_turns.__kwdefaults__, "budget_seconds", 0.5)
    monkeypatch.setitem(time_in_turns.__kwdefaults__, "round_seconds", 0.02)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny job of tests/plan (model/, train.jsonl, test.jsonl), its weights in two shards, and a recipe."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "plan" / "tiny_job.py"))
    folder: Path = script["write_job"](tmp_path_factory.mktemp("job"))
    weights = load_file(folder / "model" / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file_name, members in parts.items():
        save_file({name: weights[name] for name in members}, folder / "model" / file_name, {"format": "pt"})
    placed = {name: file_name for file_name, members in parts.items() for name in members}
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model" / "model.safetensors").unlink()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def words(job: Path, out: Path) -> list[str]:
    """Return the command: the recipe applied to the job's model, proven on its rows."""
    return [
        *("apply", str(job / "recipe.yaml"), str(job / "model"), "--task", "text-classification", "--runtime", "torch"),
        *("--data", str(job / "train.jsonl"), "--eval", str(job / "test.jsonl"), "--out", str(out), "--threads", "1"),
        *("--calibration-rows", "24", "--quiet"),
    ]


def bytes_of(out: Path) -> dict[str, str]:
    """Return the hash of every file of the artifact but the card, which tells latencies."""
    folder = out / "artifact"
    return {name: hash_file(folder / name) for name in files_below(folder) if name != CARD}


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give the bytes that a run leaves which nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "build"
    with pytest.MonkeyPatch.context() as patch:
        assert time_in_turns.__kwdefaults__ is not None
        patch.setitem(time_in_turns.__kwdefaults__, "budget_seconds", 0.5)
        assert main(words(tiny, out)) == 0
    return bytes_of(out)


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command says that ends with status 1, one error and a hint, and no traceback."""
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "bug of gossamer" not in said
    assert [line for line in said.splitlines() if line.startswith("error: ")]
    assert "\nhint: " in said
    return said


def whole(out: Path) -> bool:
    """Say whether every finished step of a run is as it was recorded."""
    for folder in (out / "steps").iterdir():
        recorded = json.loads((folder / "result.json").read_text())["files"]
        if {name: hash_file(folder / name) for name in files_below(folder) if name != "result.json"} != {
            name: described["sha256"] for name, described in recorded.items()
        }:
            return False
    return True


def started(out: Path) -> list[str]:
    return [entry["key"] for entry in read_journal(out / "journal.jsonl") if entry["event"] == "started"]


def test_a_changed_calibration_file_is_refused_and_the_old_one_goes_on(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job, out = tmp_path / "job", tmp_path / "build"
    shutil.copytree(tiny, job)
    assert main(words(job, out)) == 0
    before, rows = bytes_of(out), (job / "train.jsonl").read_text()
    (job / "train.jsonl").write_text(rows.replace("w1 ", "w2 "))
    said = refused(words(job, out), capsys)
    assert "data changed" in said
    assert "--fresh" in said
    assert (bytes_of(out), whole(out)) == (before, True)
    (job / "train.jsonl").write_text(rows)
    done = started(out)
    assert main(words(job, out)) == 0
    assert started(out) == done  # nothing was built again
    assert bytes_of(out) == undisturbed


def test_a_shard_that_is_cut_within_a_tensor_is_named_and_repair_goes_on(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job, out = tmp_path / "job", tmp_path / "build"
    shutil.copytree(tiny, job)
    shard = job / "model" / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    header = read_safetensors_header(shard)
    last = max(header.values(), key=lambda stored: stored.begin)
    cut = last.begin + last.num_bytes // 2
    for command in (words(job, out), ["plan", *words(job, out)[2:], "--recipe", str(job / "recipe.yaml")]):
        shard.write_bytes(content[:cut])
        said = refused(command, capsys)
        assert f"{shard} is truncated" in said
        assert str(cut) in said
        assert str(len(content)) in said
    assert not (out / "artifact").exists()
    shard.write_bytes(content)
    assert main(words(job, out)) == 0
    assert bytes_of(out) == undisturbed


CUT = """
import sys
from pathlib import Path
from gossamer.cli import main
from gossamer.techniques.quantize.calibrated import Gptq

shard, solve = Path(sys.argv[1]), Gptq.solve


def cut_then_solve(self, block):
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    solve(self, block)


Gptq.solve = cut_then_solve
sys.exit(main(sys.argv[2:]))
"""


def test_a_shard_that_is_cut_while_a_run_goes_on_spoils_nothing_that_was_finished(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job, out = tmp_path / "job", tmp_path / "build"
    shutil.copytree(tiny, job)
    shard = job / "model" / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    # in a process of its own: a file that is mapped into memory and becomes shorter may end its reader (SIGBUS)
    done = subprocess.run([sys.executable, "-c", CUT, str(shard), *words(job, out)], capture_output=True, check=False)
    assert done.returncode != 0
    assert not (out / "artifact").exists()
    assert "truncated" in refused(words(job, out), capsys)
    assert whole(out)
    shard.write_bytes(content)
    assert main(words(job, out)) == 0
    assert bytes_of(out) == undisturbed


def test_a_disk_that_fills_up_within_a_sweep_is_told_and_room_goes_on(
    tiny: Path,
    undisturbed: dict[str, str],
    mounted: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gossamer.techniques.quantize.calibrated import Gptq

    disk = mounted("size=64m")
    out, filler, solve = disk / "build", disk / "filler", Gptq.solve
    solved = 0

    def solve_then_fill(self: Gptq, block: object) -> None:
        nonlocal solved
        solve(self, block)  # type: ignore[arg-type]
        solved += 1
        if solved == 2:  # somebody else writes to this disk, behind the first block
            free = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(max(0, free - 16384)))

    with monkeypatch.context() as patch:
        patch.setattr(Gptq, "solve", solve_then_fill)
        said = refused(words(tiny, out), capsys)
    assert f"the disk of {out} is full" in said
    assert "finished steps are kept" in said
    assert not any((out / "scratch").iterdir())  # what was half-made is gone
    assert whole(out)
    blocks = [entry for entry in read_journal(out / "journal.jsonl") if entry["event"] == "finished"]
    assert [entry["kind"] for entry in blocks].count("block") == 1  # the first is kept, the second is not half there
    said = refused(words(tiny, out), capsys)  # still full: told before anything is tried again
    assert "free" in said
    filler.unlink()
    kept = set(started(out))
    assert main(words(tiny, out)) == 0
    assert bytes_of(out) == undisturbed
    finished = [entry["key"] for entry in blocks]
    assert not set(finished) & set(started(out)[len(kept) :])  # what was finished is not built again


def test_what_the_disk_can_never_hold_is_refused_before_the_sweep(
    tiny: Path, mounted: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = mounted("size=600k") / "build"
    said = refused(words(tiny, out), capsys)
    assert "needs about" in said
    assert "are free" in said
    kinds = {entry["kind"] for entry in read_journal(out / "journal.jsonl") if entry["event"] == "started"}
    assert "block" not in kinds
    assert "original" not in kinds


def test_weights_hold_what_they_held(tiny: Path) -> None:
    """Check the fixture: the two shards together are the model that the recipe is applied to."""
    held = {}
    for path in sorted((tiny / "model").glob("*.safetensors")):
        held |= load_file(path)
    assert len(held) > 30
    assert all(torch.isfinite(values).all() for values in held.values())
