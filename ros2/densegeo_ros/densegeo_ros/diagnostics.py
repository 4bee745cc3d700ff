"""What the node counts, and the diagnostics made of it."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


_COUNTED = ("received", "missed", "published", "idle", "skipped", "failed")
_UNKNOWN = 2**63 - 1  # and above: the middleware does not number messages (rmw/types.h)


@dataclass
class Tally:
    """Counts since the node was configured, and since the last report. Threads may share it.

    counts: received (image messages), missed (sent since the first one and not received), published (images whose
    results were), dropped (replaced by newer ones before the network was free), idle (nobody subscribes), skipped
    (max_rate), failed, lost (messages of any topic that the middleware told of), and "of TOPIC" (messages that go with
    images).
    """

    counts: Counter[str] = field(default_factory=Counter)
    depth: str = "no image yet"  # why it is metric, or why not
    uncertainty: float = math.nan  # of depth, relative
    problems: dict[str, str] = field(default_factory=dict)  # what stays until it is mended -> a sentence
    _number: int = 0  # the last image's, by its publisher
    _since: Counter[str] = field(default_factory=Counter)
    _times: dict[str, list[float]] = field(default_factory=dict)
    _errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, times: int = 1) -> None:
        with self._lock:
            self.counts[name] += times
            self._since[name] += times

    def receive(self, number: int) -> None:
        """An image message; number: how many its publisher had sent with it, 0 where the middleware does not count."""
        if 0 < self._number < number < _UNKNOWN:
            self.count("missed", number - self._number - 1)
        self._number = number
        self.count("received")

    def observe(self, milliseconds: Mapping[str, float]) -> None:
        """Times of one image by stage."""
        with self._lock:
            for name, value in milliseconds.items():
                self._times.setdefault(name, []).append(value)

    def error(self, sentence: str) -> None:
        """Of one image."""
        with self._lock:
            self._errors.append(sentence)

    def report(
        self, name: str, hardware: str, state: str, seconds: float, dropped: int, links: Mapping[str, int]
    ) -> DiagnosticStatus:
        """The status since the last report, `seconds` ago. dropped: of the stream that runs; links: counts of who
        publishes and subscribes, by what they are called.
        """
        with self._lock:
            since, times, errors = self._since, self._times, self._errors
            self._since, self._times, self._errors = Counter(), {}, []
        received, published = since["received"], since["published"]
        level, message = OK, f"{published / seconds:.1f} images/s; depth is {self.depth}"
        if state == "active" and not received:
            level, message = WARN, "active, and no image has come"
        if errors:
            level, message = WARN, errors[-1]
        if self.problems:
            level, message = WARN, "; ".join(self.problems.values())
        if "failure" in self.problems:
            level, message = ERROR, self.problems["failure"]
        values = {
            "state": state,
            "images received per second": f"{received / seconds:.2f}",
            "images published per second": f"{published / seconds:.2f}",
            "depth": self.depth,
            "depth uncertainty percent": "" if math.isnan(self.uncertainty) else f"{100 * self.uncertainty:.2g}",
            **{f"{stage} ms": f"{sum(milliseconds) / len(milliseconds):.2f}" for stage, milliseconds in times.items()},
            **{
                f"images {what}": str(self.counts[what])
                for what in ("received", "missed", "published", "idle", "skipped")
            },
            "images dropped": str(self.counts["dropped"] + dropped),
            "images failed": str(self.counts["failed"]),
            "messages lost": str(self.counts["lost"]),
            **{what: str(number) for what, number in links.items()},
            "last error": errors[-1] if errors else "",
            **{f"problem: {what}": sentence for what, sentence in self.problems.items()},
        }
        pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
        return DiagnosticStatus(level=level, name=name, message=message, hardware_id=hardware, values=pairs)
