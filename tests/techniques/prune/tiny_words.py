"""Tiny classifiers with trained tokenizers of three kinds, written as folders, and texts of a domain and of others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

SYLLABLES = ["ka", "lo", "mi", "tar", "ven", "shu", "pel", "or", "ing", "an", "est", "qua", "dri", "ost"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 130, "initializer_range": 0.3, "attn_implementation": "eager",
    "id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1},
}  # fmt: skip


def texts(count: int, seed: int, syllables: int = len(SYLLABLES)) -> list[str]:
    """Return texts of made-up words; of few syllables for a domain."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES[:syllables], k=draw.randrange(1, 4))) for _ in range(150)]
    return [" ".join(draw.choices(words, k=draw.randrange(3, 9))) for _ in range(count)]


CORPUS, DOMAIN = texts(500, 0), texts(40, 1, 6)


def write_bert(folder: Path) -> Path:
    """Write a BERT whose tokenizer class builds itself from the words of tokenizer.json, as MiniLM's does."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", *(f"[unused{number}]" for number in range(5)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special[:1] + special[6:])
    )
    words = [
        *special,
        *(w for w, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1]) if w not in special),
    ]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    config = BertConfig(vocab_size=len(words) + 6, pad_token_id=0, **SIZES)  # rows that no token has
    return _written(BertForSequenceClassification, config, folder)


def write_roberta(folder: Path) -> Path:
    """Write a RoBERTa, whose positions count from the number of its padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(["<mask>"])
    _fast(tokenizer, folder)
    config = RobertaConfig(vocab_size=501, pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES)
    return _written(RobertaForSequenceClassification, config, folder)


def write_unigram(folder: Path) -> Path:
    """Write an XLM-RoBERTa with a Unigram tokenizer."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<mask>"])
    _fast(tokenizer, folder)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES
    )
    return _written(XLMRobertaForSequenceClassification, config, folder)


def _fast(tokenizer: Tokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", mask_token="<mask>", model_max_length=128,
    ).save_pretrained(folder)  # fmt: skip


def _written(kind: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # random classifiers answer one class only
        model.get_input_embeddings().weight.mul_(3)
    model.save_pretrained(folder)
    return folder
