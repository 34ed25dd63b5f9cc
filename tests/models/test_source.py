from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel
from transformers.utils import logging as chatter

from gossamer.errors import ModelError
from gossamer.models.config import quiet_transformers
from gossamer.models.source import Source


@dataclass(frozen=True)
class Purpose:
    name: str = "text-classification"
    auto_class: str = "AutoModelForSequenceClassification"


TEXT = Purpose()
LABELS = ("bad", "fair", "good")


def tiny_bert(cls: type[PreTrainedModel] = BertForSequenceClassification) -> PreTrainedModel:
    torch.manual_seed(0)
    named = dict(enumerate(LABELS))
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50,
        id2label=named, label2id={label: index for index, label in named.items()},
    )  # fmt: skip
    return cls(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-bert"
    tiny_bert().save_pretrained(path)
    return path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path | str, **options: bool) -> ModelError:
    with pytest.raises(ModelError) as caught:
        Source.open(folder, **options).module(TEXT)
    return caught.value


def test_a_folder_opens_as_what_was_saved(folder: Path) -> None:
    source = Source.open(folder)
    module = source.module(TEXT)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        torch.testing.assert_close(source.forward(module, inputs), tiny_bert()(**inputs).logits)
    assert (source.name, source.labels, source.path) == ("tiny-bert", LABELS, folder)
    assert not module.training
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module.config._attn_implementation == "eager"
    assert source.module(TEXT) is not module


def test_half_precision_files_open_as_float32(folder: Path) -> None:
    tiny_bert().half().save_pretrained(folder)
    assert {p.dtype for p in Source.open(folder).module(TEXT).parameters()} == {torch.float32}


def test_shards_open_too(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path, max_shard_size="20KB")
    source = Source.open(tmp_path)
    torch.testing.assert_close(dict(source.module(TEXT).state_dict()), dict(tiny_bert().state_dict()))
    assert sum(path.suffix == ".safetensors" for path in source.shipped_files()) > 1
    assert "model.safetensors.index.json" in {path.name for path in source.shipped_files()}


def test_the_fingerprint_follows_config_and_weights(folder: Path, tmp_path: Path) -> None:
    before = Source.open(folder).fingerprint
    (folder / "README.md").write_text("no part of the model")
    assert Source.open(folder).fingerprint == before
    edit_config(folder, hidden_dropout_prob=0.2)
    changed = Source.open(folder).fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert len({before, changed, Source.open(folder).fingerprint}) == 3


