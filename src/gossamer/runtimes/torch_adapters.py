"""Thin layers beside weights, in a Hugging Face folder: an adapter in a folder of its own, which `peft` reads.

    folder/adapter/adapter_config.json, adapter_model.safetensors

A user opens the model, and then the adapter: `PeftModel.from_pretrained(model, "folder/adapter")`. `peft` looks at the
weights of the layers, so that what is packed is unpacked first, which else would happen at the first call. The folder
itself loads without its adapter too, as the model that was not corrected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.adapters import DOWN, STORED, UP, adapters_of

FOLDER = "adapter"
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters that belong to thin layers."""
    return {f"{name}.{part}.weight" for name, _ in adapters_of(module) for part in (DOWN, UP)}


def write_adapter(module: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write the thin layers of a module, where there are any, in 16 bits."""
    from peft import LoraConfig

    layers = dict(adapters_of(module))
    if not layers:
        return
    ranks = {name: layer.lora_A.out_features for name, layer in layers.items()}
    largest = max(ranks.values())
    settings = LoraConfig(
        r=largest,
        lora_alpha=largest,  # the change is held as it is: alpha / r is 1
        rank_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != largest},
        target_modules=sorted(layers),
        bias="none",
        inference_mode=True,
    )
    target = folder / FOLDER
    target.mkdir()
    settings.save_pretrained(str(target))
    config = target / CONFIG  # sets are written in any order: the same decisions give the same bytes
    said = json.loads(config.read_text(encoding="utf-8"))
    said["target_modules"] = sorted(said["target_modules"])
    config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    kept = dtype if dtype != torch.float32 else STORED
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight.detach().to(kept).contiguous()
        for name, layer in layers.items()
        for part in (DOWN, UP)
    }
    save_file(tensors, target / FILE, metadata={"format": "pt"})


def with_adapter(module: nn.Module, folder: Path) -> nn.Module:
    """Return an opened module with the adapter of its folder, or itself where there is none.

    Raises ArtifactError where one of its two files is missing (`peft` would look for a pickle, and then on the hub), or
    where they do not fit the model.
    """
    held = folder / FOLDER
    if not held.is_dir():
        return module
    if absent := [name for name in (CONFIG, FILE) if not (held / name).is_file()]:
        raise ArtifactError(f"{held} has no {absent[0]}", "write the artifact again")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RuntimeUnavailable(f"{held} needs peft, which is not installed", "pip install peft") from error
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.compressor.decompress_model(module)
    try:
        opened: nn.Module = PeftModel.from_pretrained(module, str(held), local_files_only=True)
    except Exception as error:  # untrusted input: peft raises errors of many kinds
        raise ArtifactError(f"{held} does not open: {error}", "write the artifact again") from error
    return opened


def load_lines(folder: Path) -> str:
    """Return how the adapter of a folder is put beside the opened model; nothing where there is none."""
    if not (folder / FOLDER).is_dir():
        return ""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    unpacked = "model.hf_quantizer.compressor.decompress_model(model)\n" if "quantization_config" in config else ""
    return (
        "\n# before the model is called\nfrom peft import PeftModel\n\n"
        f'{unpacked}model = PeftModel.from_pretrained(model, "path/to/folder/{FOLDER}").eval()\n'
    )


def stored_parts(header: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the thin layers' parameters of a safetensors header, by their names in the model."""
    for name, entry in header.items():
        if name.startswith(PREFIX):
            yield name.removeprefix(PREFIX), entry
