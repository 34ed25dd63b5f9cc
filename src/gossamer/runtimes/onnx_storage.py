"""How an ONNX file holds quantized parameters: which tensors, how many bytes, and how to read them back.

Two layouts for integers, chosen from shape and grid alone:

- `blocks`, what MatMulNBits and GatherBlockQuantized read: unsigned codes of 2, 4 or 8 bits, low bits first, as
  uint8 [O, I / block, block * bits / 8]. `block` is the largest of 256, 128, 64, 32, 16 that divides the group, so
  nothing is ever padded. A head and an embedding that are tied read the same bytes.
- `rows`, for everything else: signed codes [O, I] as INT8 (one byte) or INT4 (two a byte).

Codes that are no integers (`models/levels.py`) lie in one of two more:

- `bnb4`, what MatMulBnb4 reads, for NF4: places of levels from 0 on, two a byte, the first in the high half.
- `rows`: FP8 as FLOAT8E4M3FN [O, I], the others as places of levels, UINT4 [O, I].

Codes of 3 bits lie in 4-bit containers, 5 to 7 in 8-bit ones; adding 2^(b-1) to code and zero point turns signed into
unsigned and changes no value. Scales are stored once for each group of the grid, float32 [O, G]; where a kernel wants
one a block they are repeated by an Expand that ONNX Runtime folds when it opens the file. The same holds for every
Transpose and Cast of a stored tensor: the file is small, and what is folded costs time only once.

Shape suffixes: O output channels, I inputs, G groups of the grid in a row, B blocks of a row.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ArtifactError
from gossamer.runtimes.base import StoredTensor

if TYPE_CHECKING:
    import onnx_ir as ir

    from gossamer.models.quantized import Quantized, QuantSpec

BLOCKS = (256, 128, 64, 32, 16)  # what MatMulNBits takes
LEDGER = "gossamer.tensors"  # key of the model's metadata: what each stored parameter is
NEEDS = "gossamer.needs"  # key of the model's metadata: what the processor must have, absent where any will do
INT8_DOT_PRODUCTS = "int8 dot products"


@dataclass(frozen=True)
class Layout:
    """Say how codes lie in the file: `bits` of the container, `block` inputs of a block (0 for rows)."""

    kind: Literal["blocks", "rows", "bnb4"]
    bits: int
    block: int = 0


def block_layout(num_inputs: int, spec: QuantSpec) -> Layout | None:
    """Return the `blocks` layout of a weight with rows of `num_inputs`, or None when no block divides its groups."""
    group = spec.group_size or num_inputs
    block = next((size for size in BLOCKS if group % size == 0), None)
    bits = 2 if spec.bits == 2 else 4 if spec.bits <= 4 else 8
    return Layout("blocks", bits, block) if block and num_inputs % group == 0 else None


def row_layout(spec: QuantSpec) -> Layout:
    """Return the `rows` layout of a grid."""
    return Layout("rows", 4 if spec.bits <= 4 else 8)


def level_layout(num_inputs: int, spec: QuantSpec, multiplied: bool) -> Layout:
    """Return the layout of codes that are no integers; `multiplied` says that nothing but products reads the weight."""
    blocks = block_layout(num_inputs, spec) if spec.format == "nf4" and multiplied else None
    return row_layout(spec) if blocks is None else Layout("bnb4", 4, blocks.block)


def parameter_bytes(shape: tuple[int, ...], spec: QuantSpec, layout: Layout) -> int:
    """Return the bytes of codes, scales and zero points of a weight [O, I...]."""
    rows, inputs = shape[0], math.prod(shape[1:])
    groups = inputs // (spec.group_size or inputs)
    total = math.ceil(rows * inputs * layout.bits / 8) + 4 * rows * groups
    if spec.symmetric:
        return total
    if layout.kind == "rows":
        return total + math.ceil(rows * groups * layout.bits / 8)
    return total + rows * math.ceil(_num_zero_points(inputs, groups, layout) * layout.bits / 8)


def _num_zero_points(inputs: int, groups: int, layout: Layout) -> int:
    """Return how many zero points of a row are stored: one a group, or one a block where those differ (packed bits
    cannot be repeated by an Expand), or one for the whole row.
    """
    blocks = inputs // layout.block
    return 1 if groups == 1 else blocks


def expert_container(spec: QuantSpec) -> int:
    """Return the bits that a code of an expert takes: ONNX Runtime's operator for experts has 2, 4 and 8."""
    return 2 if spec.bits == 2 else 4 if spec.bits <= 4 else 8


