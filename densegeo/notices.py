"""What is warned of, by Python's warnings and by the log, told apart by source: nothing of it is printed raw."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from densegeo.errors import ResultWarning

if TYPE_CHECKING:
    from densegeo.runtime import Geometry

_NUMBER = re.compile(r"\d[\d.]*(e[+-]?\d+)?")


@dataclass
class Notice:
    """A kind of warning: texts that differ in numbers alone. text: the first one. source: what it was about, or empty.
    count: of images or frames that had it.
    """

    text: str
    source: str
    count: int = 0


class Heard:
    """Warnings from any thread, told apart by what they are about."""

    def __init__(self) -> None:
        self._subject: ContextVar[tuple[str, list[str]]] = ContextVar("densegeo-subject")

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, warnings come here and are printed nowhere else."""
        handler = _Handler(self._take)
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning):  # others are for programmers
                warnings.simplefilter("always", category)
            warnings.showwarning = lambda message, *rest, **more: self._warned(str(message))
            logging.getLogger().addHandler(handler)
            try:
                yield
            finally:
                logging.getLogger().removeHandler(handler)

    @contextmanager
    def about(self, source: str) -> Iterator[list[str]]:
        """Inside, in this context, warnings are about `source`; gives their texts, each once, as they come."""
        texts: list[str] = []
        token = self._subject.set((source, texts))
        try:
            yield texts
        finally:
            self._subject.reset(token)

    def _warned(self, text: str) -> None:
        """By Python's warnings; what the log says comes to `_take`."""
        self._take(text)

    def _take(self, text: str) -> None:
        source, texts = self._subject.get(("", []))
        if text in texts:
            return
        texts.append(text)
        self._new(text, source)

    def _new(self, text: str, source: str) -> None:
        """A text that was not said of this source before."""


class Notices(Heard):
    """The warnings of one run. show: gets the first of each kind, as it comes. words: puts a text into those of whoever
    is warned.
    """

    def __init__(
        self, show: Callable[[Notice], object] = lambda notice: None, words: Callable[[str], str] = lambda text: text
    ) -> None:
        super().__init__()
        self.kinds: dict[str, Notice] = {}
        self._show, self._words, self._lock = show, words, threading.Lock()

    def _take(self, text: str) -> None:
        super()._take(self._words(text))

    def count(self, text: str, source: str) -> None:
        """Count what was warned of elsewhere."""
        self._new(text, source)

    def _new(self, text: str, source: str) -> None:
        with self._lock:
            kind = self.kinds.setdefault(_NUMBER.sub("#", text), Notice(text, source))
            kind.count += 1
            first = kind.count == 1
        if first:
            self._show(kind)


def warn_if_empty(geometry: Geometry) -> None:
    """Warn (ResultWarning) of a result of which not one pixel is valid."""
    if not geometry.valid.any():
        warnings.warn(
            "Not one pixel of the result is valid: the networks gave NaN or infinity all over. `densegeo verify "
            "BUNDLE` tells whether they come out right here.",
            ResultWarning,
            stacklevel=2,
        )


class _Handler(logging.Handler):
    def __init__(self, take: Callable[[str], Any]) -> None:
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())
