"""Cut models of every family, written as folders: a process that has only transformers computes what memory does."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gossamer.models.candidate import Candidate
from gossamer.models.example import made_up_example
from gossamer.models.source import Source
from gossamer.models.structure import map_model
from gossamer.run.progress import Silent
from gossamer.runtimes import get_runtime
from gossamer.runtimes.base import ExportRequest
from gossamer.tasks import get_task
from gossamer.techniques.base import Context
from gossamer.techniques.prune.prune import Prune

STRUCTURE = runpy.run_path(str(Path(__file__).parents[1] / "models/test_structure.py"))
FAMILIES = {build.__name__: build for build in STRUCTURE["FAMILIES"]}
FAMILIES.pop("t5")  # no task opens it: test_dimensions.py has its own class open it
MUST = {"llama-heads", "vit-heads", "gpt2-ffn", "whisper-ffn", "resnet-channels", "bert-layers"}
TASKS = {
    "bert": "text-classification", "distilbert": "text-classification", "vit": "image-classification",
    "resnet": "image-classification", "whisper": "speech-recognition",
}  # fmt: skip
FRESH = """
import json, sys
import numpy, torch, transformers
for name in sys.argv[1:]:
    config = json.load(open(f"{name}/config.json"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(name).eval()
    inputs = {key: torch.from_numpy(values) for key, values in numpy.load(f"{name}.npz").items()}
    with torch.no_grad():
        numpy.save(f"{name}.npy", model(**inputs).logits.numpy())
print("gossamer" in sys.modules)
"""


def logits(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = module(**inputs).logits
    assert isinstance(found, Tensor)
    return found


def cut(folder: Path, example: dict[str, Tensor], kind: str, task_name: str) -> Candidate | None:
    """Return the model of a folder with half of its units of a kind; None where no config can say that."""
    source, task = Source.open(folder), get_task(task_name)
    module = source.module(task)
    model = map_model(module, example)
    found = [one for one in model.dimensions if one.kind == kind]
    if not found or any(not one.attributes for one in found):
        return None
    arrays = {name: values.numpy() for name, values in example.items()}
    context = Context(task=task, example=arrays, calibration=[], progress=Silent())
    settings: dict[str, Any] = {"what": kind, "to": "50%", "by": "magnitude", "refit": False}
    if kind == "layers":
        kept = next(iter(found)).held
        settings = {"what": kind, "remove": [next(one for one in (1, 0) if one not in kept)]}
    return Prune.model_validate(settings).apply(Candidate(source=source, module=module), model, context)


@pytest.mark.slow
def test_a_fresh_process_opens_what_was_cut_of_every_family(tmp_path: Path) -> None:
    written: dict[str, Tensor] = {}
    for family, build in FAMILIES.items():
        torch.manual_seed(0)
        module = build().eval()
        module.save_pretrained(tmp_path / f"{family}-whole")  # type: ignore[operator]
        example = made_up_example(module)
        assert example is not None
        arrays = {name: values.numpy() for name, values in example.items()}
        for kind in ("ffn", "heads", "channels", "layers"):
            task_name = TASKS.get(family, "causal-lm")
            smaller = cut(tmp_path / f"{family}-whole", example, kind, task_name)
            if smaller is None:
                continue
            request = ExportRequest(
                task=get_task(task_name), example=arrays, axes={}, outputs=("logits",), cache=tmp_path / "cache"
            )
            folder = tmp_path / f"{family}-{kind}"
            folder.mkdir()
            get_runtime("torch").write(smaller, folder, request)
            np.savez(folder.with_suffix(".npz"), **arrays)
            with torch.no_grad():
                written[str(folder)] = logits(smaller.module, example)
    assert {Path(name).name for name in written} >= MUST
    command = [sys.executable, "-I", "-c", FRESH, *written]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert told.strip() == "False"
    for name, expected in written.items():
        torch.testing.assert_close(torch.from_numpy(np.load(f"{name}.npy")), expected, rtol=1e-4, atol=1e-5, msg=name)
        assert json.loads((Path(name) / "config.json").read_text())["architectures"]
