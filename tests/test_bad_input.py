"""What a user can get wrong, through the real command line: status 1, what is wrong with its numbers, and the remedy.

One row a mistake; the rooms' own tests look closer.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gossamer.cli import main

GOAL = "quality >= 97%, size <= 60%"


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny job of tests/plan: model/, train.jsonl, test.jsonl."""
    script = runpy.run_path(str(Path(__file__).parent / "plan" / "tiny_job.py"))
    folder: Path = script["write_job"](tmp_path_factory.mktemp("job"))
    return folder


@dataclass
class Call:
    """Hold one command: what a test changes of a good `optimize` or `apply`, and where."""

    job: Path
    folder: Path  # empty, the test's own
    changed: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None

    def copied_model(self) -> Path:
        model = self.folder / "copied"
        shutil.copytree(self.job / "model", model)
        self.changed["model"] = str(model)
        return model

    def data(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.changed["--data"] = str(path)

    def rows(self, count: int) -> list[str]:
        return (self.job / "train.jsonl").read_text().splitlines()[:count]

    def words(self) -> list[str]:
        """Return the command line."""
        options = {
            "--task": "text-classification",
            "--data": str(self.job / "train.jsonl"),
            "--out": str(self.folder / "build"),
        } | {name: value for name, value in self.changed.items() if name.startswith("--")}
        model = self.changed.get("model", str(self.job / "model"))
        command = ["optimize", model]
        if self.recipe is not None:
            path = self.folder / "recipe.yaml"
            path.write_text(self.recipe)
            command = ["apply", str(path), model]
        else:
            options = {"--goal": GOAL, "--eval": str(self.job / "test.jsonl"), **options}
        return [*command, *(word for name, value in options.items() if value for word in (name, value))]


def missing_folder(call: Call) -> None:
    call.changed["model"] = str(call.folder / "nowhere")


def truncated_weights(call: Call) -> None:
    path = call.copied_model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:400_000])


def pickled_weights(call: Call) -> None:
    model = call.copied_model()
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def nan_weights(call: Call) -> None:
    path = call.copied_model() / "model.safetensors"
    weights = load_file(path)
    weights["classifier.weight"][1, 2:5] = float("nan")
    save_file(weights, path, {"format": "pt"})


def code_of_its_own(call: Call) -> None:
    model = call.copied_model()
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text("raise SystemExit('this code must not run')\n")


def unknown_task(call: Call) -> None:
    call.changed["--task"] = "text-clasification"


def unknown_label(call: Call) -> None:
    call.data("train.jsonl", "\n".join([*call.rows(20), '{"text": "w1 w2", "label": "angry"}']))


def empty_csv(call: Call) -> None:
    call.data("train.csv", "")


def header_without_rows(call: Call) -> None:
    call.data("train.csv", "text,label\n")


def missing_column(call: Call) -> None:
    call.data("train.csv", "first,second,label\n" + "w1 w2,w3,calm\n" * 20)


def named_column_missing(call: Call) -> None:
    call.changed["--column"] = "text=body"


def not_utf_8(call: Call) -> None:
    call.data("train.csv", b"text,label\n" + b"w1 w2,calm\n" * 3 + "na\u00efve,calm\n".encode("latin-1"))


def unknown_goal(call: Call) -> None:
    call.changed["--goal"] = "qualty >= 97%"


def contradictory_goal(call: Call) -> None:
    call.changed["--goal"] = "size <= 30%, size >= 40%"


def unknown_runtime(call: Call) -> None:
    call.changed["--runtime"] = "onnxruntimes"


def too_few_calibration_rows(call: Call) -> None:
    call.recipe = "- quantize: {activations: static}\n"
    call.changed |= {"--runtime": "onnxruntime", "--eval": str(call.job / "test.jsonl")}
    call.data("train.jsonl", "\n".join(call.rows(5)))


def group_that_does_not_divide(call: Call) -> None:
    call.recipe = "- quantize: {bits: 4, group_size: 48}\n"


def unknown_technique(call: Call) -> None:
    call.recipe = "- quantise: {bits: 4}\n"


def unknown_setting(call: Call) -> None:
    call.recipe = "- quantize: {bit: 4}\n"


def pattern_without_match(call: Call) -> None:
    call.recipe = "- quantize: {ignore: [lm_heat]}\n"


def rounded_twice(call: Call) -> None:
    call.recipe = "- quantize: {bits: 8}\n- quantize: {bits: 4, targets: [q]}\n"


