"""What stands beside a model's weights: config, tokenizer, processor; some of it may be other than in the folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from gossamer.errors import ModelError
from gossamer.models import checkpoint

WEIGHTS = (".safetensors", ".index.json")


@dataclass(frozen=True)
class Beside:
    """Hold the names of what ships beside the weights in a folder (None: a network, with which nothing ships).

    `replaced` are contents, by name, that take the place of the folder's own.
    """

    path: Path | None
    names: tuple[str, ...]
    replaced: Mapping[str, bytes]

    @classmethod
    def of(cls, path: Path | None, shipped: list[Path], replaced: Mapping[str, bytes]) -> Beside:
        """Return what is no weight among the files that ship."""
        return cls(path, tuple(file.name for file in shipped if not file.name.endswith(WEIGHTS)), replaced)

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        assert self.path is not None
        return self.replaced[name] if name in self.replaced else (self.path / name).read_bytes()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a folder that holds the files: the model's own, where nothing was replaced."""
        assert self.path is not None
        if not self.replaced:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="gossamer-beside-") as folder:
            for name in self.names:
                (Path(folder) / name).write_bytes(self.read(name))
            yield Path(folder)


def processor_class(folder: Path) -> Any:
    """Return the Auto class for what lies in a folder: a tokenizer, an image processor, or both."""
    tokenizer_names = ("tokenizer.json", "tokenizer_config.json", *checkpoint.SLOW_TOKENIZER_FILES)
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in tokenizer_names)
    has_processor = any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))
    if has_tokenizer and has_processor:
        return transformers.AutoProcessor
    if has_tokenizer:
        return transformers.AutoTokenizer
    if has_processor:
        return transformers.AutoImageProcessor
    raise ModelError(
        f"{folder} holds no tokenizer and no image processor",
        "save it beside the model: tokenizer.save_pretrained(folder) or image_processor.save_pretrained(folder)",
    )
