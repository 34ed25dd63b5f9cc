"""Make up inputs for a transformers model from its config, so that it can be looked at without any data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

LENGTH = 128  # tokens of a made-up text
SPOKEN = 16  # tokens of a made-up transcript


def made_up_example(module: nn.Module) -> dict[str, Tensor] | None:
    """Return inputs [1, ...] by argument name for one forward pass, or None when the config does not say enough.

    Text: 128 tokens (fewer if the model takes fewer), pictures and sound at the size that the config names. The values
    mean nothing; shapes and data flow do.

    >>> made_up_example(bert)["input_ids"].shape  # doctest: +SKIP
    torch.Size([1, 128])
    """
    if not isinstance(module, PreTrainedModel):
        return None
    config = module.config
    main = module.main_input_name
    makers = {"input_ids": _tokens, "pixel_values": _picture, "input_features": _spectrum, "input_values": _sound}
    if main not in makers:
        return None
    value = makers[main](config)
    if value is None:
        return None
    example = {main: value}
    if config.is_encoder_decoder:
        vocabulary = _setting(config, "vocab_size")
        if vocabulary is None:
            return None
        # classifiers of this kind read the decoder at the text's own length
        length = value.shape[1] if main == "input_ids" else SPOKEN
        example["decoder_input_ids"] = (torch.arange(length) % vocabulary).unsqueeze(0)
    device = next(module.parameters()).device
    return {name: tensor.to(device) for name, tensor in example.items()}


def _tokens(config: PretrainedConfig) -> Tensor | None:
    vocabulary = _setting(config, "vocab_size")
    if vocabulary is None:
        return None
    longest = _setting(config, "max_position_embeddings", "n_positions") or LENGTH
    # RoBERTa numbers positions from padding_idx + 1: leave room
    length = min(LENGTH, longest - 2) if longest > 4 else longest
    tokens = (torch.arange(length) * 7 + 3) % vocabulary
    end = _setting(config, "eos_token_id")
    if end is not None and 0 <= end < vocabulary:  # exactly one end of text: BART's classifier reads there
        tokens = torch.where(tokens == end, (end + 1) % vocabulary, tokens)
        tokens[-1] = end
    return tokens.unsqueeze(0)


def _picture(config: PretrainedConfig) -> Tensor | None:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = _setting(config, "num_channels") or 3
    return torch.linspace(-1.0, 1.0, channels * height * width).reshape(1, channels, height, width)


def _spectrum(config: PretrainedConfig) -> Tensor | None:
    bands, positions = _setting(config, "num_mel_bins"), _setting(config, "max_source_positions")
    if bands is None or positions is None:
        return None
    return torch.linspace(-1.0, 1.0, bands * 2 * positions).reshape(1, bands, 2 * positions)  # its stem halves the time


def _sound(config: PretrainedConfig) -> Tensor | None:
    return torch.sin(torch.arange(16_000) / 10.0).unsqueeze(0)


def _setting(config: PretrainedConfig, *names: str) -> int | None:
    values: list[Any] = [getattr(config, name, None) for name in names]
    return next((value for value in values if isinstance(value, int)), None)
