"""How processes end. SIGTERM (`docker stop`, systemd, batch systems) ends a command the way Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_HUNG = 70  # of a process whose backend did not return in time; start a new one


class Terminated(KeyboardInterrupt):
    """SIGTERM came, or the terminal went away (SIGHUP). name: the signal's. status: what the process is to end with."""

    name, status = "SIGTERM", 128 + signal.SIGTERM


class HungUp(Terminated):
    """The terminal went away."""

    name, status = "SIGHUP", 128 + getattr(signal, "SIGHUP", 1)


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM, and SIGHUP where nobody ignores it (nohup does), raise `Terminated` as Ctrl-C raises
    KeyboardInterrupt.
    """

    def end(error: KeyboardInterrupt) -> None:
        raise error

    kinds: dict[signal.Signals, type[KeyboardInterrupt]] = {signal.SIGTERM: Terminated}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        kinds[signal.SIGHUP] = HungUp
    with _handled(kinds, end):
        yield


@contextmanager
def ending_on_signal(notice: Callable[[KeyboardInterrupt], object]) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM is handed to `notice`, which the main thread calls between two of its steps;
    further ones raise.
    """
    first = True

    def tell(error: KeyboardInterrupt) -> None:
        nonlocal first
        if not first:
            raise error
        first = False
        notice(error)

    with _handled({signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}, tell):
        yield


@contextmanager
def _handled(
    kinds: dict[signal.Signals, type[KeyboardInterrupt]], act: Callable[[KeyboardInterrupt], None]
) -> Iterator[None]:
    """In another thread than the main one, which signals do not reach, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        act(kinds[signal.Signals(number)]())

    previous_handlers = {number: signal.signal(number, handle) for number in kinds}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
