"""The README.md of an artifact's folder: what it is, what was proven, how to load it, where it came from, its limits.

Names and words out of a model or data are escaped where they are printed, so that none becomes markup or HTML: the
template engine passes every value through `plain_markdown`; code stands in a fence longer than any inside it.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2

from gossamer.plan.records import RunResult
from gossamer.report import words
from gossamer.report.figures import goal_rows, latency_rows

MARKUP = re.compile(r"([\\`*_\[\]|~$])")


class Trusted(str):
    """Mark text that is markup already and is not escaped again."""


def render_card(result: RunResult) -> str:
    """Return the model card of the artifact that a run chose, as Markdown for people and hubs.

    Example: `(artifact / "README.md").write_text(render_card(result), encoding="utf-8")`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gossamer.report"),
        autoescape=False,  # HTML's rules; `finalize` escapes by Markdown's, and everything
        finalize=lambda value: value if isinstance(value, Trusted) else plain_markdown(str(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"fenced": fenced, "code": inline_code, "bytes": lambda value: words.show(value, "B")}
    chosen = result.tried[result.chosen] if result.chosen is not None else None
    return environment.get_template("card.md.j2").render(
        result=result,
        chosen=chosen,
        goal_rows=goal_rows(chosen) if chosen else [],
        latencies=[(row.name, words.show_seconds(row.record.p50), words.show_share(row.share))
                   for row in latency_rows(result)],
        original=_original(result),
        recipe=words.show_recipe(chosen.recipe) if chosen else "",
    )  # fmt: skip


def plain_markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is, on one line: no emphasis, link, table cell, or HTML."""
    one_line = re.sub(r"\s+", " ", text)
    escaped = MARKUP.sub(r"\\\1", one_line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # a bare address must not become a link
    return re.sub(r"(?i)\b(https?|ftp|www)(?=[:.])", r"\1&#8203;", escaped)


def inline_code(text: Any) -> Trusted:
    """Set text as code within a line: a run of backticks longer than any inside it; bars would end a table's cell."""
    plain = " ".join(str(text).split()).replace("|", "¦")
    ticks = "`" * (max((len(run) for run in re.findall("`+", plain)), default=0) + 1)
    space = " " if plain.startswith("`") or plain.endswith("`") else ""
    return Trusted(f"{ticks}{space}{plain or ' '}{space}{ticks}")


def fenced(text: str, language: str = "") -> Trusted:
    """Set text as a block of code, in a fence longer than any run of backticks inside it."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return Trusted(f"{fence}{language}\n{text.strip(chr(10))}\n{fence}")


def _original(result: RunResult) -> list[tuple[str, str]]:
    original = result.original
    return [
        (result.metric_name, words.show_figure(original.metric)),
        ("size", words.show(original.size_bytes, "B")),
        ("parameters", words.show_count(original.num_parameters)),
    ]
