from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from gossamer.models.inspect import ModelCard, describe
from gossamer.models.source import Source

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


@dataclass(frozen=True)
class Purpose:
    name: str = "text-classification"
    auto_class: str = "AutoModelForSequenceClassification"


def saved(folder: Path, module: hf.PreTrainedModel) -> Source:
    module.save_pretrained(folder)
    return Source.open(folder)


def test_a_card_adds_up_and_survives_json(tmp_path: Path) -> None:
    source = saved(tmp_path, hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=True, **TEXT)).to(torch.bfloat16))
    card = describe(source)
    assert ModelCard.model_validate(json.loads(card.model_dump_json())) == card
    assert (card.architecture, card.task, card.tied) == (
        "LlamaForCausalLM",
        "causal-lm",
        {"lm_head": "model.embed_tokens.weight"},
    )
    assert sum(row.num_parameters for row in card.roles) == card.num_parameters
    assert sum(row.num_bytes for row in card.roles) == card.num_bytes == 4 * card.num_parameters
    assert sum(row.share for row in card.roles) == pytest.approx(1.0)
    assert card.dtypes == {"BF16": 2 * card.num_parameters}
    assert card.shipped_bytes == sum(path.stat().st_size for path in source.shipped_files())
    assert sum(row.macs for row in card.roles) < card.macs  # attention's products belong to no layer
    assert any("made-up request" in note for note in card.notes)


def test_options_count_each_weight_once_and_say_what_is_left(tmp_path: Path) -> None:
    card = describe(saved(tmp_path, hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=True, **TEXT))))
    options = {option.family: option for option in card.options}
    assert options["quantize linear"].num_parameters == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert options["quantize embedding"].num_parameters == 99 * 32
    assert options["cast to bf16 or fp16"].share == 1.0
    assert card.left_out["lm_head"].startswith("shares its weight")
    norms = card.num_parameters - sum(o.num_parameters for o in card.options if o.family.startswith("quantize"))
    assert norms == next(row.num_parameters for row in card.roles if row.role == "norm")


def test_an_encoder_without_a_head_can_be_looked_at(tmp_path: Path) -> None:
    card = describe(saved(tmp_path, hf.BertModel(hf.BertConfig(**TEXT))))
    assert (card.architecture, card.task, card.labels) == ("BertModel", "feature-extraction", None)
    assert [(stack.name, stack.num_blocks) for stack in card.stacks] == [("encoder.layer", 2)]


def test_speech_is_told_from_translation(tmp_path: Path) -> None:
    config = hf.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99, num_mel_bins=8, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    assert describe(saved(tmp_path, hf.WhisperForConditionalGeneration(config))).task == "speech-recognition"


def test_a_given_example_and_task_are_used(tmp_path: Path) -> None:
    source = saved(tmp_path, hf.BertForSequenceClassification(hf.BertConfig(**TEXT)))
    short = describe(source, Purpose(), {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    long = describe(source, Purpose(), {"input_ids": torch.ones(1, 8, dtype=torch.long)})
    assert (short.request, short.task) == ({"input_ids": (1, 4)}, "text-classification")
    assert short.macs < long.macs
    assert not any("made-up" in note for note in short.notes)


def test_a_network_from_python_has_a_card_too() -> None:
    source = Source.open(nn.Sequential(nn.Linear(4, 2)), forward=lambda module, inputs: module(inputs["x"]), name="net")
    card = describe(source, example={"x": torch.ones(3, 4)})
    assert (card.name, card.path, card.shipped_bytes, card.macs) == ("net", None, None, 3 * 4 * 2)
    assert card.dtypes == {"float32": 40}


def test_integers_in_the_file_are_shown_as_they_lie(tmp_path: Path) -> None:
    source = saved(tmp_path, hf.BertModel(hf.BertConfig(**TEXT)))
    weights = {name: tensor.contiguous() for name, tensor in source.native_module().state_dict().items()}
    save_file({**weights, "positions": torch.arange(10)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert describe(Source.open(tmp_path)).dtypes["I64"] == 80
