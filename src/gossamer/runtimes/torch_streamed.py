"""Serve a Hugging Face folder of any size in bounded memory: its weights are read when a layer runs, and given back.

What stock transformers opens whole is here read tensor by tensor, codes unpacked and scaled as `torch_lowering.py`
says they lie in the file: the same numbers, but for the order of additions none. Many inputs go through block after
block, so that each block's weights are read once for all of them.

Left out: folders whose layers round their inputs too (their integer kernels are no matter of reading weights).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ArtifactError
from gossamer.models.blocks import find_stacks
from gossamer.models.lazy import LazyWeights
from gossamer.models.places import find_places, reader
from gossamer.models.quantized import Quantized, QuantSpec
from gossamer.models.shards import Shards
from gossamer.models.source import Source
from gossamer.models.walker import Walker
from gossamer.runtimes.base import Session
from gossamer.runtimes.torch_adapters import FOLDER
from gossamer.runtimes.torch_caches import simulate_caches, stored_caches
from gossamer.runtimes.torch_floats import read_float
from gossamer.runtimes.torch_lowering import Targets, unpack_codes
from gossamer.tasks.base import Arrays, Task

BYTES_OF_A_SAMPLE = 64 << 20  # room for one sample between two blocks: 512 tokens of 4,096 channels, masks, scores


class FolderWeights:
    """Read the parameters of a folder by name, as floats: those with codes are dequantized."""

    def __init__(self, folder: Path) -> None:
        self.shards = Shards(folder)
        if (folder / FOLDER).is_dir():
            raise ArtifactError(
                f"{folder} has an adapter, which is not served piece by piece",
                "give it enough --memory to be opened whole",
            )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = config.get("quantization_config", {})
        if any(group.get("input_activations") for group in settings.get("config_groups", {}).values()):
            raise ArtifactError(
                f"{folder} rounds the inputs of layers, which cannot be served piece by piece",
                "give it enough --memory to be opened whole",
            )
        self._targets = Targets(settings)

    @property
    def names(self) -> list[str]:
        """Return the names of all parameters, as the model spells them."""
        held = self.shards.held
        packed = [f"{name.removesuffix('_packed')}" for name in held if name.endswith(".weight_packed")]
        return sorted({*held, *packed})

    def read(self, name: str) -> Tensor:
        """Return a parameter's values."""
        owner = name.removesuffix(".weight")
        settings = self._targets.of(owner) if owner != name else None
        return self.shards.read(name) if settings is None else self._codes(owner, settings).dequantize()

    def _codes(self, owner: str, settings: Mapping[str, Any]) -> Quantized:
        held = self.shards.held
        if settings["type"] == "float":
            return read_float(owner, settings, held, self.shards.read)
        if f"{owner}.weight_packed" in held:
            rows, columns = (int(size) for size in self.shards.read(f"{owner}.weight_shape"))
            packed = self.shards.read(f"{owner}.weight_packed")
            codes = unpack_codes(packed, settings["num_bits"], (rows, columns))
        else:
            codes = self.shards.read(f"{owner}.weight")
        zero_point = None
        if f"{owner}.weight_zero_point" in held:
            zero_point = self.shards.read(f"{owner}.weight_zero_point")
        return Quantized(
            codes=codes,
            scale=self.shards.read(f"{owner}.weight_scale").float(),
            zero_point=zero_point,
            spec=QuantSpec(bits=settings["num_bits"], symmetric=zero_point is None),
            shape=tuple(codes.shape),
        )


class StreamedSession(Session):
    """A model whose weights are read when they are needed; `budget` bytes of them may stay."""

    def __init__(self, folder: Path, task: Task, budget: int) -> None:
        source = Source.companions(folder)
        weights = FolderWeights(folder)
        self._task, self._source, self._budget = task, source, budget
        self._module = source.empty_module(task, weights.shards, weights.names)
        self._stacks, _ = find_stacks(self._module)
        places = find_places(self._module, weights.names)
        simulate_caches(self._module, stored_caches(folder))
        self._weights = LazyWeights(self._module, reader(places, weights.read, weights.shards.read_row), budget)

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs of one batch; every weight is read once."""
        return next(self.run_all([inputs]))

    def run_all(self, batches: Sequence[Arrays]) -> Iterator[Arrays]:
        """Yield the outputs of each batch in turn; every weight is read once for as many batches as memory holds."""
        step = max(1, self._budget // BYTES_OF_A_SAMPLE)
        for start in range(0, len(batches), step):
            samples = [
                {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
                for batch in batches[start : start + step]
            ]
            walker = Walker(self._module, self._forward, samples)
            with torch.inference_mode():
                for output in walker.outputs(self._stacks, self._weights.held):
                    yield {self._task.output: output.float().numpy()}

    def _forward(self, module: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return self._source.forward(module, inputs, self._task.output)
