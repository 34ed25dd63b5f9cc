"""What each command prints and returns: for people, for programs, and to the shell.

Runs themselves are tested with the api and end to end; here their records, of the real types, are printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer import api
from gossamer.cli import main
from gossamer.plan.records import PlanResult, RunResult

GIVEN = ["optimize", "m", "--task", "text-classification", "--data", "d.csv", "--goal", "size <= 30%", "--quiet"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_run: Callable[..., RunResult]) -> dict[str, Any]:
    """Answer optimize, apply and plan with a ready record, and keep what they were called with."""
    seen: dict[str, Any] = {"verdict": "PASS"}

    def run(*given: Any, **options: Any) -> RunResult:
        seen.update(options, given=given)
        Path(options["out"]).mkdir(exist_ok=True)
        result = make_run(verdict=seen["verdict"])
        (Path(options["out"]) / "report.json").write_text(result.model_dump_json(), encoding="utf-8")
        return result

    def plan(*given: Any, **options: Any) -> PlanResult:
        seen.update(options, given=given)
        run = make_run()
        return PlanResult(goal=run.goal, goal_in_words=run.goal_in_words, original=run.original,
                          candidates=run.tried, notes=("latency is a prediction",))  # fmt: skip

    monkeypatch.setattr(api, "optimize", run)
    monkeypatch.setattr(api, "apply", run)
    monkeypatch.setattr(api, "plan", plan)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize(("verdict", "status"), [("PASS", 0), ("FAIL", 2), ("UNDECIDED", 2)])
def test_optimize_ends_with_verdict_evidence_and_status(
    calls: dict[str, Any],
    verdict: str,
    status: int,
    make_run: Callable[..., RunResult],
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls["verdict"] = verdict
    assert main(GIVEN) == status
    out, err = capsys.readouterr()
    run = make_run(verdict=verdict)
    assert err == ""
    assert out.splitlines()[0] == f"{verdict}  {run.reason}"
    assert run.chosen is not None
    for judged in run.tried[run.chosen].judgements:
        line = next(line for line in out.splitlines() if line.startswith(judged.constraint))
        assert line.endswith(judged.verdict)
    assert "build/artifact" in out
    assert "build/report.html" in out
    assert Path("build/report.html").stat().st_size > 10_000
    assert run.load_snippet.strip().splitlines()[-1] in out
    assert "\x1b" not in out
    assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_optimize_as_json_is_the_record_and_nothing_else(
    calls: dict[str, Any], make_run: Callable[..., RunResult], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GIVEN, "--json"]) == 0
    assert RunResult.model_validate(json.loads(capsys.readouterr().out)) == make_run()


def test_every_option_arrives(calls: dict[str, Any]) -> None:
    more = [
        *("--eval", "e.csv", "--runtime", "openvino", "--out", "here", "--fresh", "--max-candidates", "3", "--set"),
        *("max_length=64", "--column", "text=body", "--column", "label=y", "--seed", "7", "--threads", "2", "--time"),
        *("30min", "--calibration-rows", "32", "--eval-rows", "500", "--trust-remote-code", "--memory", "4GiB"),
        *("--track", "tensorboard, mlflow", "--device", "cpu"),
    ]
    assert main([*GIVEN, *more]) == 0
    progress = calls.pop("progress")
    assert progress is not None
    assert calls == {
        "verdict": "PASS", "given": ("m",), "task": "text-classification", "data": "d.csv", "goal": "size <= 30%",
        "evaluation": "e.csv", "runtime": "openvino", "out": Path("here"), "fresh": True, "max_candidates": 3,
        "task_settings": {"max_length": 64}, "columns": {"text": "body", "label": "y"}, "seed": 7, "threads": 2,
        "time_budget": 1800.0, "calibration_rows": 32, "evaluation_rows": 500, "trust_remote_code": True,
        "memory": 4 * 2**30, "track": ("tensorboard", "mlflow"), "device": "cpu",
    }  # fmt: skip


def test_apply_prints_one_recipes_result(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", "r.yaml", "m", "--out", "build", "--quiet"]) == 0
    assert calls["given"] == (Path("r.yaml"), "m")
    assert calls["runtime"] == "torch"
    assert capsys.readouterr().out.startswith("PASS")


def test_plan_lists_candidates_with_what_is_predicted(
    calls: dict[str, Any], make_run: Callable[..., RunResult], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *GIVEN[1:]]) == 0
    out = capsys.readouterr().out
    for one in make_run().tried:
        line = next(line for line in out.splitlines() if one.name in line)
        for predicted in ("131.0 MB", "48 s"):
            assert predicted in line
    assert "note: latency is a prediction" in out
    assert main(["plan", *GIVEN[1:], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["candidates"]) == 4


def test_report_writes_the_page_and_prints_its_path(
    tmp_path: Path, make_run: Callable[..., RunResult], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(make_run().model_dump_json(), encoding="utf-8")
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(page), "bytes": page.stat().st_size}


def test_doctor_names_what_is_missing_and_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for extra in found["extras"]:
        assert extra["package"] in out
        assert extra["version"] or extra["command"] in out


def test_inspect_shows_roles_and_totals_of_a_real_model(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_model), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["labels"] == ["ham", "spam"]
    assert main(["inspect", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    assert "text-classification" in out
    assert "ham, spam" in out
    for row in card["roles"]:
        line = next(line.split() for line in out.splitlines() if line.startswith(f"{row['role']} "))
        assert line[1] == str(row["num_layers"])


def test_names_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, make_run: Callable[..., RunResult]
) -> None:
    run = make_run()
    evil = run.tried[3].model_copy(update={"name": "\x1b[2Jgone [bold]x[/bold]"})
    result = run.model_copy(update={"tried": (*run.tried[:3], evil), "reason": "\x1b]0;title\x07"})
    monkeypatch.setattr(api, "optimize", lambda *given, **options: result)
    monkeypatch.setattr(api, "report", lambda out: Path("report.html"))
    assert main(GIVEN) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "gone [bold]x[/bold]" in out
