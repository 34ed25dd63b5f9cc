"""The model card: the verdict's numbers, valid tables, and nothing out of a model or data that becomes markup."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.plan.records import RunResult
from gossamer.report.card import fenced, inline_code, plain_markdown, render_card

EVIL = "[a](javascript:x) <script>alert(1)</script> | **b** `c`\n# heading ```"


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "UNDECIDED"])
def test_the_card_holds_verdict_provenance_and_how_to_load(make_run: Callable[..., RunResult], verdict: str) -> None:
    run = make_run(verdict=verdict)
    card = render_card(run)
    assert f"**{verdict}**: {run.reason}" in card
    assert run.load_snippet.strip() in card
    assert run.provenance.model_fingerprint in card
    assert run.provenance.command in card
    assert "44 of 44 tensors" in card


def test_every_row_of_a_table_has_the_columns_of_its_heading(make_run: Callable[..., RunResult]) -> None:
    run = make_run()
    run = run.model_copy(update={"provenance": run.provenance.model_copy(update={"model": "a|b", "data": "c | d"})})
    columns = 0
    for line in render_card(run).splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        assert found == (columns or found), line
        columns = found


def test_names_become_neither_html_nor_markup(make_run: Callable[..., RunResult]) -> None:
    run = make_run()
    chosen = run.tried[3].model_copy(update={"name": EVIL})
    provenance = run.provenance.model_copy(update={"task": EVIL, "versions": {EVIL: EVIL}, "machine": {EVIL: EVIL}})
    tried = (*run.tried[:3], chosen)
    changes = {"reason": EVIL, "metric_name": EVIL, "provenance": provenance, "tried": tried}
    card = render_card(run.model_copy(update=changes))
    assert "<script" not in card
    assert "[a](" not in card
    assert "**b**" not in card
    assert "\n# heading" not in card


@given(st.text())
def test_escaped_text_is_one_line_without_live_markup(text: str) -> None:
    shown = plain_markdown(text)
    assert "\n" not in shown
    assert not re.search(r"[<>]", shown)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_|\[\]]", shown)


@given(st.text(alphabet="`ab| \n", min_size=1))
def test_code_cannot_end_its_own_fence(text: str) -> None:
    block = fenced(text)
    fence = block.split("\n", 1)[0]
    assert fence not in block[len(fence) : -len(fence)]
    line = inline_code(text)
    match = re.match("`+", line)
    assert match is not None
    inside = line[len(match[0]) : -len(match[0])]
    assert match[0] not in re.findall("`+", inside)
    assert "|" not in line