def expert_bytes(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Return the bytes of one layer of an expert [O, I] in the file: codes, scales and zero points."""
    return _expert_bytes(shape[0], shape[1], expert_container(spec), spec.group_size, spec.symmetric)


def _expert_bytes(rows: int, inputs: int, bits: int, group_size: int | None, symmetric: bool) -> int:
    groups = inputs // (group_size or inputs)
    zeros = rows * math.ceil(groups * bits / 8) if group_size else math.ceil(rows * bits / 8)
    return rows * inputs * bits // 8 + 4 * rows * groups + (0 if symmetric else zeros)


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return unsigned codes [..., n] packed low bits first, [..., ceil(n * bits / 8)]; the tail is filled with zeros.

    >>> pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist()
    [33, 3]
    """
    per_byte = 8 // bits
    tail = -codes.shape[-1] % per_byte
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, tail)])
    lanes = padded.reshape(*padded.shape[:-1], -1, per_byte)
    packed = np.zeros(lanes.shape[:-1], np.uint8)
    for lane in range(per_byte):
        packed |= lanes[..., lane] << np.uint8(bits * lane)
    return packed


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the first `count` codes of each row that `pack_bits` packed."""
    lanes = [(packed >> np.uint8(bits * lane)) & np.uint8(2**bits - 1) for lane in range(8 // bits)]
    return np.stack(lanes, axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]


def store(graph: ir.Graph, name: str, quantized: Quantized, layout: Layout) -> dict[str, Any]:
    """Add initializers `name.codes`, `name.scale` and (asymmetric) `name.zero_point`; return the ledger's entry."""
    codes_OI = quantized.codes.cpu().numpy()
    zero_OG = None if quantized.zero_point is None else quantized.zero_point.cpu().numpy()
    if layout.kind == "blocks":
        _store_blocks(graph, name, codes_OI, zero_OG, layout)
    elif quantized.spec.format != "int":
        _store_levels(graph, name, quantized, layout)
    else:
        kind = "INT4" if layout.bits == 4 else "INT8"
        add_initializer(graph, f"{name}.codes", codes_OI, kind)
        if zero_OG is not None:
            add_initializer(graph, f"{name}.zero_point", zero_OG, kind)
    add_initializer(graph, f"{name}.scale", quantized.scale.float().cpu().numpy())
    spec = quantized.spec
    entry = {
        "bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric, "shape": list(quantized.shape),
        "matrix": list(codes_OI.shape), "container": layout.bits, "block": layout.block,
    }  # fmt: skip
    return entry if spec.format == "int" else {**entry, "format": spec.format}


def _store_levels(graph: ir.Graph, name: str, quantized: Quantized, layout: Layout) -> None:
    codes_OI, spec = quantized.codes.cpu(), quantized.spec
    if spec.format == "fp8":
        levels_OI = spec.steps(codes_OI).numpy()
        add_initializer(graph, f"{name}.codes", levels_OI, "FLOAT8E4M3FN")  # exact
        return
    places_OI = (codes_OI.numpy().astype(np.int16) - spec.low).astype(np.uint8)
    if layout.kind == "bnb4":
        pairs = places_OI.reshape(-1, 2)
        add_initializer(graph, f"{name}.codes", pairs[:, 0] << np.uint8(4) | pairs[:, 1])
    else:
        add_initializer(graph, f"{name}.codes", places_OI, "UINT4")


