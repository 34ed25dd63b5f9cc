"""Trackers hold what they are told: read back from what each of them wrote, on this machine alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.errors import RunError
from gossamer.run.progress import Silent
from gossamer.run.tracking import TRACKERS, Values, tracked


def told(name: str, out: Path) -> None:
    """Tell one tracker of two trainings, one candidate, and a report."""
    page = out / "report.html"
    page.write_text("<p>PASS</p>")
    with tracked([name], out, Silent()) as progress:
        progress.settings({"goal": "size <= 30%", "task": "causal-lm"})
        for losses in ((3.0, 2.0), (5.0, 4.0)):
            for step, loss in enumerate(losses, start=1):
                progress.record("distill", step, {"loss": loss})
        progress.record("candidates", 1, {"quality": 0.99, "recipe": "int8"})
        progress.file(page)


def fail(name: str, out: Path) -> None:
    """Tell one tracker what was asked for, and fail."""
    with tracked([name], out, Silent()) as progress:
        progress.settings({"goal": "size <= 30%"})
        raise RunError("out of disk", "none")


def test_tensorboard_holds_curves_words_and_the_report(tmp_path: Path) -> None:
    told("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "tracking" / "tensorboard" / "gossamer").glob("events.*")
    found = EventAccumulator(str(events)).Reload()
    assert [(one.step, one.value) for one in found.Scalars("distill/loss")] == [(1, 3.0), (2, 2.0)]
    assert [(one.step, one.value) for one in found.Scalars("distill 2/loss")] == [(1, 5.0), (2, 4.0)]
    assert found.Scalars("candidates/quality")[0].value == pytest.approx(0.99)
    (words,) = found.Tensors("candidates/recipe/text_summary")
    assert words.tensor_proto.string_val == [b"int8"]
    assert (tmp_path / "tracking" / "tensorboard" / "report.html").read_text() == "<p>PASS</p>"


def test_mlflow_holds_curves_words_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told("mlflow", tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{(tmp_path / 'tracking' / 'mlflow' / 'mlflow.db').resolve()}")
    (experiment,) = client.search_experiments(filter_string="name = 'gossamer'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"goal": "size <= 30%", "task": "causal-lm"}
    history = client.get_metric_history(run.info.run_id, "distill/loss")
    assert [(one.step, one.value) for one in history] == [(1, 3.0), (2, 2.0)]
    assert run.data.metrics["distill 2/loss"] == 4.0
    assert run.data.tags["candidates/recipe 1"] == "int8"
    assert [one.path for one in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_mlflow_says_that_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RunError, match="out of disk"):
        fail("mlflow", tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{(tmp_path / 'tracking' / 'mlflow' / 'mlflow.db').resolve()}")
    (experiment,) = client.search_experiments(filter_string="name = 'gossamer'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params) == ("FAILED", {"goal": "size <= 30%"})


def test_wandb_holds_curves_words_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    told("wandb", tmp_path)
    (file,) = (tmp_path / "tracking" / "wandb").rglob("run-*.wandb")
    for _ in range(60):  # a process of its own writes it, and may be behind on a busy machine
        rows, settings = wandb_rows(file)
        if settings and any("candidates/recipe" in row for row in rows):
            break
        time.sleep(0.5)
    assert settings == {"goal": "size <= 30%", "task": "causal-lm"}
    curve = [(row["distill/step"], row["distill/loss"]) for row in rows if "distill/loss" in row]
    assert curve == [(1, 3.0), (2, 2.0)]
    again = [(row["distill 2/step"], row["distill 2/loss"]) for row in rows if "distill 2/loss" in row]
    assert again == [(1, 5.0), (2, 4.0)]
    (candidate,) = [row for row in rows if "candidates/recipe" in row]
    assert (candidate["candidates/quality"], candidate["candidates/recipe"]) == (0.99, "int8")


def test_wandb_says_that_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    with pytest.raises(RunError, match="out of disk"):
        fail("wandb", tmp_path)
    (file,) = (tmp_path / "tracking" / "wandb").rglob("run-*.wandb")
    codes: list[int] = []
    for _ in range(60):
        records = map(wandb_internal_pb2.Record.FromString, log_records(file.read_bytes()))
        codes = [record.exit.exit_code for record in records if record.HasField("exit")]
        if codes:
            break
        time.sleep(0.5)
    assert codes == [1]


def wandb_rows(file: Path) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Return the rows and the settings that an offline run of Weights & Biases holds."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, object]] = []
    settings: dict[str, object] = {}
    for content in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({name: json.loads(value) for name, value in items.items()})
        for update in (*record.config.update, *record.run.config.update):  # with the run itself, where it began late
            if not update.key.startswith("_"):
                settings[update.key] = json.loads(update.value_json)
    return rows, settings


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format (32 KiB blocks; crc, length, type), behind 7 bytes of head."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_an_unknown_tracker_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="no tracker is called 'tensorbord'"),
        tracked(["tensorbord"], tmp_path, Silent()),
    ):
        pass


def test_a_missing_package_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.run.tracking.find_spec", lambda name: None)
    with pytest.raises(RunError) as found, tracked(["mlflow"], tmp_path, Silent()):
        pass
    assert found.value.hint == 'pip install "gossamer[mlflow]"'


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="2 were started"), tracked(["tensorboard"], tmp_path, Silent()):
        pass


class Spoken(Silent):
    """Progress that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        """Keep one line."""
        self.said.append(message)


