"""What a terminal is given: nothing that steers it, and bars only where it can redraw them."""

from __future__ import annotations

import os
import unicodedata
from typing import TextIO


def plain(text: str) -> str:
    """Return text without control characters: names out of a model or data must not steer the terminal."""
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) in ("Cc", "Cf") and c != "\n" else c for c in text)


def draws_bars(stream: TextIO) -> bool:
    """Say whether a stream is a terminal that can redraw lines and wants to."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
