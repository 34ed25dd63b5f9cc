from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gossamer.errors import MeasureError
from gossamer.measure.latency import time_in_turns
from gossamer.runtimes.process import Served, child_environment

RUNTIME = "linear_runtime:LinearRuntime"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact")
    weight = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    save_file({"weight": weight}, path / "model.safetensors")
    return path


@pytest.fixture(scope="module", autouse=True)
def import_path() -> Iterator[None]:
    """The child imports what its parent can import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def served(folder: Path, import_path: None) -> Iterator[Served]:
    with Served(RUNTIME, folder, threads=1, cpus=[min(os.sched_getaffinity(0))], timeout=60) as opened:
        yield opened


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status


def test_outputs_equal_those_of_this_process(served: Served, folder: Path) -> None:
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    outputs = served.run({"x": x})
    expected = x @ load_file(folder / "model.safetensors")["weight"].T
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-6)
    assert outputs["threads"].tolist() == [1, 1]
    assert outputs["cpus"].tolist() == [min(os.sched_getaffinity(0))]
    assert outputs["offline"].tolist() == [1]
    assert outputs["torch"].tolist() == [False]  # the child holds what its runtime needs, so that its memory is its own


def test_not_contiguous_inputs_arrive_whole(served: Served) -> None:
    x = np.arange(20, dtype=np.float32).reshape(5, 4).T
    outputs = served.run({"x": x})
    np.testing.assert_array_equal(outputs["logits"], served.run({"x": np.ascontiguousarray(x)})["logits"])


def test_kept_artifacts_answer_again_without_being_read(folder: Path, tmp_path: Path) -> None:
    other, x = tmp_path / "other", np.ones((1, 5), dtype=np.float32)
    other.mkdir()
    save_file({"weight": np.full((3, 5), 2, dtype=np.float32)}, other / "model.safetensors")
    with Served(RUNTIME, folder, threads=1, timeout=60) as fresh:
        for _ in range(2):
            fresh.reopen(other, keep=True)
            assert fresh.run({"x": x})["logits"].tolist() == [[10, 10, 10]]
            (other / "model.safetensors").unlink(missing_ok=True)
            fresh.reopen(folder, keep=True)
        with pytest.raises(MeasureError):
            fresh.reopen(other)


def test_large_inputs_pass_the_pipe_both_ways(served: Served) -> None:
    x = np.ones((200_000, 5), dtype=np.float32)
    assert served.run({"x": x})["logits"].shape == (200_000, 3)


def test_times_what_runs(served: Served) -> None:
    seconds = served.time({"x": np.zeros((1, 5), np.float32), "sleep": np.array(0.02)}, 3)
    assert len(seconds) == 3
    assert min(seconds) >= 0.02
    again = served.time({"x": np.zeros((1, 5), np.float32), "sleep": np.array(0.02)}, 2, warmup=0)
    assert len(again) == 2
    assert min(again) >= 0.02  # the inputs that the child kept
    assert min(served.time({"x": np.zeros((1, 5), np.float32), "sleep": np.array(0.0)}, 2)) < min(again)


def test_an_exception_keeps_the_child(served: Served) -> None:
    with pytest.raises(MeasureError, match="ValueError: matmul"):
        served.run({"x": np.zeros((1, 7), np.float32)})
    assert served.run({"x": np.zeros((1, 5), np.float32)})["logits"].shape == (1, 3)


def test_a_paused_child_is_stopped_and_wakes_when_asked(served: Served) -> None:
    served.pause()
    deadline = time.monotonic() + 2
    while "State:\tT" not in (status := Path(f"/proc/{served.pid}/status").read_text()):
        assert time.monotonic() < deadline, status
    served.run({"x": np.zeros((1, 5), np.float32)})
    assert not served.paused


def test_memory_sees_what_a_run_allocates(folder: Path) -> None:
    with Served(RUNTIME, folder, threads=1, timeout=60) as fresh:
        before = fresh.memory()
        fresh.run({"allocate": np.array(100_000_000)})
        after = fresh.memory()
    assert 0 < before.baseline <= before.after_open
    grown = after.peak_run - before.peak_run
    if before.resettable:
        assert 90e6 < grown < 130e6
    assert after.peak >= before.peak + (0 if before.peak_open > after.peak_run else 50e6)


def test_two_children_take_turns(folder: Path, served: Served) -> None:
    with Served(RUNTIME, folder, threads=1, timeout=60) as slow:
        inputs = [{"x": np.zeros((1, 5), np.float32), "sleep": np.array(seconds)} for seconds in (0.02, 0.005)]
        pair = time_in_turns(slow, served, *inputs, budget_seconds=0.5, round_seconds=0.05, min_rounds=4)
        assert not slow.paused
        assert not served.paused
    assert pair.b is not None
    assert pair.ratio is not None
    assert pair.a.min >= 0.02 > 0.005 <= pair.b.min
    assert pair.a.n >= 4 <= pair.b.n
    assert pair.ratio.value > 1


@pytest.mark.slow  # imports transformers twice
def test_serves_a_real_model_through_the_torch_runtime(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    inputs = {name: np.ones((2, 6), np.int64) * value for name, value in (("input_ids", 7), ("attention_mask", 1))}
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    with Served(
        "torch", tmp_path, threads=1, task_name="text-classification", task_settings={"max_length": 6}
    ) as child:
        found = child.run(inputs)
        memory = child.memory()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4 * expected.std())
    assert memory.after_open > memory.baseline
    assert memory.peak >= memory.after_open


def test_an_unknown_runtime_or_setting_is_told_with_its_hint(folder: Path) -> None:
    with pytest.raises(MeasureError, match="tensorrt") as caught:
        Served("tensorrt", folder, threads=1)
    assert "torch" in caught.value.hint


def test_our_errors_arrive_with_their_hint(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match=r"no model\.safetensors in") as caught:
        Served(RUNTIME, tmp_path, threads=1, timeout=60)
    assert caught.value.hint == "write the artifact first"


def test_a_crash_is_told_with_what_the_child_said(folder: Path) -> None:
    served = Served(RUNTIME, folder, threads=1, timeout=60)
    with pytest.raises(MeasureError, match=r"killed by SIGABRT(.|\n)*about to crash"):
        served.run({"crash": np.array(1)})
    assert not alive(served.pid)
    with pytest.raises(MeasureError, match="already closed"):
        served.run({"x": np.zeros((1, 5), np.float32)})


def test_a_hang_ends_at_the_timeout(folder: Path) -> None:
    served = Served(RUNTIME, folder, threads=1, timeout=60)
    served.timeout = 0.3
    with pytest.raises(MeasureError, match=r"no answer to `run` within 0\.3 s"):
        served.run({"x": np.zeros((1, 5), np.float32), "sleep": np.array(30.0)})
    assert not alive(served.pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_the_child_dies_with_its_parent_even_while_paused(folder: Path, how: signal.Signals) -> None:
    script = (
        "import sys, time, pathlib\nfrom gossamer.runtimes.process import Served\n"
        f"served = Served({RUNTIME!r}, pathlib.Path({str(folder)!r}), threads=1)\n"
        "served.pause()\nprint(served.pid, flush=True)\ntime.sleep(60)\n"
    )
    environment = child_environment(os.environ, 1)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.send_signal(how)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline, f"child {pid} outlived its parent"
        time.sleep(0.02)
