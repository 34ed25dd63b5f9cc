"""A random Whisper of a few kilobytes with its processor, and tones for it to hear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

RATE = 16_000
SPECIAL = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]


def sound(seed: int, seconds: float = 0.5) -> NDArray[np.float32]:
    times = np.arange(int(seconds * RATE)) / RATE
    return np.sin(2 * np.pi * (200 + 150 * seed) * times).astype(np.float32) * 0.3


def write_whisper(folder: Path, blocks: int = 1) -> Path:
    """Write model and processor, each half of so many blocks, into `folder`, the same bytes every time; return it."""
    names = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *SPECIAL]
    tokenizer = WhisperTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    torch.manual_seed(3)
    config = WhisperConfig(
        vocab_size=len(names), d_model=32, encoder_layers=blocks, decoder_layers=blocks, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=50,
        max_target_positions=128, init_std=0.5, eos_token_id=256, decoder_start_token_id=257, pad_token_id=256,
        bos_token_id=256, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [5, 6]
    model.generation_config.begin_suppress_tokens = [7]
    model.save_pretrained(folder)
    return folder
