"""Image classification: one picture in, one of the model's classes out; scored by accuracy."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from gossamer.data.table import place_of
from gossamer.errors import DataError, TaskError
from gossamer.tasks.base import Arrays, Batch, Row
from gossamer.tasks.classification import LABEL_NAMES, Classification, labels_of

if TYPE_CHECKING:
    from gossamer.models.source import Source


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ImageClassification(Classification):
    """Prepare images as the model's own image processor does; there is nothing to set."""

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "image": ("img", "images", "picture", "photo", "pixel_values", "file_name", "filename", "file", "path"),
        "label": LABEL_NAMES,
    }
    input_axes: ClassVar[dict[str, dict[int, str]]] = {"pixel_values": {0: "batch"}}

    def batches(self, rows: Sequence[Row], source: Source, *, batch_size: int = 1) -> list[Batch]:
        """Return the rows' pixels in their order, float32 [B, channels, height, width].

        An image may also be an array [channels, height, width] of prepared pixels, for models without a processor.

        Every image is decoded here, so that a corrupt one is known before anything is measured. The pixels are kept
        in an unnamed temporary file that is mapped into memory: ten thousand large images need disk, not memory.
        """
        if not rows:
            raise DataError("there are no rows", "give at least one row")
        labels_N = labels_of(rows, source)
        prepared = all(isinstance(row.get("image"), np.ndarray) for row in rows)
        processor = None if prepared else source.processor()
        mode = "L" if getattr(source.config, "num_channels", 3) == 1 else "RGB"
        starts = range(0, len(rows), batch_size)
        shapes = []
        with tempfile.TemporaryFile() as file:
            for start in starts:
                part = [
                    (row, place_of(row, index)) for index, row in enumerate(rows[start : start + batch_size], start)
                ]
                pixels = _stacked(part) if processor is None else _processed(part, processor, mode)
                shapes.append(pixels.shape)
                _append(file, pixels)
            stored = np.memmap(file, dtype=np.float32, mode="r+").view(np.ndarray)
        found = []
        offset = 0
        for start, shape in zip(starts, shapes, strict=True):
            size = int(np.prod(shape))
            inputs: Arrays = {"pixel_values": stored[offset : offset + size].reshape(shape)}
            offset += size
            targets = {} if labels_N is None else {"labels": labels_N[start : start + shape[0]]}
            found.append(Batch(inputs, np.arange(start, start + shape[0]), targets))
        return found

    def latency_inputs(self, batches: Sequence[Batch]) -> Arrays:
        """Return the image of median size (the first of them), batch 1."""
        if not batches:
            raise TaskError("there is no row to make a request of", "give at least one row")
        sizes = np.array([batch.inputs["pixel_values"][0].size for batch in batches])
        median = np.sort(sizes)[(len(sizes) - 1) // 2]
        batch = batches[int(np.flatnonzero(sizes == median)[0])]
        return {name: np.array(values[:1]) for name, values in batch.inputs.items()}


def _processed(part: list[tuple[Row, str]], processor: Any, mode: str) -> NDArray[np.float32]:
    images = [read_image(row.get("image"), place, mode) for row, place in part]
    return np.asarray(processor(images, return_tensors="np")["pixel_values"], dtype=np.float32)


def _stacked(part: list[tuple[Row, str]]) -> NDArray[np.float32]:
    shape = part[0][0]["image"].shape
    for row, place in part:
        if row["image"].shape != shape:
            raise DataError(f"{place}: pixels of shape {row['image'].shape} in a batch of {shape}", "use batch_size=1")
    return np.stack([row["image"] for row, _ in part]).astype(np.float32)


def _append(file: IO[bytes], pixels: NDArray[np.float32]) -> None:
    try:
        file.write(pixels.tobytes())
        file.flush()
    except OSError as error:
        raise DataError(
            f"no room for {pixels.nbytes} more bytes of pixels in {tempfile.gettempdir()}: {error.strerror}",
            "free some space there, set TMPDIR to another disk, or give fewer rows",
        ) from error


def read_image(cell: Any, place: str, mode: str) -> Image.Image:
    """Return a PIL image of `mode` ("L" or "RGB"), upright, from a PIL image, encoded bytes, {"bytes": ...} or a path.

    Raises DataError naming the place when the image is missing, cut short, or not an image.
    """
    if isinstance(cell, Image.Image):
        return cell.convert(mode)
    found = cell
    if isinstance(cell, Mapping):
        found = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if not isinstance(found, bytes | str | Path):
        raise DataError(
            f"{place}: no image but a {type(cell).__name__}", "say which column holds it: --column image=NAME"
        )
    named = "" if isinstance(found, bytes) else f" {found}"
    try:
        with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{place}: the image{named} cannot be read: {error}", "remove the row, or replace it"
        ) from error
