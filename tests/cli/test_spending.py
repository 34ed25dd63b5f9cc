"""What carrying out a recipe takes, as it is printed: every number of the forecast, and modules that fare alike."""

from __future__ import annotations

import io

from gossamer.cli.console import Screen
from gossamer.cli.spending import show_forecast
from gossamer.plan.records import Covered, DiskUse, Forecast, Stage, Tried
from gossamer.plan.search import unknown_but_for

STAGES = (
    Stage(name="open", memory_bytes=1_000_000_000, seconds=2.0),
    Stage(name="solve", memory_bytes=2_500_000_000, seconds=190.0),
)
FOUND = Forecast(
    streamed=False, stages=STAGES, disk=(DiskUse(what="the artifact", bytes=80_000_000),), memory_bytes=2_500_000_000,
    memory_limit=8_000_000_000, disk_bytes=80_000_000, disk_free=3_000_000_000, seconds=192.0,
    coverage=(
        Covered(module="b.0.q", role="q", shape=(8, 8), num_parameters=64, done="gptq int4"),
        Covered(module="b.1.q", role="q", shape=(8, 8), num_parameters=64, done="gptq int4"),
        Covered(module="b.0.k", role="k", shape=(8, 8), num_parameters=64, done="", why="named under `ignore` of gptq"),
        Covered(module="norm", role="norm", shape=(8,), num_parameters=8, done="", why="nothing to gain"),
    ),
)  # fmt: skip


def printed(planned: Tried) -> list[str]:
    out = io.StringIO()
    show_forecast(Screen(out=out), planned)
    return out.getvalue().splitlines()


def planned(**more: object) -> Tried:
    fields = {"name": "gptq int4", "recipe": [], "predicted": unknown_but_for(80_000_000), "forecast": FOUND, **more}
    return Tried.model_validate(fields)


def test_every_stage_and_total_is_printed() -> None:
    lines = printed(planned())
    stage = next(line.split() for line in lines if line.startswith("solve"))
    assert stage == ["solve", "2.5", "GB", "3", "min", "10", "s"]
    totals = {line.split()[0]: line for line in lines if line.split()[:1] in (["memory"], ["disk"], ["time"])}
    assert "2.5 GB of 8 GB; the model is opened whole" in totals["memory"]
    assert "80 MB of 3 GB that are free: the artifact 80 MB" in totals["disk"]
    assert totals["time"].endswith("3 min 12 s")


def test_what_lies_on_a_gpu_has_a_column_and_a_total() -> None:
    assert not any("cuda" in line for line in printed(planned()))
    stages = (STAGES[0], STAGES[1].model_copy(update={"device_bytes": 1_500_000_000}))
    there = {"stages": stages, "device": "cuda:0", "device_bytes": 1_500_000_000, "device_limit": 20_000_000_000}
    lines = printed(planned(forecast=FOUND.model_copy(update=there)))
    assert any(line.split() == ["stage", "memory", "on", "cuda:0", "time"] for line in lines)
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("open", "solve"))}
    assert rows["solve"] == ["solve", "2.5", "GB", "1.5", "GB", "3", "min", "10", "s"]
    assert rows["open"][:3] == ["open", "1", "GB"]
    assert any(line.startswith("memory of cuda:0") and line.endswith("1.5 GB of 20 GB") for line in lines)


def test_modules_that_fare_alike_are_one_row() -> None:
    lines = printed(planned())
    rows = [line.split() for line in lines if line.split()[:1] in (["q"], ["k"], ["norm"])]
    assert [(row[0], row[1]) for row in rows] == [("q", "2"), ("k", "1"), ("norm", "1")]
    assert any("named under `ignore` of gptq" in line for line in lines)
    assert lines[-1] == "128 of 200 parameters are touched (64.0 %)"


def test_what_cannot_be_carried_out_is_said() -> None:
    why = "it needs about 9.0 GiB of memory (solve); 8.0 GiB may be used"
    assert f"cannot be carried out: {why}" in printed(planned(rejected=why))


def test_without_a_forecast_nothing_is_printed() -> None:
    assert printed(planned(forecast=None)) == []