def _store_blocks(
    graph: ir.Graph, name: str, codes_OI: NDArray[np.int8], zero_OG: NDArray[np.int8] | None, layout: Layout
) -> None:
    offset = 2 ** (layout.bits - 1)
    rows, inputs = codes_OI.shape
    unsigned = (codes_OI.astype(np.int16) + offset).astype(np.uint8)
    add_initializer(
        graph, f"{name}.codes", pack_bits(unsigned.reshape(rows, inputs // layout.block, layout.block), layout.bits)
    )
    if zero_OG is None:
        return
    zero_OB = (zero_OG.astype(np.int16) + offset).astype(np.uint8)
    if zero_OG.shape[1] == 1:  # one byte a row, every lane the same: an Expand repeats it for all blocks
        zero_OB = np.repeat(zero_OB, 8 // layout.bits, axis=1)
    else:
        zero_OB = np.repeat(zero_OB, inputs // layout.block // zero_OG.shape[1], axis=1)
    add_initializer(graph, f"{name}.zero_point", pack_bits(zero_OB, layout.bits))


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any], kind: str | None = None) -> None:
    """Store an array in a graph, as `kind` where numpy has no such numbers."""
    import onnx_ir as ir

    dtype = ir.DataType[kind] if kind else None
    values = array.astype(dtype.numpy()) if dtype else array
    tensor = ir.tensor(np.ascontiguousarray(values), dtype=dtype, name=name)
    graph.initializers[name] = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )


def read_stored(model: ir.Model) -> list[StoredTensor]:
    """Return how each parameter of the model lies in the file, checked against the tensors themselves.

    Raises ArtifactError when the ledger and the tensors disagree: codes outside their grid, scales of another grouping.
    """
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    ledger: dict[str, dict[str, Any]] = json.loads(model.metadata_props.get(LEDGER, "{}"))
    found = []
    for name, entry in sorted(ledger.items()):
        if "bits" in entry:
            read = _read_expert if "stack" in entry else _read_quantized
            found.append(read(name, entry, held))
            continue
        tensor = held.get(name)
        if tensor is None:
            raise ArtifactError(f"the file names {name} but does not hold it", "write the artifact again")
        bits = tensor.dtype.itemsize * 8
        kind = tensor.dtype.name.lower().replace("float", "float32") if bits == 32 else tensor.dtype.name.lower()
        found.append(StoredTensor(name, kind, int(bits), None, True, tuple(entry["shape"]), tensor.nbytes))
    return found


def _read_quantized(name: str, entry: dict[str, Any], held: dict[str, Any]) -> StoredTensor:
    parts = [held[part] for part in (f"{name}.codes", f"{name}.scale", f"{name}.zero_point") if held.get(part)]
    if held.get(f"{name}.codes") is None or held.get(f"{name}.scale") is None:
        raise ArtifactError(f"the file names {name} as quantized but holds no codes for it", "write the artifact again")
    rows, inputs = entry["matrix"]
    codes = parts[0].numpy()
    limit = 2 ** (entry["bits"] - 1)
    if "format" in entry:
        codes = _signed(codes, entry)
    elif entry["block"]:
        offset = 2 ** (entry["container"] - 1)
        codes = unpack_bits(codes, entry["container"], entry["block"]).astype(np.int16) - offset
    codes = codes.astype(np.int16)
    groups = inputs // (entry["group_size"] or inputs)
    symmetric = held.get(f"{name}.zero_point") is None
    wrong = None
    if codes.size != rows * inputs or codes.min() < -limit or codes.max() >= limit:
        span = f"{codes.size} codes {codes.min()}..{codes.max()}"
        wrong = f"{span} do not fit {entry['bits']} bits [{rows}, {inputs}]"
    elif tuple(parts[1].shape) != (rows, groups):
        wrong = f"scales {tuple(parts[1].shape)} do not fit {groups} groups of {rows} rows"
    elif symmetric != entry["symmetric"]:
        wrong = f"zero points {'absent' if symmetric else 'present'}, symmetric = {entry['symmetric']}"
    elif name in held:
        wrong = "a float copy lies beside the codes"
    if wrong:
        raise ArtifactError(f"{name}: {wrong}", "write the artifact again")
    kind = entry.get("format", f"int{entry['bits']}")
    size = sum(part.nbytes for part in parts)
    return StoredTensor(name, kind, entry["bits"], entry["group_size"], symmetric, tuple(entry["shape"]), size)


def _signed(codes: NDArray[Any], entry: dict[str, Any]) -> NDArray[np.int16]:
    """Return codes that are no integers as numbers of `bits` bits: places of levels around 0, or E4M3's patterns."""
    if entry["format"] == "fp8":
        return codes.view(np.int8).astype(np.int16)
    if entry["block"]:
        codes = np.stack([codes >> np.uint8(4), codes & np.uint8(0xF)], -1)
    return codes.astype(np.int16) - 8


def _read_expert(name: str, entry: dict[str, Any], held: dict[str, Any]) -> StoredTensor:
    """Return how one layer of a stack of experts lies in the file: its rows among those of its expert, in turns."""
    stack, expert, rows = entry["stack"], entry["expert"], slice(entry["number"], None, entry["of"])
    parts = {part: held.get(f"{stack}.{part}") for part in ("codes", "scale", "zero_point")}
    codes, scale, zero = parts["codes"], parts["scale"], parts["zero_point"]
    if codes is None or scale is None:
        raise ArtifactError(f"the file names {name} as quantized but holds no codes for it", "write the artifact again")
    num_rows, inputs = entry["matrix"]
    found = unpack_bits(codes.numpy()[expert, rows], entry["container"], inputs).astype(np.int16)
    found -= 2 ** (entry["container"] - 1)
    limit, groups = 2 ** (entry["bits"] - 1), inputs // (entry["group_size"] or inputs)
    scale_RG = scale.numpy()[expert, rows].reshape(num_rows, -1)
    wrong = None
    if found.shape != (num_rows, inputs) or found.min() < -limit or found.max() >= limit:
        wrong = (
            f"codes {found.min()}..{found.max()} {found.shape} do not fit {entry['bits']} bits [{num_rows}, {inputs}]"
        )
    elif scale_RG.shape[1] != groups:
        wrong = f"{scale_RG.shape[1]} scales for a row do not fit {groups} groups"
    elif (zero is None) != entry["symmetric"]:
        wrong = f"zero points {'absent' if zero is None else 'present'}, symmetric = {entry['symmetric']}"
    elif stack in held:
        wrong = "a float copy lies beside the codes"
    if wrong:
        raise ArtifactError(f"{name}: {wrong}", "write the artifact again")
    group_size, symmetric = entry["group_size"], entry["symmetric"]
    size = _expert_bytes(num_rows, inputs, entry["container"], group_size, symmetric)
    return StoredTensor(name, f"int{entry['bits']}", entry["bits"], group_size, symmetric, (num_rows, inputs), size)
