"""A model that does not fit: read piece by piece it gives the same files, is proven, and peak memory stays flat."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gossamer.errors import GoalError, RuntimeUnavailable, TechniqueError
from gossamer.goal import parse_goal
from gossamer.measure.memory import resident_bytes
from gossamer.models.source import Source
from gossamer.plan import budget
from gossamer.plan.budget import weights_budget
from gossamer.plan.flow import apply_run, optimize_run
from gossamer.plan.job import Job
from gossamer.plan.prepare import Inputs, Prepared, opened_job, prepare
from gossamer.plan.proof import apply_steps
from gossamer.plan.records import RunResult
from gossamer.report.html import write_report
from gossamer.run.workspace import Run
from gossamer.runtimes import get_runtime
from gossamer.techniques.quantize.calibrated import Gptq
from gossamer.techniques.quantize.quantize import Quantize
from gossamer.techniques.registry import recipe_of

TEXTS = ["the grid holds every weight of a group", "a code is the nearest one on the grid", "what was proven is served"]
ROWS = [{"text": f"{number}: {text}, and {text} again"} for number in range(12) for text in TEXTS]


STEPS = (Gptq(bits=4, group_size=32), Quantize(targets=("embedding",)))


def inputs_of(speaker: Path) -> Inputs:
    settings = {"context": 48}
    return Inputs(model=speaker, task="causal-lm", data=ROWS, runtime="torch", task_settings=settings, threads=1,
                  calibration_rows=16)  # fmt: skip


def applied(speaker: Path, out: Path, goal: str) -> RunResult:
    return apply_run(inputs_of(speaker), recipe_of(STEPS), parse_goal(goal), out, fresh=False)


@pytest.mark.timeout(180)  # three processes are started, one after another
def test_the_files_are_those_of_a_model_opened_whole(
    speaker: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    inputs = inputs_of(speaker)
    prepared = prepare(inputs)
    (tmp_path / "whole").mkdir()
    with Run(tmp_path / "run", {"verb": "test"}) as run, opened_job(inputs, prepared, run) as job:
        assert job.budget is None
        candidate, _ = apply_steps(job, STEPS)
        job.runtime.write(candidate, tmp_path / "whole", job.request())
        in_memory = list(job.computed(candidate, [batch.inputs for batch in job.evaluation]))
    request.getfixturevalue("tight")
    found = applied(speaker, tmp_path / "pieces", "quality >= 20%, size <= 90%")
    assert found.verdict == "PASS", found.reason
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / "artifact" / name).read_bytes()
    held = load_file(tmp_path / "whole" / "model.safetensors")
    assert held["model.norm.weight"].dtype == torch.bfloat16  # what was not rounded is as it was
    measured = found.tried[0].measured
    assert measured is not None
    assert measured.equivalence.passed
    assert not measured.latency.known
    assert not {"latency p50", "memory", "throughput"} & measured.figures.keys()
    with opened_again(inputs, prepared, tmp_path / "again") as job:
        reference = job.evaluate(job.candidate(), job.evaluation)
        whole = job.task.evaluate(lambda _: in_memory, job.evaluation, reference)
    assert whole.divergence is not None
    assert measured.figures["kl"].value == pytest.approx(whole.divergence.mean(), rel=1e-3)
    page = write_report(tmp_path / "pieces").read_text()
    assert "PASS" in page
    assert ">nan" not in page


@contextmanager
def opened_again(inputs: Inputs, prepared: Prepared, out: Path) -> Iterator[Job]:
    with Run(out, {"verb": "test"}) as run, opened_job(inputs, prepared, run) as job:
        assert job.budget is not None
        yield job


@pytest.mark.usefixtures("tight")
def test_what_cannot_be_measured_cannot_be_asked_for(speaker: Path, tmp_path: Path) -> None:
    with pytest.raises(GoalError, match=r"`latency <= 50%` cannot be measured: .* is read piece by piece"):
        applied(speaker, tmp_path, "latency <= 50%")


@pytest.mark.usefixtures("tight")
def test_a_step_that_does_not_fit_is_refused_before_anything_is_spent(speaker: Path, tmp_path: Path) -> None:
    small = replace(inputs_of(speaker), memory=resident_bytes() // 2)
    with pytest.raises(
        TechniqueError, match=r"gptq int4 .* needs about \d\.\d GiB for speaker.*; \d\.\d GiB may be used"
    ):
        apply_run(small, recipe_of(STEPS), None, tmp_path, fresh=False)
    assert not list((tmp_path / "steps").glob("*"))


@pytest.mark.timeout(240)  # every recipe that is tried starts two processes
@pytest.mark.usefixtures("tight")
def test_a_goal_of_bytes_is_met_without_opening_the_model(speaker: Path, tmp_path: Path) -> None:
    goal = parse_goal("quality >= 30%, size <= 80%")
    found = optimize_run(
        inputs_of(speaker), goal, tmp_path, fresh=False, max_candidates=2, time_budget_seconds=None
    )  # fmt: skip
    assert found.verdict == "PASS", found.reason
    assert not found.original.latency.known
    assert found.original.metric is not None


def test_memory_decides_how_a_model_is_opened(speaker: Path) -> None:
    source = Source.open(speaker)
    assert weights_budget(source, get_runtime("torch"), None) is None
    assert weights_budget(source, get_runtime("torch"), resident_bytes() + (1 << 30)) is None
    assert weights_budget(source, get_runtime("torch"), resident_bytes()) == budget.LEAST_BUDGET
    with pytest.raises(RuntimeUnavailable, match=r"to be opened whole, as onnxruntime does; 0\.\d GiB may be used"):
        weights_budget(source, get_runtime("onnxruntime"), resident_bytes() // 2)


FLAT = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from gossamer.measure.memory import peak_bytes, release_unused, reset_peak
from gossamer.models.candidate import Candidate
from gossamer.models.source import Source
from gossamer.models.walker import Walker
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.torch_folder import TorchFolder
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.tasks import get_task
from gossamer.techniques.base import Context
from gossamer.techniques.quantize.quantize import Quantize
torch.set_num_threads(1)
task = get_task("causal-lm")
for blocks in (4, 4, 16, 64):  # the first time is for what is allocated once
    folder = Path(sys.argv[1]) / str(blocks)
    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=768, num_hidden_layers=blocks,
                         num_attention_heads=4, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    size = sum(p.nbytes for p in model.parameters())
    del model
    release_unused()
    if not reset_peak():
        sys.exit(77)
    before = peak_bytes()
    source = Source.open(folder)
    candidate = Candidate.streamed(source, source.skeleton(task), source.shards.read, 4 << 20)
    ids = torch.arange(32)[None] % 64
    found = map_model(candidate.module, {"input_ids": ids}, source.forward, candidate.held)
    context = Context(task=task, example={}, calibration=[], progress=Silent())
    Quantize(bits=4, group_size=64, scale="minmax").apply(candidate, found, context)
    walker = Walker(candidate.module, source.forward, [{"input_ids": ids}] * 2)
    with torch.no_grad():
        assert len(list(walker.outputs(found.stacks, candidate.weights.held))) == 2
    (folder / "out").mkdir(exist_ok=True)
    request = ExportRequest(task=task, example={}, axes={}, outputs=("logits",), cache=folder)
    TorchFolder().write(candidate, folder / "out", request)
    print(blocks, size, peak_bytes() - before)
"""


@pytest.mark.timeout(180)  # it writes and reads models of up to 200 MB
def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", FLAT, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    if found.returncode == 77:
        pytest.skip("this system does not let a process reset its peak memory")
    assert found.returncode == 0, found.stderr
    lines = [list(map(int, line.split())) for line in found.stdout.splitlines()][1:]
    (_, small, least), (_, _, middle), (_, large, most) = lines
    assert large - small > 150 << 20  # what a model in memory would have added
    assert max(middle, most) < least + (24 << 20)
