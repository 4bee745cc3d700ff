"""Progress of work on many things: a bar on a terminal, a line now and then in a log file, nothing when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_S = 10.0  # between two lines of a log


@contextmanager
def progress(noun: str, total: int | None, console: Console, *, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Gives what is called when one more is done. total: None where the end is not known."""
    if quiet:
        yield lambda: None
    elif console.is_terminal:
        columns = (TextColumn(noun), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(noun, total=total)
            yield lambda: bar.advance(task)
    else:
        yield _Lines(noun, total, console)


class _Lines:
    def __init__(self, noun: str, total: int | None, console: Console) -> None:
        self._noun, self._total, self._console = noun, total, console
        self._done, self._started, self._last = 0, time.monotonic(), time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._last < _LINE_S:
            return
        self._last = now
        speed = self._done / (now - self._started)
        line = f"{self._done} {self._noun}, {speed:.3g} a second"
        if self._total:
            seconds_left = (self._total - self._done) / speed
            line = f"{self._done} of {self._total} {self._noun}, {speed:.3g} a second, "
            line += f"about {_duration(seconds_left)} left"
        self._console.print(line, soft_wrap=True, highlight=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
