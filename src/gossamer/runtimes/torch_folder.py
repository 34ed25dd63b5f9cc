"""The canonical artifact: a Hugging Face folder that stock `from_pretrained` loads, with no gossamer installed.

Files: config.json (with compressed-tensors' `quantization_config` when anything is quantized), model.safetensors (in
shards above 5 GB), and the tokenizer or processor files of the source. Parameters keep the names that they have in
the model. How codes lie in the file is told at the top of torch_lowering.py.

A compressed folder is decompressed by compressed-tensors once, on the first forward pass; after that every weight is
dense in memory, so this runtime saves bytes on disk and not in memory. `CompressedTensorsConfig(dequantize=True)` is
not used: transformers 5.23 decompresses every layer with the settings of the first group there.

A model that is not from Hugging Face is stored as a torch.export program instead (torch_export.py).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.config import quiet_transformers
from gossamer.models.experts import layouts
from gossamer.models.quantized import ActivationSpec, QuantSpec
from gossamer.models.roles import EXPERT_ROLES, ModelMap
from gossamer.models.shards import MAX_SHARD_BYTES, num_files, write_kept_shards, write_shards
from gossamer.runtimes import torch_lowering as lowering
from gossamer.runtimes.base import ExportRequest, Runtime, Session, StoredTensor
from gossamer.runtimes.manifest import copy_companions
from gossamer.runtimes.torch_adapters import FOLDER, load_lines, stored_parts, with_adapter, write_adapter
from gossamer.runtimes.torch_caches import (
    SUFFIXES,
    cache_scheme,
    simulate_caches,
    spec_of,
    stored_caches,
)
from gossamer.runtimes.torch_export import PROGRAM_FILE, TorchExport
from gossamer.runtimes.torch_floats import float_refusal, format_of, refusal_beside
from gossamer.runtimes.torch_parts import file_parts, not_quantized, quantized_layers, tensors_of
from gossamer.runtimes.torch_served import served_notes
from gossamer.runtimes.torch_streamed import StreamedSession
from gossamer.tasks.base import Arrays, Task

METADATA = {"format": "pt", "written_by": "gossamer"}
FLOAT_BITS = {"F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16), "F64": ("float64", 64)}
# layers that are an nn.Linear or nn.Embedding: the module types that compressed-tensors can hold
UNSUPPORTED_ROLES = {
    "convolution": "a convolution",
    "norm": "a normalization layer",
    "positions": "a table that its model calls with more than row numbers",
}


class TorchSession(Session):
    """A module of transformers that runs on arrays."""

    def __init__(self, module: nn.Module, outputs: tuple[str, ...] | None) -> None:
        self._module = module
        self._outputs = outputs

    def run(self, inputs: Arrays) -> Arrays:
        """Return the outputs by name; floating-point outputs as float32."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        with torch.inference_mode():
            found = self._module(**tensors)
        names = self._outputs or [name for name, value in found.items() if isinstance(value, Tensor)]
        return {name: to_array(found[name]) for name in names}


