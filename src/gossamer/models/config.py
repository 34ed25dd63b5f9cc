"""Where a model's folder is, and what its config says: a path or a hub id, and transformers' own reading of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.utils import logging as chatter

from gossamer.errors import ModelError, first_line

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and progress bars for a while, through its own settings, and restore them."""
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()  # type: ignore[no-untyped-call]


def local_folder(model: str | Path) -> Path:
    """Return the folder itself, or the folder in the ordinary hub cache that holds a hub id's files.

    Raises ModelError where there is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(model).expanduser()
    text = str(model)
    if path.exists() or isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        return path
    try:
        return Path(snapshot_download(text, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise ModelError(f"{text!r} is neither a folder nor a hub id", "check the path") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"there is no folder {text}, and the hub id {text} could not be fetched: {first_line(error)}",
            "check the name and the network, or download the model and give its folder",
        ) from error


def read_config(folder: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    """Return the config of a folder whose config.json holds `raw`. Raises ModelError where transformers refuses it."""
    model_type = raw.get("model_type")
    known = model_type in transformers.CONFIG_MAPPING
    if "auto_map" in raw and not known and not trust_remote_code:
        raise ModelError(
            f"{folder} needs its own Python code to open ({', '.join(map(str, raw['auto_map'].values()))})",
            "read that code; if you trust it, pass --trust-remote-code (trust_remote_code=True)",
        )
    if not known and "auto_map" not in raw:
        raise ModelError(
            f"transformers {transformers.__version__} knows no model_type {model_type!r} ({folder / 'config.json'})",
            "update transformers, or pass the nn.Module from Python",
        )
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configs are untrusted input: their validators raise errors of many kinds
        raise ModelError(f"{folder / 'config.json'} is refused by transformers: {first_line(error)}",
                         "mend the value that it names") from error  # fmt: skip
    assert isinstance(config, PretrainedConfig)
    return config
