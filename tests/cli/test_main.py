"""The command line's manners: a fast start, our words for every error, and the exit status that was promised."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gossamer import api
from gossamer.cli import main
from gossamer.cli.main import interrupted
from gossamer.errors import ModelError

GIVEN = ["optimize", "m", "--task", "text-classification", "--data", "d.csv", "--goal", "size <= 30%"]


def test_help_imports_none_of_the_heavy_libraries() -> None:
    code = """
import sys, gossamer.cli
assert gossamer.cli.main(["--help"]) == 0
assert gossamer.cli.main(["optimize", "--help"]) == 0
heavy = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "scipy", "datasets", "jinja2", "yaml"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("optimize", "plan", "apply", "inspect", "eval", "bench", "compare", "report", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_doctor_and_report_answer_without_torch(tmp_path: Path) -> None:
    code = f"""
import sys, gossamer.cli
assert gossamer.cli.main(["doctor", "--json"]) == 0
assert gossamer.cli.main(["report", {str(tmp_path)!r}]) == 1
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stamp"]["cores"] >= 1


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "gossamer", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nonsense" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "nonsense"),
        (["optimize", "model"], "--task"),
        ([*GIVEN, "--threads", "0"], "--threads"),
        ([*GIVEN, "--column", "text"], "--column 'text' is not ROLE=NAME"),
        ([*GIVEN, "--set", "max_length"], "--set 'max_length' is not KEY=VALUE"),
        ([*GIVEN, "--time", "soon"], "soon"),
        ([*GIVEN[:-1], "speed <= 3"], "unknown quantity 'speed'"),
        ([*GIVEN, "--time", "1h, size <= 2MB"], "is not one duration"),
    ],
)
def test_mistakes_are_errors_with_status_1_and_a_hint(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert "hint: " in err
    assert "Traceback" not in err


def test_an_error_under_json_is_one_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["report", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["type"] == "RunError"
    assert error["message"] in err
    assert error["hint"] in err


def test_a_missing_model_is_our_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err
    assert "nowhere" in err
    assert "Traceback" not in err


def test_a_bug_is_called_one_and_v_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(api, "inspect", broken)
    assert main(["inspect", "m"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: by zero" in err
    assert "bug" in err
    assert "Traceback" not in err
    assert main(["inspect", "m", "-v"]) == 1
    assert "in broken" in capsys.readouterr().err


def test_our_errors_show_their_origin_only_with_v(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(*_: Any, **__: Any) -> None:
        raise ModelError("model.safetensors ends after 12 of 90 bytes", "download it again")

    monkeypatch.setattr(api, "inspect", damaged)
    assert main(["inspect", "m"]) == 1
    assert capsys.readouterr().err == "error: model.safetensors ends after 12 of 90 bytes\nhint: download it again\n"
    assert main(["inspect", "m", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on_and_returns_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "optimize", stopped)
    assert main([*GIVEN, "--fresh", "--quiet"]) == 130
    said = capsys.readouterr().err.strip().splitlines()
    assert shlex.split(said[-1]) == ["gossamer", *GIVEN, "--quiet"]  # --fresh would throw away what is done
    assert "to go on" in said[-2].lower()


def test_what_keeps_nothing_does_not_promise_to_resume() -> None:
    assert interrupted(["bench", "x"]) == "interrupted"


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="signals of this kind are POSIX's")
def test_ctrl_c_in_a_real_process_ends_with_130() -> None:
    code = """
import sys, time, types
import gossamer
from gossamer.cli import main
api = gossamer.api = sys.modules["gossamer.api"] = types.ModuleType("gossamer.api")  # torch has no part in this
def slow(*args, progress, **more):
    with progress.stage("measuring", 10) as advance:
        print("ready", flush=True)
        time.sleep(60)
api.optimize = slow
sys.exit(main(sys.argv[1:]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *GIVEN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("measuring ...\n")
    assert "run the same command again" in err
    assert "Traceback" not in err