class Failing:
    """A tracker whose place is out of reach after so many numbers."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.told: list[str] = []

    def _reached(self, what: str) -> None:
        if not self.left:
            raise ConnectionError("no route to host")
        self.left -= 1
        self.told.append(what)

    def settings(self, values: Values) -> None:
        """Keep the settings."""
        self._reached("settings")

    def numbers(self, series: str, step: int, values: Values) -> None:
        """Keep numbers."""
        self._reached(f"{series} {step}")

    def file(self, path: Path) -> None:
        """Keep a file."""
        self._reached(path.name)

    def finish(self, *, failed: bool) -> None:
        """Close."""
        self._reached("failed" if failed else "finish")


def test_a_tracker_out_of_reach_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails, lasts, spoken = Failing(after=2), Failing(after=9), Spoken()
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda folder: fails)
    monkeypatch.setitem(TRACKERS, "mlflow", lambda folder: lasts)
    with tracked(["tensorboard", "mlflow"], tmp_path, spoken) as progress:
        progress.settings({"goal": "size <= 30%"})
        for step in (1, 2, 3):
            progress.record("distill", step, {"loss": 1.0})
    assert spoken.said == ["tensorboard is told nothing more: no route to host"]
    assert fails.told == ["settings", "distill 1"]
    assert lasts.told == ["settings", "distill 1", "distill 2", "distill 3", "finish"]


def test_what_a_run_raises_is_not_hidden_by_a_tracker_that_cannot_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasts = Failing(after=9)
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda folder: Failing(after=0))
    monkeypatch.setitem(TRACKERS, "mlflow", lambda folder: lasts)
    with pytest.raises(RunError, match="the run's own"), tracked(["tensorboard", "mlflow"], tmp_path, Silent()):
        raise RunError("the run's own", "none")
    assert lasts.told == ["failed"]


def test_a_tracker_that_cannot_be_opened_is_one_of_our_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://such")
    with pytest.raises(RunError, match="mlflow could not be opened") as found, tracked(["mlflow"], tmp_path, Silent()):
        pass
    assert "--track mlflow" in str(found.value.hint)


def test_a_folder_that_cannot_be_written_is_one_of_our_errors(tmp_path: Path) -> None:
    out = tmp_path / "build"
    out.write_text("a file")
    with pytest.raises(RunError, match="is in the way"), tracked(["tensorboard"], out, Silent()):
        pass


def test_two_runs_stand_side_by_side_in_one_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told("mlflow", tmp_path)
    told("mlflow", tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{(tmp_path / 'tracking' / 'mlflow' / 'mlflow.db').resolve()}")
    (experiment,) = client.search_experiments(filter_string="name = 'gossamer'")
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.status, run.data.metrics["distill/loss"]) for run in runs] == [("FINISHED", 2.0)] * 2
