"""How far a long piece of work is: said on standard error, late, seldom, and only to whom it helps."""

from __future__ import annotations

import io
import itertools
import sys
from typing import Any

import pytest
from wire_server import WireServer

from lapwing_client import Client, progress
from lapwing_client.progress import Progress


class Clock:
    """So many seconds pass between two looks at it."""

    def __init__(self, step: float) -> None:
        self._ticks = itertools.count()
        self._step = step

    def monotonic(self) -> float:
        return next(self._ticks) * self._step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "time", Clock(3.0))


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "time", Clock(0.01))
    bar = Progress(range(100), True)
    for _ in range(100):
        bar.advance()
    bar.close()
    assert capsys.readouterr().err == ""


def test_where_no_bar_can_be_drawn_there_is_a_line_now_and_then(slow: None, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(range(9), True)
    for _ in range(9):
        bar.advance()
    bar.close()
    said = capsys.readouterr().err.splitlines()
    assert said == ["1 of 9 scored", "5 of 9 scored", "9 of 9 scored"], "at 3, 15 and 27 s"


def test_without_a_length_there_is_no_end(slow: None, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(iter(range(9)), True)
    bar.advance()
    assert capsys.readouterr().err == "1 scored\n"


def test_who_wants_none_gets_none(slow: None, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress(range(9), False)
    for _ in range(9):
        bar.advance()
    bar.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("items", "end"), [(list(range(4)), "4/4"), (iter(range(4)), "4/?")])
def test_a_terminal_gets_a_bar(slow: None, items: Any, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = Progress(items, True)
    for _ in range(4):
        bar.advance()
    bar.close()
    bar.close()
    assert end in terminal.getvalue()
    assert terminal.getvalue().endswith("\n\x1b[?25h"), "the next line begins at its beginning, and the cursor is back"


def test_score_many_tells_how_far_it_is(slow: None, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [("a", "b")] * 4
    with WireServer() as server, Client(server.target) as client:
        list(client.score_many(pairs))
        assert capsys.readouterr().err.splitlines()[0] == "1 of 4 scored"
        list(client.score_many(pairs, progress=False))
        shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
