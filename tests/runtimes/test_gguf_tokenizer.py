"""Tokenizers in GGUF files: tokens, kinds, merges and scores of both kinds, and refusals of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.errors import ModelError, RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.source import Source
from gossamer.runtimes.base import ExportRequest
from gossamer.runtimes.gguf import MODEL_FILE, Gguf
from gossamer.runtimes.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD_RULES,
    Vocabulary,
    read_vocabulary,
)
from gossamer.tasks import get_task

gguf = pytest.importorskip("gguf")

ROWS = 320
TEXTS = ["hello hall 123", " the  theory\n\tof all", "naïve – 数学", "a"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he"), ("a", "ll")]


def by_bytes(steps: Any = None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = steps or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("a", "ll"), ("▁", "all")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def source_of(tokenizer: Tokenizer, folder: Path, **special: str) -> Source:
    special = {"bos_token": "<s>", "eos_token": "</s>", **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return Source.open(folder)


def test_tokens_and_merges_over_bytes(tmp_path: Path) -> None:
    tokenizer = by_bytes()
    tokenizer.add_tokens(["<tool>"])
    found = read_vocabulary(source_of(tokenizer, tmp_path), ROWS)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert len(found.tokens) == len(set(found.tokens)) == ROWS
    assert found.merges == tuple(" ".join(pair) for pair in MERGES)
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert (kinds["<s>"], kinds["hello"], kinds["<tool>"]) == (CONTROL, NORMAL, USER_DEFINED)
    assert kinds[found.tokens[-1]] == UNUSED
    assert found.special_ids["bos"] == 0
    assert found.special_ids["eos"] == 1
    assert (found.add_bos, found.add_eos, found.scores) == (False, False, ())


def test_the_begin_token_is_added_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    tokenizer = by_bytes()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = read_vocabulary(source_of(tokenizer, tmp_path), ROWS)
    assert (found.add_bos, found.add_eos) == (True, False)


def test_scores_are_the_places_of_merges(tmp_path: Path) -> None:
    found = read_vocabulary(source_of(sentencepiece(), tmp_path, unk_token="<unk>"), ROWS)
    assert (found.model, found.merges, found.add_space_prefix) == ("llama", (), True)
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["hello"]) == (UNKNOWN, CONTROL, BYTE, NORMAL)
    assert scores["he"] > scores["ll"] > scores["hell"] > scores["▁all"] > scores["h"]


@pytest.mark.parametrize(("rule", "name"), WORD_RULES.items(), ids=WORD_RULES.values())
def test_word_rules_are_known_by_their_expression(rule: str, name: str, tmp_path: Path) -> None:
    steps = [pre_tokenizers.Split(Regex(rule), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    assert read_vocabulary(source_of(by_bytes(pre_tokenizers.Sequence(steps)), tmp_path), ROWS).pre == name


def test_single_digits_are_smollm_s_rule(tmp_path: Path) -> None:
    steps = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    assert read_vocabulary(source_of(by_bytes(steps), tmp_path), ROWS).pre == "smollm"


def test_refused_tokenizers(tmp_path: Path) -> None:
    steps = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(False)])
    with pytest.raises(RuntimeUnavailable, match="Split then ByteLevel"):
        read_vocabulary(source_of(by_bytes(steps), tmp_path / "rule"), ROWS)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a"))
    with pytest.raises(RuntimeUnavailable, match="WordLevel"):
        read_vocabulary(source_of(words, tmp_path / "words"), ROWS)
    with pytest.raises(ModelError, match="100 rows"):
        read_vocabulary(source_of(by_bytes(), tmp_path / "small"), 100)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    source = source_of(by_bytes(), tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    assert read_vocabulary(source, ROWS) == Vocabulary("none")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_llama_cpp_cuts_text_alike(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which compiles llama.cpp, is not installed")
    made = by_bytes() if kind == "bytes" else sentencepiece()
    source, task = source_of(made, tmp_path / "source"), get_task("causal-lm")
    request = ExportRequest(task, {}, {}, ("logits",), tmp_path)
    Gguf().write(Candidate(source=source, module=source.module(task)), tmp_path, request)
    model = llama_cpp.Llama(str(tmp_path / MODEL_FILE), vocab_only=True, verbose=False)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=False) == source.processor()(text).input_ids
    assert json.loads((tmp_path / "source" / "tokenizer.json").read_text())["model"]["type"] == "BPE"
