from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.run.fingerprint import canonical, code_version, files_below, hash_file, hash_folder, hash_json


def test_known_values() -> None:
    assert canonical({"b": (1, None), "a": "é"}) == '{"a":"é","b":[1,null]}'
    assert hash_json({}) == hashlib.sha256(b"{}").hexdigest()


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers() | st.text(), min_size=2), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, int | str], randomness: object) -> None:
    keys = list(value)
    randomness.shuffle(keys)  # type: ignore[attr-defined]
    assert hash_json({key: value[key] for key in keys}) == hash_json(value)


@pytest.mark.parametrize("other", [{"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": True}, {"a": [1]}, {"a": 1, "b": None}])
def test_other_values_have_other_hashes(other: dict[str, object]) -> None:
    assert hash_json(other) != hash_json({"a": 1})  # type: ignore[arg-type]


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="float"):
        hash_json(float("nan"))
    with pytest.raises(TypeError):
        hash_json({"a": Path("x")})  # type: ignore[dict-item]


def test_a_folder_is_its_names_and_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_bytes(b"x" * 3_000_000)
    one, two = tmp_path / "one", tmp_path / "two"
    os.utime(two / "deep" / "file", (1, 1))
    assert files_below(one) == ["deep/file"]
    assert hash_folder(one) == hash_folder(two)
    assert hash_file(one / "deep" / "file") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    (two / "deep" / "file").rename(two / "deep" / "other")
    assert hash_folder(one) != hash_folder(two)


def test_the_code_has_one_version() -> None:
    assert code_version() == code_version()
    assert len(code_version()) == 64