def test_missing_folder_and_config(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nowhere").message
    assert "holds no config.json (it holds: nothing)" in refusal(tmp_path).message
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refusal(tmp_path).message
    assert "is a file" in refusal(tmp_path / "notes.txt").message


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in refusal(folder).message


def test_a_config_with_a_senseless_value(folder: Path) -> None:
    edit_config(folder, hidden_size="wide")
    assert "config.json is refused by transformers" in refusal(folder).message


def test_a_truncated_file_says_both_numbers(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[: whole - 100])
    error = refusal(folder)
    assert f"asks for {whole} bytes, the file has {whole - 100}" in error.message


def test_a_pickle_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only as a pickle" in refusal(folder).message


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"][1, 2] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "classifier.weight (1 of 96)" in refusal(folder).message


def test_remote_code_is_refused_unless_asked_for(folder: Path) -> None:
    edit_config(folder, model_type="home-made", auto_map={"AutoConfig": "configuration.HomeMadeConfig"})
    (folder / "configuration.py").write_text("raise SystemExit('this code ran')\n")
    error = refusal(folder)
    assert "configuration.HomeMadeConfig" in error.message
    assert "trust_remote_code" in error.hint


def test_remote_code_that_is_not_needed_does_not_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForSequenceClassification": "modeling.Other"})
    (folder / "modeling.py").write_text("raise SystemExit('this code ran')\n")
    assert isinstance(Source.open(folder).module(TEXT), BertForSequenceClassification)


def test_an_unknown_kind_of_model_is_named(folder: Path) -> None:
    edit_config(folder, model_type="home-made")
    assert "knows no model_type 'home-made'" in refusal(folder).message


def test_an_untrained_classifier_is_an_error_not_a_guess(tmp_path: Path) -> None:
    tiny_bert(BertModel).save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert "2 weights that BertForSequenceClassification needs are not in" in error.message
    assert "classifier.bias, classifier.weight" in error.message


def test_weights_that_the_model_does_not_need_are_tolerated(folder: Path) -> None:
    weights = {**load_file(folder / "model.safetensors"), "extra.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(Source.open(folder).module(TEXT), BertForSequenceClassification)


def test_weights_of_another_shape_are_an_error(folder: Path) -> None:
    edit_config(folder, intermediate_size=48)
    assert "cannot be opened as text-classification" in refusal(folder).message


def test_a_task_that_the_architecture_has_no_class_for(folder: Path) -> None:
    with pytest.raises(ModelError, match="AutoModelForImageClassification") as caught:
        Source.open(folder).module(Purpose("image-classification", "AutoModelForImageClassification"))
    assert "BertForSequenceClassification" in caught.value.hint


def test_a_quantized_folder_says_so(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    assert Source.open(folder).quantization == "compressed-tensors"
    assert "already quantized (compressed-tensors)" in refusal(folder).message


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name!"])
def test_a_hub_id_that_cannot_be_had(name: str) -> None:
    assert name in refusal(name).message


def test_no_tokenizer_is_an_error(folder: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer and no image processor"):
        Source.open(folder).processor()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot open"):
        Source.open(folder).processor()


def test_transformers_is_silent_and_gets_its_settings_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    weights = {**load_file(folder / "model.safetensors"), "extra.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Source.open(folder).module(TEXT)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(KeyError), quiet_transformers():
        raise KeyError
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == before


def test_what_lies_beside_an_artifact_opens_without_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    beside = Source.companions(folder)
    assert (beside.labels, beside.architectures) == (LABELS, ("BertForSequenceClassification",))
    assert Source.companions(tmp_path).config is None
    with pytest.raises(ModelError):
        beside.module(TEXT)


class Doubler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x), "twice": 2 * self.linear(x)}


def test_a_network_is_copied_and_run_by_its_function() -> None:
    network = Doubler().double().train()
    source = Source.open(network, forward=lambda module, inputs: module(inputs["rows"])["twice"], name="mine")
    module, rows = source.module(TEXT), torch.ones(1, 3)
    expected = 2 * network.linear(rows.double()).float()
    torch.testing.assert_close(source.forward(module, {"rows": rows}), expected)
    assert (source.name, source.path, source.labels, source.shipped_files()) == ("mine", None, None, [])
    before = source.fingerprint
    with torch.no_grad():
        module.get_parameter("linear.weight").zero_()
        assert network.linear.weight.abs().sum() > 0
        assert Source.open(network).fingerprint == before
        network.linear.weight[0, 0] += 1
    assert Source.open(network).fingerprint != before


def test_a_network_without_a_function_gives_its_named_output() -> None:
    source = Source.open(Doubler())
    module = source.module(TEXT)
    assert source.forward(module, {"x": torch.ones(1, 3)}, "twice").shape == (1, 2)
    with pytest.raises(ModelError, match=r"no output 'scores' \(it gives: logits, twice\)"):
        source.forward(module, {"x": torch.ones(1, 3)}, "scores")
    with pytest.raises(ModelError, match="network"):
        source.processor()


def test_what_stands_beside_an_artifact_is_found_without_its_weights(tmp_path: Path) -> None:
    """An ONNX artifact has a tokenizer and a config, and no safetensors file."""
    (tmp_path / "config.json").write_text('{"model_type": "bert", "pad_token_id": 3}')
    (tmp_path / "tokenizer.json").write_text("{}")
    source = Source.companions(tmp_path)
    assert set(source.beside.names) == {"config.json", "tokenizer.json"}
    other = source.with_files({"config.json": b'{"model_type": "bert", "pad_token_id": 1}'})
    assert (other.config.pad_token_id, source.config.pad_token_id) == (1, 3)  # type: ignore[union-attr]
    assert other.beside.read("tokenizer.json") == b"{}"
    with other.beside.folder() as folder:
        assert (folder / "config.json").read_bytes() == b'{"model_type": "bert", "pad_token_id": 1}'
        assert folder != tmp_path
    assert not folder.exists()
    with source.beside.folder() as folder:
        assert folder == tmp_path