def to_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as an array, floating-point values as float32."""
    array: np.ndarray[Any, Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


class TorchFolder(Runtime):
    """Write and open Hugging Face folders whose quantized layers are held by compressed-tensors."""

    name: ClassVar[str] = "torch"
    files: ClassVar[tuple[str, ...]] = ("*.safetensors", "*.safetensors.index.json", "*.pt2")
    keeps_16_bits: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    holds_caches: ClassVar[bool] = True
    adapter_bytes: ClassVar[int] = 2
    holds_layers: ClassVar[bool] = False  # compressed-tensors belongs to a model with a config
    needs_config: ClassVar[bool] = True

    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        """Return why a layer cannot be held like this, or None when it can."""
        if spec is None:
            return "a layer's inputs can be rounded only together with its weight" if activation else None
        if role in EXPERT_ROLES and activation is not None:
            return "transformers unpacks experts when it opens them: their inputs are not rounded"
        if role in EXPERT_ROLES and spec.format != "int":
            return f"transformers unpacks experts when it opens them, and only integers, not {spec.format}"
        if role in EXPERT_ROLES and not spec.symmetric:
            return "transformers drops the zero points of experts when it opens them: use symmetric: true"
        if role in UNSUPPORTED_ROLES or len(shape) != 2:
            kind = UNSUPPORTED_ROLES.get(role, f"a weight of {len(shape)} dimensions")
            return f"compressed-tensors holds linear and embedding layers only, not {kind}"
        if spec.format != "int" and (reason := float_refusal(role, spec, activation)):
            return reason
        if spec.group_size and shape[1] % spec.group_size:
            return f"group_size {spec.group_size} does not divide in_features {shape[1]}"
        if activation is None:
            return None
        if role == "embedding":
            return "the inputs of an embedding are row numbers: there is nothing to round"
        if activation.kind == "dynamic" and activation.symmetric:
            return (
                "compressed-tensors divides a dynamic symmetric range by 127.5, not 127: results would differ "
                "from the model that was judged; use an asymmetric range"
            )
        if activation.scope == "token" and role == "classifier":
            return "compressed-tensors rounds 2-dimensional inputs per tensor, not per token"
        return None

    def refusal_beside(self, spec: QuantSpec, floats: str) -> str | None:
        """Return why codes cannot lie beside floats of a dtype, or None when they can."""
        return refusal_beside(spec, floats)

    def refusal_together(self, model: ModelMap, chosen: Mapping[str, QuantSpec]) -> str | None:
        """Return why the experts cannot be held like this: transformers opens all of a stack with one grid."""
        specs = set()
        for experts in model.experts if chosen else ():
            inside = [layer for layer in model.layers if layer.experts == experts.name and layer.role in EXPERT_ROLES]
            specs |= {chosen[layer.name] for layer in inside if layer.name in chosen}
            if not experts.alone and any(layer.name in chosen for layer in inside):
                return f"transformers opens {experts.name} only as stacked floats: name `expert` under `ignore`"
            for roles in (("expert_gate", "expert_up"), ("expert_down",)):
                stack = [layer.name for layer in inside if layer.role in roles]
                left = [name for name in stack if name not in chosen]
                if left and len(left) < len(stack):
                    return (
                        f"{left[0]} is one of {len(stack)} layers that transformers stacks: all of them are rounded, "
                        f"or none ({len(left)} are not)"
                    )
        if len(specs) > 1:
            grids = ", ".join(sorted(map(str, specs)))
            return f"transformers opens all experts of a model with one grid, the recipe has {len(specs)}: {grids}"
        return None

    def stored_bytes(
        self,
        role: str,
        shape: tuple[int, ...],
        spec: QuantSpec | None,
        dtype_bytes: int,
        *,
        activation: ActivationSpec | None = None,
        tied: bool = False,
    ) -> int:
        """Return the bytes of one parameter in the file.

        A layer whose inputs are rounded (`activation`) and an embedding take 8 bits per code; `tied` says that the
        output layer shares the embedding, which costs a second copy of the scales.

        >>> TorchFolder().stored_bytes("q", (64, 64), QuantSpec(bits=4, group_size=32), 4)
        2320
        """
        if spec is None:
            return int(np.prod(shape, dtype=np.int64)) * dtype_bytes
        layout = lowering.layout_of(spec, activation, role == "embedding" or tied, role in EXPERT_ROLES)
        return lowering.layer_bytes(shape, spec, layout, copies=2 if tied else 1)

    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        """Write config.json, safetensors and processor files; the codes are stored as they are.

        Raises RuntimeUnavailable when a layer is of a kind that the format cannot hold.
        """
        if candidate.source.path is None:
            if any(layouts(candidate.module)):
                raise RuntimeUnavailable(
                    f"{candidate.source.name} has experts and was given as a network, which is stored as a program",
                    "save it with save_pretrained and give the folder",
                )
            TorchExport().write(candidate, folder, request)
            return
        self.check_stock(candidate)
        layers = quantized_layers(candidate)
        config = _config(candidate.module, candidate.dtype)
        if layers or candidate.caches:
            settings = {
                name: (spec, activation, layout, candidate.outline(parameter).shape[1])
                for name, (spec, activation, layout, parameter) in layers.items()
            }
            config["quantization_config"] = lowering.quantization_config(
                settings, not_quantized(candidate, layers), cache_scheme(candidate.caches)
            )
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        parts = file_parts(candidate, layers)
        entries = [entry for part in parts for entry in part.entries]
        if request.keep is not None and num_files(entries, MAX_SHARD_BYTES) > 1:
            write_kept_shards(folder, entries, partial(tensors_of, parts), METADATA, request.keep, MAX_SHARD_BYTES)
        else:
            tensors = (found for part in parts for found in part.tensors().items())
            write_shards(folder, entries, tensors, METADATA, MAX_SHARD_BYTES)
        write_adapter(candidate.module, folder, candidate.dtype)
        copy_companions(candidate.source, folder)

    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> Session:
        """Open a folder with stock transformers, evaluation mode, its default attention.

        A folder that gossamer did not write (the user's own model) runs in float32, whatever it is stored in.
        """
        torch.set_num_threads(threads)
        if (folder / PROGRAM_FILE).exists():
            return TorchExport().open(folder, threads=threads, task=task)
        if not (folder / "config.json").exists():
            raise ArtifactError(f"{folder} holds neither config.json nor {PROGRAM_FILE}", "name a model folder")
        auto_class = getattr(transformers, task.auto_class) if task else _named_class(folder)
        dtype = "auto" if _written_by_us(folder) else torch.float32
        try:
            with quiet_transformers():
                module, report = auto_class.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(f"{folder} does not open: {error}", "write the artifact again") from error
        if absent := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
            raise ArtifactError(f"{folder} lacks {len(absent)} weights, {absent[0]} first", "write the artifact again")
        simulate_caches(module, stored_caches(folder))
        return TorchSession(with_adapter(module, folder).eval(), (task.output,) if task else None)

    def open_streamed(self, folder: Path, *, threads: int, task: Task, budget: int) -> Session:
        """Open a folder so that its weights are read when they are needed, and at most `budget` bytes of them stay."""
        torch.set_num_threads(threads)
        return StreamedSession(folder, task, budget)

    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        """Read back from config.json and the safetensors headers how each parameter is held."""
        if (folder / PROGRAM_FILE).exists():
            return TorchExport().stored_tensors(folder)
        return read_stored(folder)

    def load_snippet(self, task: Task) -> str:
        """Return the lines with which a user opens the folder."""
        return (
            f"from transformers import {task.auto_class}\n\n"
            f'model = {task.auto_class}.from_pretrained("path/to/folder").eval()\n'
            f"{task.output} = model(**inputs).{task.output}\n"
        )

    def load_more(self, folder: Path) -> str:
        """Return how the adapter of a folder is put beside the opened model, where it has one."""
        return load_lines(folder)

    def notes(self, folder: Path, model: ModelMap) -> tuple[str, ...]:
        """Return whether vLLM would load the folder too, or why not; nothing of a folder without codes."""
        if not (folder / "config.json").exists():
            return ()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tables = {layer.name for layer in model.layers if layer.kind == "embedding"}
        return served_notes(config, folder, tables)


def _config(module: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json: the module's own configuration, readable by transformers 4 and 5."""
    assert isinstance(module, transformers.PreTrainedModel)
    config: dict[str, Any] = json.loads(module.config.to_json_string(use_diff=True))
    config["architectures"] = [type(module).__name__]
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def _named_class(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or [None])[0]
    if name is None or not hasattr(transformers, name):
        raise ArtifactError(f"{folder}/config.json names no model class of transformers", "open it with its task")
    return getattr(transformers, name)


def _written_by_us(folder: Path) -> bool:
    return any(header.get("__metadata__") == METADATA for header in _headers(folder).values())


def _headers(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the JSON header of every safetensors file of a folder."""
    headers = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            headers[path] = json.loads(file.read(length))
    return headers


def read_stored(folder: Path) -> list[StoredTensor]:
    """Return how each parameter of a folder is held, from config.json and the safetensors files alone."""
    entries: dict[str, tuple[dict[str, Any], Path]] = {}
    for path, header in _headers(folder).items():
        entries.update({name: (entry, path) for name, entry in header.items() if name != "__metadata__"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    targets = lowering.Targets(config.get("quantization_config", {}))
    cache = spec_of(config)
    stored, lone_scales = [], []
    for name, (entry, _) in entries.items():
        owner, _, local = name.rpartition(".")
        settings = targets.of(owner)
        if cache is not None and name.endswith(SUFFIXES):
            stored.append(StoredTensor(name, str(cache), 8, None, True, tuple(entry["shape"]), _num_bytes(entry)))
        elif settings is None:
            stored.append(_stored_float(name, entry))
        elif local in ("weight", "weight_packed"):
            stored.append(_stored_codes(owner, settings, entries))
        elif local == "weight_scale" and not {f"{owner}.weight", f"{owner}.weight_packed"} & entries.keys():
            lone_scales.append(owner)
        elif not local.startswith(("weight_", "input_")):
            stored.append(_stored_float(name, entry))
    for owner in lone_scales:
        _add_copy(owner, stored, entries)
    for header in _headers(folder / FOLDER).values():
        stored += [_stored_float(name, entry) for name, entry in stored_parts(header)]
    return sorted(stored, key=lambda tensor: tensor.name)


def _stored_float(name: str, entry: Mapping[str, Any]) -> StoredTensor:
    dtype, bits = FLOAT_BITS.get(entry["dtype"], (entry["dtype"].lower(), 0))
    return StoredTensor(name, dtype, bits, None, True, tuple(entry["shape"]), _num_bytes(entry))


def _stored_codes(
    owner: str, weights: Mapping[str, Any], entries: Mapping[str, tuple[dict[str, Any], Path]]
) -> StoredTensor:
    found = format_of(weights)
    if f"{owner}.weight_shape" in entries:
        with safe_open(entries[f"{owner}.weight_shape"][1], "pt") as file:
            shape = tuple(file.get_tensor(f"{owner}.weight_shape").tolist())
    elif f"{owner}.weight_packed" in entries:  # two codes a byte
        rows, packed = entries[f"{owner}.weight_packed"][0]["shape"]
        shape = (rows, 2 * packed)
    else:
        shape = tuple(entries[f"{owner}.weight"][0]["shape"])
    parts = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_global_scale", "weight_zero_point")
    size = sum(_num_bytes(entries[f"{owner}.{part}"][0]) for part in parts if f"{owner}.{part}" in entries)
    bits = weights["num_bits"]
    columns = (weights.get("block_structure") or [1, weights.get("group_size")])[1]
    group_size = None if columns == shape[1] and "group" not in weights["strategy"] else columns
    dtype = f"int{bits}" if f"{owner}.weight_packed" in entries else "int8"
    dtype = dtype if found == "int" else found
    return StoredTensor(f"{owner}.weight", dtype, bits, group_size, weights["symmetric"], shape, size)


def _add_copy(owner: str, stored: list[StoredTensor], entries: Mapping[str, tuple[dict[str, Any], Path]]) -> None:
    """Count the second module's scales of a tied table with the table whose rows they scale."""
    rows = entries[f"{owner}.weight_scale"][0]["shape"][0]
    extra = sum(_num_bytes(entry) for name, (entry, _) in entries.items() if name.startswith(f"{owner}.weight_"))
    for index, tensor in enumerate(stored):
        if tensor.bits <= 8 and tensor.shape[0] == rows and f"{tensor.name}_packed" not in entries:
            own = entries[f"{tensor.name}_scale"]
            if _same(own[1], f"{tensor.name}_scale", entries[f"{owner}.weight_scale"][1], f"{owner}.weight_scale"):
                stored[index] = StoredTensor(**{**vars(tensor), "bytes": tensor.bytes + extra})
                return
    raise ArtifactError(f"{owner}.weight_scale scales no weight of this folder", "write the artifact again")


def _same(path_a: Path, name_a: str, path_b: Path, name_b: str) -> bool:
    with safe_open(path_a, "pt") as a, safe_open(path_b, "pt") as b:
        return torch.equal(a.get_tensor(name_a), b.get_tensor(name_b))


def _num_bytes(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)
