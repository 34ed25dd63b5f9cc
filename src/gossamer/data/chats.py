"""Rows that are conversations: `messages` of turns, or a `prompt` with its `completion`.

A turn is {"role": ..., "content": ...}; rows with {"from": ..., "value": ...} are read alike. A content given in parts
is the text of its parts. How turns become the text that a model sees is the model's matter (its chat template).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gossamer.errors import DataError

Turns = list[dict[str, str]]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
HINT = 'a row looks like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def is_turns(cell: object) -> bool:
    """Say whether a cell holds turns: a list of mappings with a role (or the JSON text of one)."""
    cell = _parsed(cell)
    return isinstance(cell, list) and bool(cell) and all(isinstance(turn, Mapping) for turn in cell)


def read_turns(cell: object, place: str) -> Turns:
    """Return a cell's turns as {"role", "content"}. Raises DataError naming the turn that has no role or no text.

    >>> read_turns([{"from": "human", "value": "Hello"}], "row 1")
    [{'role': 'user', 'content': 'Hello'}]
    """
    cell = _parsed(cell)
    if not isinstance(cell, list) or not cell:
        raise DataError(f"{place}: the messages are not a list of turns", HINT)
    found = []
    for number, turn in enumerate(cell, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"{place}: turn {number} is a {type(turn).__name__}, not a mapping", HINT)
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        text = _text(content)
        if not isinstance(role, str) or text is None:
            raise DataError(f"{place}: turn {number} has no role or no text (found {', '.join(map(str, turn))})", HINT)
        found.append({"role": ROLES.get(role, role), "content": text})
    if not any(turn["content"].strip() for turn in found):
        raise DataError(f"{place}: none of {len(found)} turns says anything", "remove the row, or fill it in")
    return found


def _parsed(cell: object) -> object:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return list(cell) if isinstance(cell, tuple) else cell


def _text(content: Any) -> str | None:
    """Return a turn's text, "" for a turn without content (a call of a tool), None for what is no text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    return None
