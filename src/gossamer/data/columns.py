"""Which column plays which role: guessed from the task's recognised names, or named by the user."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from gossamer.data.chats import is_turns, read_turns
from gossamer.data.table import PLACE, Row, Table
from gossamer.errors import DataError


class HasColumns(Protocol):
    """Say which roles there are and the names that are recognised as each; a task is one."""

    columns: ClassVar[dict[str, tuple[str, ...]]]
    optional_columns: ClassVar[frozenset[str]]
    instead: ClassVar[dict[str, tuple[tuple[str, ...], ...]]]  # role -> groups of roles that may stand in for it


def bind_columns(
    table: Table,
    task: HasColumns,
    overrides: Mapping[str, str] | None = None,
    *,
    optional: Collection[str] = (),
    skipped: list[str] | None = None,
) -> list[Row]:
    """Return the table's rows with the names of the task's roles: `{"text": ..., "label": ..., "place": ...}`.

    `overrides` maps a role to a column; the other roles are found by name (see `choose_columns`). Roles in `optional`
    (labels, for calibration or timing) may be missing. Rows that say nothing are left out and their places added to
    `skipped` when a list is given; else they are an error, as every other cell that is missing. When the column of
    labels has class names, each row also gets `label_name`. Raises DataError naming the columns found, or the row whose
    text is empty or whose label is missing.

    >>> rows = bind_columns(read_rows("reviews.csv"), get_task("text-classification"), {"text": "review"})
    """
    chosen = choose_columns(table, task, overrides or {}, optional=optional)
    names = table.class_names.get(chosen.get("label", ""), ())
    bound: list[Row] = []
    for index, row in enumerate(table.rows):
        place = table.place(index)
        if skipped is not None and all(_is_empty(row.get(column)) for column in chosen.values()):
            skipped.append(place)
            continue
        cells: dict[str, Any] = {
            role: _checked(row.get(column), role, column, place) for role, column in chosen.items()
        }
        if names:
            cells["label_name"] = _class_name(cells["label"], names, place)
        bound.append({**cells, PLACE: place})
    if not bound:
        raise DataError(f"{table.name}: all {len(skipped or ())} rows are empty", "give rows that say something")
    return bound


def choose_columns(
    table: Table, task: HasColumns, overrides: Mapping[str, str], *, optional: Collection[str] = ()
) -> dict[str, str]:
    """Return which column plays each role, role -> column.

    In turn: the user's choice; the column named like the role; columns of roles that stand in for it (`messages`, or
    `prompt` and `completion`, for a text); the only column with a recognised name; the only column that can be it (of
    strings for a text, of images for an image). Upper and lower case are the same.
    Raises DataError when a role has no column or several, naming the columns found and the flag that decides.
    """
    for role, column in overrides.items():
        if role not in task.columns:
            raise DataError(f"there is no column role {role!r}", f"roles are {', '.join(task.columns)}")
        if column not in table.columns:
            raise DataError(
                f"{table.name} has no column {column!r}; found {_listed(table.columns)}",
                f"--column {role}=NAME takes one of them",
            )
    chosen = dict(overrides)
    taken = set(chosen.values())
    passed_over: set[str] = set()
    for role, groups in task.instead.items():
        standing_in = _standing_in(table, role, groups, task, chosen)
        passed_over |= {role} if standing_in else {other for group in groups for other in group}
        chosen |= standing_in
        taken |= set(standing_in.values())
    for role, recognised in task.columns.items():
        if role in chosen or role in passed_over:
            continue
        free = [column for column in table.columns if column not in taken]
        found = _by_name(free, role, recognised)
        needed = role not in optional and role not in task.optional_columns
        if not found and needed:
            found = _by_content(table, free, role, task)
        if len(found) > 1 or (needed and not found):
            which = f"several columns may be the {role}: {_listed(found)}" if found else f"no column is the {role}"
            raise DataError(
                f"{table.name}: {which}; found {_listed(table.columns)}", f"say which: --column {role}=NAME"
            )
        if found:
            chosen[role] = found[0]
            taken.add(found[0])
    return chosen


def _standing_in(
    table: Table, role: str, groups: tuple[tuple[str, ...], ...], task: HasColumns, chosen: Mapping[str, str]
) -> dict[str, str]:
    """Return the columns of the first group of roles that stands in for a role, all found by name; else nothing."""
    if role in chosen or any(column.strip().casefold() == role for column in table.columns):
        return {}
    first = next(iter(table.rows))
    for group in groups:
        found = {}
        for other in group:
            named = [chosen[other]] if other in chosen else _by_name(list(table.columns), other, task.columns[other])
            if len(named) == 1 and _can_be(first.get(named[0]), other):
                found[other] = named[0]
        if len(found) == len(group):
            return found
    return {}


def _can_be(cell: object, role: str) -> bool:
    return is_turns(cell) or (role != "messages" and isinstance(cell, str))


def _by_name(free: list[str], role: str, recognised: tuple[str, ...]) -> list[str]:
    same = [column for column in free if column.strip().casefold() == role]
    return same or [column for column in free if column.strip().casefold() in recognised]


def _by_content(table: Table, free: list[str], role: str, task: HasColumns) -> list[str]:
    """Return the columns whose cells can be the role, not counting those whose name says another role."""
    others = {name for other, names in task.columns.items() if other != role for name in (other, *names)}
    first = next(iter(table.rows))
    candidates = [column for column in free if column.strip().casefold() not in others]
    if role == "text":
        return [column for column in candidates if isinstance(first.get(column), str)]
    if role == "image":
        return [column for column in candidates if _is_image_cell(first.get(column))]
    return []


def _is_image_cell(cell: object) -> bool:
    if isinstance(cell, Mapping):
        return "bytes" in cell
    return isinstance(cell, bytes | Path) or hasattr(cell, "convert")  # PIL images convert(mode)


def _is_empty(cell: Any) -> bool:
    """Say whether a cell holds nothing: missing, white space, or no turn of a conversation."""
    if isinstance(cell, str | list):
        return not (cell.strip() if isinstance(cell, str) else cell)
    return cell is None or (isinstance(cell, float) and cell != cell)


def _checked(cell: Any, role: str, column: str, place: str) -> Any:
    if role == "messages" or (role in ("prompt", "completion") and is_turns(cell)):
        return read_turns(cell, place)
    missing = cell is None or (isinstance(cell, float) and cell != cell)
    if role in ("text", "text_pair", "prompt", "completion"):
        if missing or (isinstance(cell, str) and not cell.strip()):
            raise DataError(f"{place}: the {role} (column {column!r}) is empty", "remove the row, or fill it in")
        if not isinstance(cell, str) and not is_token_ids(cell):
            raise DataError(
                f"{place}: the {role} (column {column!r}) is a {type(cell).__name__}, not text",
                f"say which column holds the text: --column {role}=NAME",
            )
    elif missing or (isinstance(cell, str) and not cell):
        raise DataError(f"{place}: the {role} (column {column!r}) is missing", "remove the row, or fill it in")
    return cell


def _class_name(label: Any, names: tuple[str, ...], place: str) -> str:
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise DataError(f"{place}: label {label!r} is not one of the {len(names)} classes 0 to {len(names) - 1}")
    return names[label]


def is_token_ids(cell: object) -> bool:
    """Tell whether a cell holds a text that is tokens already: a list or an array of whole numbers."""
    if isinstance(cell, np.ndarray):
        return cell.ndim == 1 and cell.size > 0 and np.issubdtype(cell.dtype, np.integer)
    return isinstance(cell, list | tuple) and len(cell) > 0 and all(type(token) is int for token in cell)


def _listed(columns: Collection[str]) -> str:
    return ", ".join(columns)
