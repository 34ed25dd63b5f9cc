"""Progress: lines that a log can hold, bars that a terminal can show, silence when asked."""

from __future__ import annotations

import io
import time

import pytest

from gossamer.cli.console import Screen
from gossamer.cli.progress import PlainProgress, bars, how_far
from gossamer.cli.terminal import draws_bars, plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Tell the time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_say_when_a_stage_begins_how_far_it_is_and_when_it_ends() -> None:
    stream, clock = io.StringIO(), Clock()
    with PlainProgress(stream, clock).stage("profiling", 10) as advance:
        for _ in range(10):
            clock.now += 6
            advance(1)
    assert stream.getvalue().splitlines() == [
        "profiling ...",
        "profiling: 30 %, about 42 s left",
        "profiling: 60 %, about 24 s left",
        "profiling: 90 %, about 6.0 s left",
        "profiling: done in 1 min 0 s",
    ]


def test_a_short_stage_says_only_that_it_began() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, Clock()).stage("reading") as advance:
        advance(1)
    assert stream.getvalue() == "reading ...\n"


def test_a_stage_that_failed_is_not_called_done() -> None:
    stream, clock = io.StringIO(), Clock()
    stage = PlainProgress(stream, clock).stage("building")
    stage.__enter__()
    clock.now = 9
    assert not stage.__exit__(ValueError, ValueError("no"), None)
    assert "done" not in stream.getvalue()


def test_work_without_a_total_counts_what_is_done() -> None:
    assert how_far(7, None, 3.0) == "7 done after 3.0 s"
    assert how_far(0, 10, 3.0) == "0 %"
    assert how_far(11, 10, 3.0) == "100 %, about 0.0 s left"


def test_bars_name_the_stage_and_leave_messages_unread_as_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with bars(stream) as progress, progress.stage("trying [bold]names[/bold]", 4) as advance:
        advance(2)
        progress.say("tried [red]one[/red]")
        until = time.monotonic() + 10
        while "50%" not in stream.getvalue() and time.monotonic() < until:
            time.sleep(0.02)  # the bar redraws itself ten times a second
    shown = stream.getvalue()
    assert "tried [red]one[/red]" in shown
    assert "trying [bold]names[/bold]" in shown
    assert "50%" in shown


@pytest.mark.parametrize(
    ("name", "value", "draws"), [("TERM", "dumb", False), ("NO_COLOR", "1", False), ("X", "", True)]
)
def test_bars_only_where_they_can_be_drawn(monkeypatch: pytest.MonkeyPatch, name: str, value: str, draws: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(name, value)
    assert draws_bars(Terminal()) is draws
    assert draws_bars(io.StringIO()) is False


def test_text_loses_what_would_steer_a_terminal() -> None:
    assert plain("a\x1b[2Jb\u202ec\td\ne") == "a\\x1b[2Jb\\x202ec\\x09d\ne"
    assert plain("naïve 模型 µs") == "naïve 模型 µs"


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(quiet=True).progress() as progress, progress.stage("work", 2) as advance:
        advance(1)
        progress.say("hello")
    assert capsys.readouterr() == ("", "")
