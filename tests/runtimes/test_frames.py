from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gossamer.runtimes.child import exact_reader
from gossamer.runtimes.frames import BadFrame, pack_arrays, pack_frame, read_frame, unpack_arrays

NUMBERS = st.one_of(
    arrays.integer_dtypes(endianness="="),
    arrays.unsigned_integer_dtypes(endianness="="),
    arrays.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    arrays.boolean_dtypes(),
)


@given(
    st.dictionaries(st.text(), st.integers()),
    st.dictionaries(st.text("abc"), arrays.arrays(NUMBERS, arrays.array_shapes(min_dims=0, min_side=0))),
)
def test_frames_come_back_as_they_went(header: dict[str, int], content: dict[str, np.ndarray]) -> None:
    stream = io.BytesIO(pack_frame(header, pack_arrays(content)) + pack_frame({"next": 1}))
    found, payload = read_frame(exact_reader(stream))
    assert found == header
    back = unpack_arrays(payload)
    assert back.keys() == content.keys()
    for name, array in content.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
    assert read_frame(exact_reader(stream)) == ({"next": 1}, b"")


def test_a_transposed_array_is_packed_by_value() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(unpack_arrays(pack_arrays({"x": array}))["x"], array)


def test_a_foreign_stream_is_noticed() -> None:
    with pytest.raises(BadFrame, match="expected a frame, got b'Warning:'"):
        read_frame(exact_reader(io.BytesIO(b"Warning: libgomp found two versions of itself")))
    with pytest.raises(EOFError):
        read_frame(exact_reader(io.BytesIO(pack_frame({"op": "run"}, b"12345")[:-1])))


def test_text_does_not_travel() -> None:
    with pytest.raises(TypeError, match="'x' has dtype"):
        pack_arrays({"x": np.array(["text"])})
