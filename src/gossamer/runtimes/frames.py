"""Frames between a process and its child: a JSON header and arrays as safetensors, each behind its length. No pickle.

8 bytes  b"gossamer"
4 bytes  length of the header, little endian
8 bytes  length of the payload
header   JSON object, UTF-8
payload  safetensors, or nothing
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

MAGIC = b"gossamer"
PREFIX = struct.Struct("<8sIQ")
MAX_HEADER = 256 * 2**20  # time samples and error texts; more is a sign of a foreign stream

Header = dict[str, Any]


class BadFrame(Exception):
    """The stream does not hold a frame."""


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return arrays as safetensors bytes; nothing for none. Raises TypeError for a dtype that safetensors lacks."""
    if not arrays:
        return b""
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(f"array {name!r} has dtype {array.dtype}, which is not a number")
    return save({name: np.require(array, requirements="C") for name, array in arrays.items()})


def unpack_arrays(payload: bytes) -> dict[str, NDArray[Any]]:
    """Return the arrays of `pack_arrays`."""
    return load(payload) if payload else {}


def pack_frame(header: Header, payload: bytes = b"") -> bytes:
    """Return a frame as bytes. Example: `write(pack_frame({"op": "run"}, pack_arrays(inputs)))`."""
    text = json.dumps(header).encode()
    return PREFIX.pack(MAGIC, len(text), len(payload)) + text + payload


def read_frame(read_exactly: Callable[[int], bytes]) -> tuple[Header, bytes]:
    """Read one frame; `read_exactly(n)` returns n bytes or raises EOFError. Raises BadFrame for anything else."""
    magic, header_length, payload_length = PREFIX.unpack(read_exactly(PREFIX.size))
    if magic != MAGIC or header_length > MAX_HEADER:
        raise BadFrame(f"expected a frame, got {magic!r} with a header of {header_length} bytes")
    header = json.loads(read_exactly(header_length))
    if not isinstance(header, dict):
        raise BadFrame(f"expected an object as header, got {type(header).__name__}")
    return header, read_exactly(payload_length) if payload_length else b""
