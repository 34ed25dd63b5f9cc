"""Runtimes are found by name; what is missing is said with the command that adds it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gossamer.errors import RuntimeUnavailable
from gossamer.runtimes import RUNTIMES, available_runtimes, get_runtime
from gossamer.runtimes.openvino import OpenVino


def test_every_name_leads_to_the_runtime_of_that_name() -> None:
    for name, command in available_runtimes().items():
        if command is None:
            assert get_runtime(name).name == name
    assert set(available_runtimes()) == set(RUNTIMES)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RuntimeUnavailable, match="tensorrt") as caught:
        get_runtime("tensorrt")
    assert all(name in caught.value.hint for name in RUNTIMES)


def test_a_missing_package_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "missing", lambda self: "openvino")
    with pytest.raises(RuntimeUnavailable, match="openvino") as caught:
        get_runtime("openvino")
    assert caught.value.hint == 'pip install "gossamer[openvino]"'
    assert available_runtimes()["openvino"] == 'pip install "gossamer[openvino]"'


def test_naming_runtimes_imports_none_of_them() -> None:
    program = "import sys, gossamer.runtimes; print([n for n in ('openvino', 'onnxruntime') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
