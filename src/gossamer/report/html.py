"""What a run found as one HTML page: it opens offline, prints, reads in light and dark, and runs only our own script.

Everything out of a model or data is text: jinja2 escapes all of it, and the page's content security policy lets
nothing run or load but the one script and the one style sheet, whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from pydantic import ValidationError

from gossamer.errors import RunError
from gossamer.plan.records import ExpertTokens, RunResult, TensorRow, Tried
from gossamer.report import words
from gossamer.report.figures import cost_plots, goal_rows, headline, latency_plot, latency_rows
from gossamer.run.atomic import write_text

RESULT, PAGE = "report.json", "report.html"
MOST_ROWS = 3000  # of the module table: above that the page would be slow; report.json holds them all
LONG = 40  # rows: a longer table starts closed


def render(result: RunResult) -> str:
    """Return the page of a run as one string of HTML, a few hundred kB at most, that needs no network.

    Example: `Path("report.html").write_text(render(result), encoding="utf-8")`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gossamer.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": lambda value: words.show(value, "B"),
        "seconds": words.show_seconds,
        "duration": words.show_duration,
        "share": words.show_share,
        "count": words.show_count,
        "figure": words.show_figure,
        "yaml": words.show_recipe,
        "nested": nested,
        "product": math.prod,
    }
    script, style = (_asset(environment, name) for name in ("report.js", "report.css"))
    chosen = result.tried[result.chosen] if result.chosen is not None else None
    return environment.get_template("report.html.j2").render(
        result=result,
        chosen=chosen,
        script=script,
        style=style,
        policy=_policy(script, style),
        tiles=headline(result),
        goal_rows=goal_rows(chosen) if chosen else [],
        tried=[_tried_row(index, one, result) for index, one in enumerate(result.tried)],
        not_tried=[_tried_row(index, one, result) for index, one in enumerate(result.not_tried, len(result.tried))],
        cost_plots=cost_plots(result),
        latency_plot=latency_plot(result),
        latency_rows=latency_rows(result),
        modules=_modules(chosen.measured.tensors) if chosen and chosen.measured else None,
        experts=_experts(chosen.experts) if chosen and chosen.experts else None,
    )


def write_report(run: Path) -> Path:
    """Draw RUN/report.html from RUN/report.json and return its path.

    Raises RunError when the folder holds no finished run, or its report.json was not written by this version.
    """
    source = Path(run) / RESULT
    if not source.is_file():
        raise RunError(f"{run} holds no {RESULT}: no run has finished there", "run gossamer optimize --out " + str(run))
    try:
        result = RunResult.model_validate_json(source.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"{source} cannot be read: {first}", "was it written by another version? run again") from error
    page = Path(run) / PAGE
    write_text(page, render(result))
    return page


def nested(value: Any) -> str:
    """Write a value out of JSON on one line for people: lists with commas, mappings as `key value`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {nested(inner)}" for key, inner in value.items()) or words.NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(nested(inner) for inner in value) or words.NONE
    return words.NONE if value is None else str(value)


def _asset(environment: jinja2.Environment, name: str) -> Markup:
    """Return one of our own files, which is not escaped: it holds nothing of the run."""
    source, _, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
    return Markup(source)


def _policy(script: str, style: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; base-uri 'none'"


def _tried_row(index: int, one: Tried, result: RunResult) -> dict[str, Any]:
    """Return what the template shows of a candidate: each quantity predicted and, where there is one, measured."""
    figures = one.measured.figures if one.measured else {}
    latency, quality = words.latency_share(one), words.quality_share(one)
    memory, kl = figures.get("memory"), figures.get("kl")
    size = words.size_share(one, result.original) if one.measured else None
    return {
        "label": str(index + 1),
        "one": one,
        "chosen": index == result.chosen,
        "why": one.rejected or "; ".join(j.why for j in one.judgements if j.verdict != "PASS"),
        "cells": [
            (
                words.show_share(one.predicted.size_bytes / result.original.size_bytes),
                None if size is None else words.show_share(size),
            ),
            (words.show_share(one.predicted.latency_share), latency and words.show_share(latency.value)),
            (words.show_share(one.predicted.quality_share), quality and words.show_share(quality.value)),
            (f"{one.predicted.kl:.2g}", kl and f"{kl.value:.2g}"),
            (words.show(one.predicted.memory_bytes, "B"), memory and words.show(memory.value, "B")),
            (words.show_duration(one.predicted.seconds), words.show_duration(one.seconds) if one.measured else None),
        ],
    }


def _modules(tensors: tuple[TensorRow, ...]) -> dict[str, Any]:
    """Return the table of tensors, largest first where there are too many to show, and the sums over all of them."""
    shown = tensors if len(tensors) <= MOST_ROWS else sorted(tensors, key=lambda row: -row.bytes)[:MOST_ROWS]
    total = sum(row.bytes for row in tensors)
    return {
        "rows": [(row, row.bytes / total if total else 0.0) for row in shown],
        "roles": sorted({row.role for row in shown}),
        "total": total,
        "original": sum(row.original_bytes for row in tensors),
        "count": len(tensors),
        "hidden": len(tensors) - len(shown),
        "disagree": sum(not row.agrees for row in tensors),
        "open": len(shown) <= LONG,
    }


def _experts(found: tuple[ExpertTokens, ...]) -> dict[str, Any]:
    """Return the table of experts, and the layers that saw too few tokens, the first of very many."""
    starved = [words for one in found for words in one.starved]
    shown = starved[:MOST_ROWS]
    return {"rows": found, "starved": starved, "shown": shown, "hidden": len(starved) - len(shown)}
