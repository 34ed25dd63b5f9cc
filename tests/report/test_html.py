"""The page: it says what the run says, escapes everything, loads nothing, runs one script, and stays small."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gossamer.errors import RunError
from gossamer.plan.records import RunResult
from gossamer.report.html import MOST_ROWS, nested, render, write_report

EVIL = "<script>alert(1)</script>\"' onload=x {{ 7*7 }}"
VOID = {"meta", "input", "br", "img", "hr", "link"}


class Page(HTMLParser):
    """Collect tags, attributes and text; remember what was closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "UNDECIDED"])
def test_the_page_says_verdict_reason_and_numbers(make_run: Callable[..., RunResult], verdict: str) -> None:
    run = make_run(verdict=verdict)
    page = Page(render(run))
    assert (page.open, page.wrong) == ([], [])
    assert run.reason in page.text
    assert (
        next(attrs for tag, attrs in page.tags if tag == "div" and "banner" in (attrs.get("class") or ""))["class"]
        == f"banner {verdict}"
    )
    assert run.chosen is not None
    for judged in run.tried[run.chosen].judgements:
        assert judged.constraint in page.text
    for one in (*run.tried, *run.not_tried):
        assert one.name in page.text
    assert run.provenance.model_fingerprint in page.text
    assert run.load_snippet.strip().splitlines()[-1] in page.text
    assert "51.6 %" in page.text  # the unchanged model in the same runtime


def test_everything_of_model_and_data_is_escaped(make_run: Callable[..., RunResult]) -> None:
    run = make_run()
    assert run.chosen is not None
    chosen = run.tried[run.chosen]
    assert chosen.measured is not None
    row = chosen.measured.tensors[0].model_copy(
        update={"parameter": EVIL, "role": EVIL, "asked": EVIL, "found": EVIL, "activation": EVIL}
    )
    evil = chosen.model_copy(
        update={
            "name": EVIL,
            "rejected": EVIL,
            "recipe": [{"quantize": {"ignore": [EVIL]}}],
            "measured": chosen.measured.model_copy(update={"tensors": (row,)}),
            "judgements": tuple(j.model_copy(update={"why": EVIL, "constraint": EVIL}) for j in chosen.judgements),
        }
    )
    fields = dict.fromkeys(("model", "data", "evaluation", "task", "runtime", "command"), EVIL)
    provenance = run.provenance.model_copy(
        update={**fields, "versions": {EVIL: EVIL}, "machine": {EVIL: [EVIL]}, "task_settings": {EVIL: EVIL}}
    )
    text = render(
        run.model_copy(
            update={
                "tried": (*run.tried[:3], evil),
                "provenance": provenance,
                "reason": EVIL,
                "metric_name": EVIL,
                "artifact": EVIL,
                "load_snippet": EVIL,
                "rows": {EVIL: 1},
            }
        )
    )
    page = Page(text)
    assert (page.open, page.wrong) == ([], [])
    assert text.count("<script") == 1
    assert "<script>alert" not in text
    assert not [attrs for _, attrs in page.tags if "onload" in attrs]
    assert "7*7" in page.text  # a template inside data is text too
    assert page.text.count("alert(1)") > 20


def test_the_page_loads_nothing_and_names_the_hash_of_what_it_runs(make_run: Callable[..., RunResult]) -> None:
    text = render(make_run())
    page = Page(text)
    assert not [attrs for _, attrs in page.tags if {"src", "href", "style"} & set(attrs)]
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    for tag in ("script", "style"):
        match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert match is not None
        digest = base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_page_of_thousands_of_tensors_stays_under_a_megabyte_and_a_half(make_run: Callable[..., RunResult]) -> None:
    run = make_run()
    chosen = run.tried[3]
    assert chosen.measured is not None
    row = chosen.measured.tensors[3]
    rows = tuple(
        row.model_copy(update={"parameter": f"model.layers.{i}.self_attn.q_proj.weight"})
        for i in range(MOST_ROWS + 500)
    )
    tried = chosen.model_copy(update={"measured": chosen.measured.model_copy(update={"tensors": rows})})
    text = render(run.model_copy(update={"tried": (*run.tried[:3], tried)}))
    assert len(text.encode()) < 1_500_000
    assert "500 more are in report.json" in Page(text).text
    assert len(render(run).encode()) < 150_000


def test_a_tensor_that_is_not_what_was_asked_stands_out(make_run: Callable[..., RunResult]) -> None:
    run = make_run()
    chosen = run.tried[3]
    assert chosen.measured is not None
    first, *others = chosen.measured.tensors
    wrong = first.model_copy(update={"found": "float32", "agrees": False})
    tried = chosen.model_copy(update={"measured": chosen.measured.model_copy(update={"tensors": (wrong, *others)})})
    text = Page(render(run.model_copy(update={"tried": (*run.tried[:3], tried)}))).text
    assert "1 of 44 are not what the recipe asked for" in text
    assert "All 44 are" in Page(render(run)).text


@pytest.mark.parametrize("missing", ["chosen", "measured", "figures", "same_runtime", "goal"])
def test_a_run_that_found_less_still_has_a_page(make_run: Callable[..., RunResult], missing: str) -> None:
    run = make_run()
    chosen = run.tried[3]
    assert chosen.measured is not None
    bare = chosen.model_copy(update={"measured": None, "judgements": ()})
    nothing = chosen.model_copy(update={"measured": chosen.measured.model_copy(update={"figures": {}})})
    original = run.original.model_copy(update={"same_runtime_latency": None, "same_runtime_bytes": None})
    changes = {
        "chosen": {"chosen": None, "tried": (), "artifact": None},
        "measured": {"tried": (bare,), "chosen": 0},
        "figures": {"tried": (nothing,), "chosen": 0},
        "same_runtime": {"original": original},
        "goal": {"goal": "", "goal_in_words": [], "kind": "apply", "chosen": 0,
                 "tried": (chosen.model_copy(update={"judgements": ()}),)},
    }[missing]  # fmt: skip
    page = Page(render(run.model_copy(update=changes)))
    assert (page.open, page.wrong) == ([], [])
    assert run.reason in page.text


def test_a_collapsed_model_is_shown_not_drawn(make_run: Callable[..., RunResult]) -> None:
    run = make_run()
    chosen = run.tried[3]
    assert chosen.measured is not None
    nan = float("nan")
    figure = chosen.measured.figures["quality"].model_copy(update={"value": nan, "low": nan, "high": nan})
    judged = chosen.judgements[0].model_copy(update={"value": nan, "low": nan, "high": nan, "verdict": "FAIL"})
    measured = chosen.measured.model_copy(update={"figures": {**chosen.measured.figures, "quality": figure}})
    tried = chosen.model_copy(update={"measured": measured, "judgements": (judged,), "verdict": "FAIL"})
    text = render(run.model_copy(update={"tried": (*run.tried[:3], tried)}))
    assert not re.search(r'\s(?:cx|cy|x1|x2|y1|y2|d|x|y)="[^"]*(nan|inf)', text)


def test_write_report_reads_the_runs_own_json(make_run: Callable[..., RunResult], tmp_path: Path) -> None:
    run = make_run()
    (tmp_path / "report.json").write_text(run.model_dump_json(), encoding="utf-8")
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text(encoding="utf-8") == render(run)


def test_write_report_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no report\.json"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text('{"kind": "optimize"}', encoding="utf-8")
    with pytest.raises(RunError, match="cannot be read"):
        write_report(tmp_path)


def test_nested_values_become_one_line() -> None:
    assert nested({"a": [1, "b"], "c": {}, "d": None}) == "a 1, b, c –, d –"
