"""The options that several commands share, each declared once, and what reads the ones that have a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.errors import DataError, GoalError, GossamerError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder or hub id.", show_default=False)]
Artifact = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="Artifact of gossamer, or a Hugging Face folder.", show_default=False)
]
Task = Annotated[
    str,
    typer.Option(
        help="What the model is for: text-classification, causal-lm, image-classification, speech-recognition."
    ),
]
GuessedTask = Annotated[str | None, typer.Option("--task", help="What the model is for; guessed when it can be.")]
Data = Annotated[str, typer.Option(help="Rows to calibrate with: csv, tsv, jsonl, parquet, image folder, data set.")]
ProofData = Annotated[
    str, typer.Option("--data", help="Rows to score: csv, tsv, jsonl, parquet, image folder, data set.")
]
Evaluation = Annotated[
    str | None, typer.Option("--eval", help="Held-out rows that prove the quality; split off --data when not given.")
]
Goal = Annotated[str, typer.Option(help='What must hold: "quality >= 99%, size <= 30%, latency p95 <= 40ms".')]
PossibleGoal = Annotated[
    str | None, typer.Option("--goal", help='What must hold: "quality >= 99%, size <= 30%, latency p95 <= 40ms".')
]
Runtime = Annotated[str, typer.Option(help="What will serve the model: onnxruntime, openvino, torch, torchscript, ...")]
ChosenRuntime = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        help="What will serve the model: onnxruntime, openvino, torch, ...; default onnxruntime, torch where the "
        "memory cannot hold the model whole.",
    ),
]
GuessedRuntime = Annotated[str | None, typer.Option("--runtime", help="What serves it; default as its manifest says.")]
Out = Annotated[Path, typer.Option(help="Folder of the run: artifact, report, journal; the same command resumes it.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Throw away what the run folder holds and start again.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", metavar="ROLE=NAME", help="Name a column that was not recognised.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a task setting, as in max_length=64.")
]
CalibrationRows = Annotated[int, typer.Option(min=1, help="Rows to calibrate with.")]
EvaluationRows = Annotated[int | None, typer.Option("--eval-rows", min=1, help="Rows to prove with; default all.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; default all cores.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn by chance.")]
MaxCandidates = Annotated[int, typer.Option(min=1, help="Most candidates to build and measure.")]
Time = Annotated[str | None, typer.Option("--time", metavar="DURATION", help="Budget of the run: 90s, 30min, 2h.")]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory that the run may take: 12GiB; a larger model is read piece by piece."),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda", help="Where calibration and training compute; auto takes a GPU if there is one."
    ),
]
Track = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Trackers to tell, as in tensorboard,wandb,mlflow; none by default."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tracebacks, and what other libraries say.")]


class OptionError(GossamerError):
    """An option of the command line cannot be read."""


def read_columns(pairs: Sequence[str] | None) -> dict[str, str]:
    """Read `--column text=body` into {"text": "body"}; raises DataError naming the pair that has no `=`."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        role, equals, name = pair.partition("=")
        if not (equals and role.strip() and name):
            raise DataError(f"--column {pair!r} is not ROLE=NAME", "write for example --column text=body")
        if role.strip() in found:
            raise DataError(f"--column {role.strip()} is given twice", "keep one")
        found[role.strip()] = name
    return found


def read_names(text: str | None) -> tuple[str, ...]:
    """Read `--track tensorboard,mlflow` into its names."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def read_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read `--set max_length=64` into {"max_length": 64}: a value that is JSON has its type, any other is text."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (equals and key.strip() and value):
            raise OptionError(f"--set {pair!r} is not KEY=VALUE", "write for example --set max_length=64")
        if key.strip() in found:
            raise OptionError(f"--set {key.strip()} is given twice", "keep one")
        found[key.strip()] = _typed(value)
    return found


def check_goal(text: str) -> None:
    """Read a goal for its mistakes alone, which are so told before torch is imported; raises GoalError."""
    from gossamer.goal import parse_goal

    parse_goal(text)


def read_time(text: str | None) -> float | None:
    """Read `30min` into seconds, in the units of a goal's `time`; raises GoalError saying which there are."""
    if text is None:
        return None
    from gossamer.goal import parse_goal

    goal = parse_goal(f"time <= {text}")
    if len(goal.constraints) != 1 or goal.objective is not None:
        raise GoalError(f"--time {text!r} is not one duration", "write for example --time 30min")
    return goal.constraints[0].bound


def read_memory(text: str | None) -> int | None:
    """Read `12GiB` into bytes, in the units of a goal's `memory`; raises GoalError saying which there are."""
    if text is None:
        return None
    from gossamer.goal import parse_goal

    goal = parse_goal(f"memory <= {text}")
    if len(goal.constraints) != 1 or goal.objective is not None or goal.constraints[0].unit == "%":
        raise GoalError(f"--memory {text!r} is not one size", "write for example --memory 12GiB")
    return int(goal.constraints[0].bound)


def _typed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
