"""GGUF (model.gguf): our codes in the blocks of ggml, run by llama.cpp and what is built on it.

Weights that were solved for a block's own format (the technique `gguf`) go in as they are. Codes of integers that a
block can hold go in one by one (gguf_codes.py says which, and that scales become half precision). All others are
refused: what a search judges is what is served.

Vectors (norms, biases) are float32; matrices that are not quantized are stored as the candidate's float type. A tied
embedding is written once. The file says in `gossamer.tensors` which parameter each tensor is and which grid its codes
are on; `stored_tensors` looks whether codes and scales are so.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ArtifactError, RuntimeUnavailable
from gossamer.models.candidate import Candidate
from gossamer.models.gguf_blocks import BLOCK, FORMATS, BlockFormat, unpack
from gossamer.models.quantized import ActivationSpec, Quantized, QuantSpec
from gossamer.runtimes.base import ExportRequest, Runtime, Session, StoredTensor
from gossamer.runtimes.gguf_codes import encode_codes, exact_format
from gossamer.runtimes.gguf_model import (
    ROPE_FACTORS,
    Place,
    architecture_of,
    places,
    position_factors,
    write_metadata,
)
from gossamer.runtimes.gguf_session import LlamaSession
from gossamer.runtimes.gguf_tokenizer import read_vocabulary
from gossamer.tasks.base import Task

MODEL_FILE = "model.gguf"
TENSORS_KEY = "gossamer.tensors"
ALIGNMENT = 32  # every tensor begins at a multiple of this many bytes
FLOATS = {torch.float32: ("F32", 4), torch.float16: ("F16", 2), torch.bfloat16: ("BF16", 2)}
FLOAT_BITS = {"F32": 32, "F16": 16, "BF16": 16}
FILE_TYPES = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}
SLICE = 1 << 22  # codes looked at together when a file is read back


@dataclass(frozen=True)
class _Plan:
    """Say how one parameter is written: where, as which type, and which codes."""

    place: Place
    shape: tuple[int, ...]
    kind: str
    num_bytes: int
    quantized: Quantized | None = None


class Gguf(Runtime):
    """Write GGUF files of Llama-like models, and open them in llama.cpp."""

    name: ClassVar[str] = "gguf"
    extra: ClassVar[str | None] = "gguf"
    files: ClassVar[tuple[str, ...]] = ("*.gguf",)
    holds_adapters: ClassVar[bool] = False
    needs_config: ClassVar[bool] = True
    holds_layers: ClassVar[bool] = False  # llama.cpp opens models of known architectures only
    holds_blocks: ClassVar[bool] = True
    rounds_inputs: ClassVar[bool] = True

    def missing(self) -> str | None:
        """Return the package without which no file is written or read back, or None."""
        return None if importlib.util.find_spec("gguf") is not None else "gguf"

    def refusal(
        self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, activation: ActivationSpec | None
    ) -> str | None:
        """Return why a layer cannot be held like this, or None when it can."""
        if activation is not None:
            return "llama.cpp rounds the inputs of layers on its own, in blocks of 32; use weight-only quantization"
        if spec is None:
            return None
        if spec.number_format is not None:
            return f"{spec.format} codes are not lowered to GGUF blocks; use integers, or another runtime"
        if role in ("norm", "convolution") or len(shape) != 2:
            return "GGUF blocks hold matrices of linear layers and embeddings only"
        if spec.block_format is not None:
            if shape[1] % spec.block_format.size == 0:
                return None
            return f"{spec.format} blocks hold {spec.block_format.size} weights, which do not divide {shape[1]} inputs"
        if exact_format(spec, shape[1]) is not None:
            return None
        if shape[1] % BLOCK:
            return f"GGUF blocks hold {BLOCK} weights, which do not divide the {shape[1]} inputs of a row"
        if (spec.group_size or BLOCK) % BLOCK:
            return f"GGUF blocks have a scale for {BLOCK} weights; group_size {spec.group_size} is not a multiple"
        return f"no GGUF block holds asymmetric codes of {spec.bits} bits; use at most 5, symmetric ones, or `gguf`"

    def stored_bytes(self, role: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype_bytes: int) -> int:
        """Return the bytes of one parameter in the file, up to where the next one may begin.

        >>> Gguf().stored_bytes("q", (64, 64), QuantSpec(bits=4, group_size=32), 4)
        2304
        """
        count = int(np.prod(shape, dtype=np.int64))
        if spec is None:
            return _aligned(count * (4 if len(shape) == 1 else dtype_bytes))
        form = spec.block_format or exact_format(spec, shape[1])
        if form is None or shape[1] % form.size:
            raise RuntimeUnavailable(f"no GGUF block holds {spec} codes in rows of {shape[1]}")
        return _aligned(shape[0] * form.row_bytes(shape[1]))

    def write(self, candidate: Candidate, folder: Path, request: ExportRequest) -> None:
        """Write model.gguf.

        Raises RuntimeUnavailable for an architecture, a tokenizer, rounded inputs or a row length that it cannot hold.
        """
        import gguf

        self.check_stock(candidate)
        module = candidate.module
        architecture = architecture_of(module)
        if candidate.activations:
            raise RuntimeUnavailable(
                f"the recipe rounds the inputs of {next(iter(candidate.activations))}; llama.cpp rounds inputs on its "
                "own, in blocks of 32",
                "use weight-only quantization, or another runtime",
            )
        factors = position_factors(module)
        plans = _plans(candidate)
        writer = gguf.GGUFWriter(folder / MODEL_FILE, architecture.name)
        write_metadata(writer, module, candidate.source.name)
        read_vocabulary(candidate.source, int(module.config.vocab_size)).write(writer)  # type: ignore[union-attr, arg-type]
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(plans))
        writer.add_string(TENSORS_KEY, json.dumps(_described(plans), sort_keys=True))
        for plan in plans:
            kind = gguf.GGMLQuantizationType[plan.kind]
            # the type that is stored is `kind`; a byte type here would mean that the shape is counted in bytes
            writer.add_tensor_info(plan.place.stored_name, plan.shape, np.dtype(np.float32), plan.num_bytes, kind)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, tuple(factors.shape), np.dtype(np.float32), factors.numel() * 4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for plan in plans:
            writer.write_tensor_data(_stored(plan, module.get_parameter(plan.place.parameter)))
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        writer.close()

    def open(self, folder: Path, *, threads: int, task: Task | None = None) -> Session:
        """Open the file in llama.cpp. Raises RuntimeUnavailable when its Python binding is not installed."""
        return LlamaSession(_existing(folder), threads, task.output if task else "logits")

    def stored_tensors(self, folder: Path) -> list[StoredTensor]:
        """Read back from the file alone how each parameter is held."""
        import gguf

        reader = gguf.GGUFReader(_existing(folder))
        key = reader.get_field(TENSORS_KEY)
        described = json.loads(key.contents()) if key is not None else {}
        stored = [
            _read(tensor, described.get(tensor.name, {})) for tensor in reader.tensors if tensor.name != ROPE_FACTORS
        ]
        return sorted(stored, key=lambda tensor: tensor.name)

    def load_snippet(self, task: Task) -> str:
        """Return the lines with which a user opens the file."""
        return (
            "from llama_cpp import Llama\n\n"
            f'model = Llama("path/to/{MODEL_FILE}", n_ctx=2048, logits_all=True)\n'
            'model.eval(model.tokenize(b"text"))\n'
            f"{task.output} = model.scores[: model.n_tokens]\n"
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _existing(folder: Path) -> Path:
    path = folder / MODEL_FILE
    if not path.exists():
        raise ArtifactError(f"{folder} holds no {MODEL_FILE}", "write the artifact again")
    return path


def _stored(plan: _Plan, parameter: Tensor) -> np.ndarray[Any, Any]:
    """Return a parameter as it lies in the file."""
    order_O, quantized, name = plan.place.order_O, plan.quantized, plan.place.parameter
    if quantized is not None:
        ordered = quantized if order_O is None else _reordered(quantized, order_O)
        rows_Oy = ordered.codes if ordered.spec.block_format is not None else encode_codes(ordered, name)[1]
        return rows_Oy.contiguous().numpy()
    weight = parameter.detach() if order_O is None else parameter.detach()[order_O]
    dtype = next(dtype for dtype, (kind, _) in FLOATS.items() if kind == plan.kind)
    cast = weight.to(dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise ArtifactError(f"{name} has values that {plan.kind} cannot hold", "cast the model to bf16 instead")
    return cast.view(torch.uint8).numpy()


def _plans(candidate: Candidate) -> list[_Plan]:
    """Return how every parameter is written, in the order of the model."""
    # codes may be recorded under the other name of a tied parameter
    codes = {id(candidate.module.get_parameter(name)): quantized for name, quantized in candidate.quantized.items()}
    parameters = dict(candidate.module.named_parameters())
    plans = []
    for place in places(candidate.module):
        parameter = parameters[place.parameter]
        quantized = codes.get(id(parameter))
        shape = tuple(parameter.shape)
        if quantized is None:
            kind, size = FLOATS[candidate.dtype if parameter.dim() > 1 else torch.float32]
            plans.append(_Plan(place, shape, kind, parameter.numel() * size))
            continue
        form = _format_of(place.parameter, quantized)
        plans.append(_Plan(place, shape, form.name, shape[0] * form.row_bytes(shape[1]), quantized))
    return plans


def _format_of(name: str, quantized: Quantized) -> BlockFormat:
    """Return the format that holds the codes of a matrix unchanged."""
    if len(quantized.shape) == 2 and not quantized.transposed:
        form = quantized.spec.block_format or exact_format(quantized.spec, quantized.shape[1])
        if form is not None:
            return form
    raise RuntimeUnavailable(
        f"no GGUF block holds {quantized.spec} codes of {name}, {tuple(quantized.shape)}",
        f"name {name.removesuffix('.weight')} under `ignore`, round it by the step `gguf`, or use another runtime",
    )


def _reordered(quantized: Quantized, order_O: Tensor) -> Quantized:
    """Return codes, scales and zero points with their rows in another order."""
    zero_point = None if quantized.zero_point is None else quantized.zero_point[order_O]
    return replace(quantized, codes=quantized.codes[order_O], scale=quantized.scale[order_O], zero_point=zero_point)


def _file_type(plans: list[_Plan]) -> int:
    """Return the number by which tools call the file: the type that most of its bytes are in."""
    from gguf import LlamaFileType

    totals: dict[str, int] = {}
    for plan in plans:
        totals[plan.kind] = totals.get(plan.kind, 0) + plan.num_bytes
    kind = max(totals, key=lambda kind: totals[kind])
    return int(LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind}")])


def _described(plans: list[_Plan]) -> dict[str, dict[str, Any]]:
    """Return what the file says of each tensor: its parameter, and the grid of its codes."""
    described: dict[str, dict[str, Any]] = {}
    for plan in plans:
        entry: dict[str, Any]
        described[plan.place.stored_name] = entry = {"parameter": plan.place.parameter}
        if plan.quantized is not None:
            entry["spec"] = plan.quantized.spec.model_dump()
    return described


def _read(tensor: Any, description: Mapping[str, Any]) -> StoredTensor:
    """Return how a tensor is held; a grid that the file claims is checked against codes and scales."""
    kind = tensor.tensor_type.name
    name = description.get("parameter", tensor.name)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    size = _aligned(int(tensor.n_bytes))
    if kind in FLOAT_BITS:
        return StoredTensor(name, kind, FLOAT_BITS[kind], None, True, shape, size)
    if kind not in FORMATS:
        raise ArtifactError(f"{name} is stored as {kind}; known are {', '.join([*FLOAT_BITS, *FORMATS])}")
    form = FORMATS[kind]
    if "spec" not in description:
        return StoredTensor(name, kind, form.bits, form.size // form.num_parts, not form.has_minimum, shape, size)
    spec = QuantSpec.model_validate(description["spec"])
    if (spec.block_format or exact_format(spec, shape[1])) != form:
        raise ArtifactError(f"{name} claims {spec} codes, but is stored as {kind}", "write the artifact again")
    if spec.block_format is not None:
        return StoredTensor(name, spec.format, spec.bits, spec.group_size, spec.symmetric, shape, size)
    for rows in _row_slices(tensor.data, shape[1]):
        _check_grid(name, spec, form, rows)
    return StoredTensor(name, kind, spec.bits, spec.group_size, spec.symmetric, shape, size)


def _row_slices(data: Any, num_inputs: int) -> Iterator[Tensor]:
    step = max(1, SLICE // num_inputs)
    for start in range(0, data.shape[0], step):
        yield torch.from_numpy(np.array(data[start : start + step]))


def _check_grid(name: str, spec: QuantSpec, form: BlockFormat, rows_Oy: Tensor) -> None:
    """Raise ArtifactError when codes are wider than claimed, or blocks of one group have different scales."""
    blocks = unpack(rows_Oy.reshape(-1, form.num_bytes), form)
    low = 0 if form.has_minimum else spec.low
    least, most = int(blocks.codes.min()), int(blocks.codes.max())
    if least < low or most > low + (1 << spec.bits) - 1:
        raise ArtifactError(f"{name} claims {spec.bits} bits, but its codes reach from {least} to {most}")
    for number_N in (blocks.scale, blocks.minimum):
        if number_N is None:
            continue
        scales_OB = number_N.reshape(rows_Oy.shape[0], -1)
        groups = scales_OB.reshape(-1, (spec.group_size or scales_OB.shape[1] * BLOCK) // BLOCK)
        if not bool((groups == groups[:, :1]).all()):
            raise ArtifactError(f"{name} claims {spec}, but blocks of one group have different scales")
