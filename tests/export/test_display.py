"""What a build says on its way."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from densegeo.export import display
from densegeo.export.display import Display, in_words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (89, "89 s"), (100, "2 min"), (3600, "60 min"), (12000, "3 h 20 min")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_the_time_left_is_that_of_the_work_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    said = io.StringIO()
    with Display(Console(file=said, width=120)) as shown, shown.bar("rewriting", 1000) as bar:
        now += 11
        bar.advance(1)  # too little to say anything by: 3 h
        assert said.getvalue() == ""
        bar.advance(99)
        assert bar.seconds_left == pytest.approx(99)
        now += 1
        bar.advance(100)
        assert bar.seconds_left == pytest.approx(48)
        bar.advance(700)
        assert bar.seconds_left == pytest.approx(12 / 9)
    assert said.getvalue().splitlines() == ["rewriting: about 2 min left"]  # once, where no bar can be drawn


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SAID_AFTER_S", 0.0)
    said = io.StringIO()
    with Display(Console(file=said, width=120, force_terminal=True)) as shown, shown.bar("rewriting", 4) as bar:
        bar.advance(3)
        shown._progress.refresh()
    assert "75%" in said.getvalue()
    assert "0 s left" in said.getvalue()
    assert "about" not in said.getvalue()
