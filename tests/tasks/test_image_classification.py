"""Pixels equal a plain numpy preparation; every way of storing an image gives the same; a corrupt one names its row."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.data import bind_columns, read_rows
from gossamer.errors import DataError
from gossamer.models.source import Source
from gossamer.tasks import Arrays, Task, get_task
from gossamer.tasks.base import each
from gossamer.tasks.image_classification import read_image

TASK = get_task("image-classification")


def encoded(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PIXELS = [np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8) for seed in range(5)]
ROWS = [{"image": encoded(pixels), "label": index % 3} for index, pixels in enumerate(PIXELS)]


def test_pixels_equal_plain_arithmetic(resnet: Source) -> None:
    for batch_size in (1, 2):
        batches = TASK.batches(ROWS, resnet, batch_size=batch_size)
        found = np.concatenate([batch.inputs["pixel_values"] for batch in batches])
        assert found.dtype == np.float32
        expected = ((np.stack(PIXELS) / 255 - 0.25) / 0.5)[:, None]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.concatenate([batch.targets["labels"] for batch in batches]).tolist() == [0, 1, 2, 0, 1]
        assert np.concatenate([batch.samples for batch in batches]).tolist() == [0, 1, 2, 3, 4]


def test_every_way_of_storing_gives_the_same_image(resnet: Source, tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    path.write_bytes(ROWS[0]["image"])
    cells: list[Any] = [
        {"bytes": ROWS[0]["image"], "path": None}, {"bytes": None, "path": str(path)}, path, str(path),
        Image.open(path), Image.open(path).convert("RGB"),
    ]  # fmt: skip
    for cell in cells:
        np.testing.assert_array_equal(np.asarray(read_image(cell, "row 1", "L")), PIXELS[0])
    assert read_image(path, "row 1", "RGB").mode == "RGB"


def test_evaluation_and_request(resnet: Source, runner: Callable[[Source, Task], Callable[[Arrays], Arrays]]) -> None:
    run = runner(resnet, TASK)
    batches = TASK.batches(ROWS, resnet, batch_size=2)
    found = TASK.evaluate(each(run), batches)
    logits = run({"pixel_values": np.concatenate([batch.inputs["pixel_values"] for batch in batches])})["logits"]
    assert found.scores.sums.tolist() == (logits.argmax(1) == np.array([0, 1, 2, 0, 1])).astype(float).tolist()
    np.testing.assert_allclose(found.kept["log_probs"], torch.from_numpy(logits).log_softmax(1).numpy(), atol=1e-5)
    assert TASK.latency_inputs(batches)["pixel_values"].shape == (1, 1, 8, 8)


def test_a_corrupt_image_names_its_row(resnet: Source, tmp_path: Path) -> None:
    for label in ("0", "1"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(encoded(PIXELS[0]))
    (tmp_path / "1" / "b.png").write_bytes(encoded(np.tile(PIXELS[0], (8, 8)))[:-200])
    rows = bind_columns(read_rows(tmp_path), TASK)
    with pytest.raises(DataError, match=r"image 3: the image .*b\.png cannot be read"):
        TASK.batches(rows, resnet)
    for cell in (b"no image", b"", tmp_path / "none.png"):
        with pytest.raises(DataError, match="row 2: the image"):
            TASK.batches([ROWS[0], {"image": cell, "label": 0}], resnet)
    with pytest.raises(DataError, match="row 2: no image but a int"):
        TASK.batches([ROWS[0], {"image": 5, "label": 0}], resnet)


def test_labels(resnet: Source) -> None:
    with pytest.raises(DataError, match="row 1: the model does not know the label 3"):
        TASK.batches([{"image": ROWS[0]["image"], "label": 3}], resnet)
    with pytest.raises(DataError, match="row 1: the model does not know the label 'cat'") as error:
        TASK.batches([{"image": ROWS[0]["image"], "label": "cat"}], resnet)
    assert "id2label" in error.value.hint
    # a model whose classes have no names takes the numbers of the data
    (batch,) = TASK.batches([{"image": ROWS[0]["image"], "label": 2, "label_name": "cat"}], resnet)
    assert batch.targets["labels"].tolist() == [2]


def test_prepared_pixels_need_no_processor() -> None:
    source = Source.open(torch.nn.Flatten(), forward=lambda module, inputs: module(inputs["pixel_values"]))
    pixels = np.random.default_rng(0).normal(size=(2, 1, 4, 4))
    (batch,) = TASK.batches([{"image": image, "label": 1} for image in pixels], source, batch_size=2)
    np.testing.assert_allclose(batch.inputs["pixel_values"], pixels, rtol=1e-6)
    with pytest.raises(DataError, match=r"row 2: pixels of shape \(1, 4, 5\) in a batch of \(1, 4, 4\)"):
        TASK.batches([{"image": pixels[0]}, {"image": np.zeros((1, 4, 5))}], source, batch_size=2)
