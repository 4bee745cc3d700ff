"""What a build shows on its way: for each stage a bar with the time left, and a line when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

# Where no bar can be drawn, as in a log, the time left is said once: after this time and this share of the work.
SAID_AFTER_S, SAID_AFTER = 10.0, 0.02


class Bar:
    """One amount of work. `seconds_left`: how long the rest takes if it goes on as it did so far."""

    def __init__(self, progress: Progress, task: TaskID, title: str, total: int, say: Callable[[str], object]) -> None:
        self._progress, self._task, self._title, self._total, self._say = progress, task, title, max(total, 1), say
        self._done, self._started, self._announced = 0, time.monotonic(), False

    def advance(self, count: int = 1) -> None:
        """Some more of the work is done."""
        self._done += count
        self._progress.update(self._task, completed=self._done, left=f"{in_words(self.seconds_left)} left")
        enough = self._done >= SAID_AFTER * self._total
        if not self._announced and enough and time.monotonic() - self._started >= SAID_AFTER_S:
            self._announced = True
            self._say(f"{self._title}: about {in_words(self.seconds_left)} left")

    def describe(self, title: str) -> None:
        """What is being done now."""
        self._progress.update(self._task, description=title)

    @property
    def seconds_left(self) -> float:
        """Seconds. Something must have been done."""
        elapsed = time.monotonic() - self._started
        return elapsed * max(self._total - self._done, 0) / max(self._done, 1)


class Display:
    """Bars and lines on a console; `with` it, the bars are drawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar while the block runs; total: the sum of what it will be advanced by."""
        task = self._progress.add_task(title, total=max(total, 1), left="")
        quiet = self._console.is_terminal  # the bar says it
        try:
            yield Bar(self._progress, task, title, total, (lambda text: None) if quiet else self.say)
        finally:
            self._progress.remove_task(task)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def in_words(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