def refused_by_runtime(call: Call) -> None:
    call.recipe = "- quantize: {activations: dynamic, activation_scope: token}\n"
    call.changed["--runtime"] = "onnxruntime"


def corrupt_image(call: Call) -> None:
    """Give a folder of images, one of them cut short, and a model for images."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    labels = {0: "dark", 1: "light"}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        id2label=labels, label2id={label: number for number, label in labels.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(call.folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(call.folder / "vit")
    for number, label in labels.items():
        (call.folder / "images" / label).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (16, 16), (20 * index, 100 * number, 0)).save(
                call.folder / "images" / label / f"{index}.png"
            )
    broken = call.folder / "images" / "light" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    images = str(call.folder / "images")
    call.changed |= {"model": str(call.folder / "vit"), "--data": images, "--eval": ""}
    call.changed["--task"] = "image-classification"


Change = Callable[[Call], None]
MISTAKES: list[tuple[Change, list[str]]] = [
    (missing_folder, ["nowhere"]),
    (truncated_weights, ["model.safetensors is truncated", "the file has 400000"]),
    (pickled_weights, ["pytorch_model.bin", "pickle"]),
    (nan_weights, ["classifier.weight", "3", "NaN"]),
    (code_of_its_own, ["--trust-remote-code"]),
    (unknown_task, ["text-clasification", "did you mean 'text-classification'"]),
    (unknown_label, ["21", "'angry'", "calm, loud, odd"]),
    (empty_csv, ["train.csv"]),
    (header_without_rows, ["train.csv"]),
    (missing_column, ["first", "second", "text", "--column"]),
    (named_column_missing, ["body", "text"]),
    (not_utf_8, ["train.csv", "line 5", "UTF-8"]),
    (corrupt_image, ["light", "3.png"]),
    (unknown_goal, ["qualty", "quality"]),
    (contradictory_goal, ["size"]),
    (unknown_runtime, ["onnxruntimes", "onnxruntime, openvino"]),
    (too_few_calibration_rows, ["8", "5", "--data"]),
    (group_that_does_not_divide, ["48", "64", "query", "group_size 32"]),
    (unknown_technique, ["quantise", "quantize"]),
    (unknown_setting, ["'bit'", "did you mean bits?"]),
    (pattern_without_match, ["lm_heat", "ignore"]),
    (rounded_twice, ["2 parameters are rounded by two steps", "query"]),
    (refused_by_runtime, ["query", "token"]),
]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command says on stderr when it ends with status 1, an error and a hint, and no traceback."""
    assert main([*words, "--quiet"]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "bug of gossamer" not in said.err
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "\nhint: " in said.err
    assert said.out == ""
    return said.err


@pytest.mark.parametrize(("change", "expected"), MISTAKES, ids=[change.__name__ for change, _ in MISTAKES])
def test_a_mistake_is_told_with_what_is_wrong_and_the_remedy(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, expected: list[str]
) -> None:
    call = Call(job, tmp_path)
    change(call)
    said = refusal(call.words(), capsys)
    assert [part for part in expected if part not in said] == [], said
    assert not (tmp_path / "build" / "artifact").exists()


def test_a_full_disk_is_told_with_its_numbers(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mounted: Callable[[str], Path]
) -> None:
    folder = mounted("size=128k")
    (folder / "filler").write_bytes(bytes(128 * 1024 - 4096))  # one page is left, for the run's first file
    said = refusal(Call(job, tmp_path, {"--out": str(folder / "build")}).words(), capsys)
    assert "disk" in said
    assert str(folder) in said
    assert [word for word in said.split() if word[0].isdigit()], said


def test_a_folder_that_cannot_be_written_is_named(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mounted: Callable[[str], Path]
) -> None:
    if os.geteuid() == 0:  # whom permissions do not stop
        folder = mounted("ro")
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    said = refusal(Call(job, tmp_path, {"--out": str(folder / "build")}).words(), capsys)
    assert str(folder / "build") in said
    assert "written" in said


def test_an_error_is_a_document_too(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = Call(job, tmp_path)
    unknown_runtime(call)
    assert main([*call.words(), "--json", "--quiet"]) == 1
    error: dict[str, Any] = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], "onnxruntimes" in error["message"]) == ("RuntimeUnavailable", True)
    assert "known runtimes" in error["hint"]


def test_a_process_of_its_own_ends_the_same_way(job: Path, tmp_path: Path) -> None:
    call = Call(job, tmp_path)
    missing_folder(call)
    done = subprocess.run(
        [sys.executable, "-m", "gossamer", *call.words()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: there is no folder" in done.stderr
    assert "Traceback" not in done.stderr
