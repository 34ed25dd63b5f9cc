from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.errors import MeasureError
from gossamer.measure.size import human_size, shipped_bytes


def test_counts_files_and_folders_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    weights, config = tmp_path / "deep" / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(b"x" * 1000)
    config.write_bytes(b"y" * 34)
    (tmp_path / "hard").hardlink_to(weights)
    (tmp_path / "soft").symlink_to(weights)
    assert shipped_bytes([weights, config, weights]) == 1034
    assert shipped_bytes([tmp_path]) == 1034
    assert shipped_bytes([tmp_path / "soft"]) == 1000
    assert shipped_bytes([]) == 0


def test_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match=r"gone\.onnx: it does not exist"):
        shipped_bytes([tmp_path / "gone.onnx"])


@pytest.mark.parametrize(
    ("size", "decimal", "binary"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (90_900_000, "90.9 MB", "86.7 MiB"),
        (538_100_000, "538.1 MB", "513.2 MiB"),
        (1_000_000, "1 MB", "976.6 KiB"),
        (999_999_999, "1 GB", "953.7 MiB"),
        (25_276_510_208, "25.3 GB", "23.5 GiB"),
    ],
)
def test_writes_sizes_for_people(size: int, decimal: str, binary: str) -> None:
    assert human_size(size) == decimal
    assert human_size(size, binary=True) == binary
