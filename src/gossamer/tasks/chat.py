"""What a row gives a language model to read: its text as it is, or a conversation in the model's own chat template.

The template comes with the tokenizer and runs in the sandbox of transformers (jinja2, immutable): it is text, not code
of the model's. A model without one reads the contents of the turns, a blank line between two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from gossamer.data.table import place_of
from gossamer.errors import DataError
from gossamer.tasks.base import Row
from gossamer.tasks.tokens import text_of

BETWEEN = "\n\n"  # turns of a model without a template


@dataclass(frozen=True)
class Rendered:
    """Hold the text of a row, and how it came about: `text`, `template`, or `joined` (a chat, but no template)."""

    text: str
    form: str

    @property
    def has_special_tokens(self) -> bool:
        """Say whether the text spells out the tokens that begin and end it."""
        return self.form == "template"


def rendered(row: Row, index: int, tokenizer: Any) -> Rendered:
    """Return what a language model reads of a row with `text`, `messages`, or `prompt` and `completion`.

    Raises DataError naming the row when there is no text, or when the model's template refuses the turns.
    """
    turns = turns_of(row)
    if turns is None:
        return Rendered(text_of(row, "text", index), "text")
    if not getattr(tokenizer, "chat_template", None):
        return Rendered(BETWEEN.join(turn["content"] for turn in turns if turn["content"]), "joined")
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{place_of(row, index)}: the model's chat template refuses the turns ({roles}): {error}",
            "give the turns in the order that the model was trained on, or the finished text as `text`",
        ) from error
    return Rendered(str(text), "template")


def turns_of(row: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """Return the turns of a row, or None for one with a plain text."""
    if "messages" in row:
        return list(row["messages"])
    if "prompt" in row and "completion" in row:
        return [*_as_turns(row["prompt"], "user"), *_as_turns(row["completion"], "assistant")]
    return None


def _as_turns(cell: Any, role: str) -> list[dict[str, str]]:
    return list(cell) if isinstance(cell, list) else [{"role": role, "content": cell}]


def in_words(forms: Sequence[str], model: str) -> str:
    """Return what was done with rows of these forms, for progress; empty when all were plain text."""
    counts = {form: list(forms).count(form) for form in ("template", "joined", "text")}
    said = []
    if counts["template"]:
        said.append(f"{counts['template']} chats went through the chat template of {model}")
    if counts["joined"]:
        said.append(f"{counts['joined']} chats were read as plain text: {model} has no chat template")
    if said and counts["text"]:
        said.append(f"{counts['text']} texts were read as they are")
    return "; ".join(said)
