from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

from gossamer.errors import ArtifactError
from gossamer.models.source import Source
from gossamer.runtimes.manifest import (
    CARD,
    MANIFEST,
    Manifest,
    artifact_files,
    check_files,
    copy_companions,
    read_manifest,
    write_manifest,
)

FIELDS: dict[str, Any] = {
    "runtime": "onnxruntime", "task": "text-classification", "task_settings": {"max_length": 64},
    "recipe": [{"quantize": {"bits": 4}}], "model": "my-bert", "model_fingerprint": "a" * 64,
    "calibration_fingerprint": None, "seed": 3, "versions": {"torch": "2.13.0"},
}  # fmt: skip


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"weights")
    (folder / "nested" / "tokenizer.json").write_text("{}")
    (folder / CARD).write_text("what was measured")
    write_manifest(folder, **FIELDS)
    return folder


def read(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def test_every_shipped_file_is_listed_with_its_hash(artifact: Path) -> None:
    manifest = read(artifact)
    assert manifest.files == {
        "model.onnx": hashlib.sha256(b"weights").hexdigest(),
        "nested/tokenizer.json": hashlib.sha256(b"{}").hexdigest(),
    }
    assert {name: getattr(manifest, name) for name in FIELDS} == FIELDS
    assert [path.name for path in artifact_files(artifact)] == ["model.onnx", "tokenizer.json"]
    check_files(artifact, manifest)


def test_equal_decisions_give_equal_bytes(artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    (artifact / CARD).write_text("measured on another day")
    write_manifest(artifact, **dict(reversed(FIELDS.items())))
    assert (artifact / MANIFEST).read_bytes() == before
    assert str(artifact.parent) not in before.decode()


def test_a_changed_or_missing_file_is_named(artifact: Path) -> None:
    manifest = read(artifact)
    (artifact / CARD).write_text("the card may change")
    check_files(artifact, manifest)
    (artifact / "model.onnx").write_bytes(b"Weights")  # as many bytes as before
    with pytest.raises(ArtifactError, match=r"model.onnx was changed after it was proven"):
        check_files(artifact, manifest)
    (artifact / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model.onnx is missing") as caught:
        check_files(artifact, manifest)
    assert "copy the whole artifact folder" in caught.value.hint


def test_a_folder_without_a_manifest_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"runtime": "torch"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_an_error(artifact: Path, content: bytes) -> None:
    (artifact / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"gossamer.json is not a manifest"):
        read_manifest(artifact)


def test_what_a_newer_version_adds_is_left_aside(artifact: Path) -> None:
    path = artifact / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "licence": "new"}))
    assert read(artifact).model == "my-bert"


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname"])
def test_a_manifest_cannot_vouch_for_files_elsewhere(artifact: Path, name: str) -> None:
    (artifact.parent / "outside.txt").write_text("x")
    digest = hashlib.sha256((artifact / name).read_bytes()).hexdigest()
    path = artifact / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {name: digest}}))
    with pytest.raises(ArtifactError):
        check_files(artifact, read(artifact))


def test_companions_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    BertForSequenceClassification(config).save_pretrained(model)
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("the original's card")
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "config.json").write_text("written by the runtime")
    copy_companions(Source.open(model), target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.json"]
    assert (target / "config.json").read_text() == "written by the runtime"
    copy_companions(Source.open(BertForSequenceClassification(config)), target)  # a network in memory has none
    assert len(list(target.iterdir())) == 2
