"""What predictions start from: the original's time and the unchanged model's in the serving runtime, of one sitting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gossamer.measure.latency import LatencyPair, time_in_turns
from gossamer.plan import original
from gossamer.plan.original import describe_original, latency_record
from gossamer.plan.prepare import Inputs, opened_job, prepare
from gossamer.run.workspace import Run


@pytest.mark.timeout(120)  # exports, and starts two processes
def test_the_unchanged_model_is_timed_in_turns_with_the_original(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[LatencyPair] = []

    def noted(*args: Any, **settings: Any) -> LatencyPair:
        pairs.append(time_in_turns(*args, **settings))
        return pairs[-1]

    monkeypatch.setattr(original, "time_in_turns", noted)
    inputs = Inputs(
        model=tiny / "model", task="text-classification", data=tiny / "train.jsonl", evaluation=tiny / "test.jsonl",
        runtime="onnxruntime", threads=1, calibration_rows=8,
    )  # fmt: skip
    with Run(tmp_path / "run", {"verb": "test"}) as run, opened_job(inputs, prepare(inputs), run) as job:
        found, _ = describe_original(job)
        again, _ = describe_original(job)
    alone, together = pairs
    assert alone.b is None
    assert together.b is not None
    assert found.latency == latency_record(together.b)
    assert found.same_runtime_latency == latency_record(together.a)
    assert again == found  # what was measured is kept
