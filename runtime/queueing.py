"""The queue behind `Estimator.submit`: bounded, first come first served, grouped by bucket, with deadlines.

A plain data structure: it starts nothing, locks nothing and reads no clock. Times are seconds of one clock that the
caller chooses and passes in.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from densegeo.errors import QueueFullError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Entry(Generic[T]):
    """One waiting item. key: entries of one key may share a batch. deadline: the last moment to start it."""

    ticket: int
    item: T
    key: Hashable
    arrived: float
    deadline: float = math.inf

    def expired(self, now: float) -> bool:
        """Whether it is too late to start this entry."""
        return now > self.deadline

    def waits_until(self, max_wait: float) -> float:
        """Until when it may wait for others: `max_wait` after arrival, but at most half of its time."""
        return self.arrived + min(max_wait, max(0.0, self.deadline - self.arrived) / 2)


class BoundedQueue(Generic[T]):
    """At most `capacity` entries, taken in batches of at most `max_batch` of one key.

    max_wait: seconds that an entry waits for its batch to fill.
    """

    def __init__(self, capacity: int, max_batch: int, max_wait: float) -> None:
        self._capacity, self._max_batch, self._max_wait = capacity, max_batch, max_wait
        self._entries: dict[int, Entry[T]] = {}  # by ticket, in order of arrival
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether `put` would raise."""
        return len(self._entries) >= self._capacity

    def require_room(self) -> None:
        """Raises QueueFullError when the queue is full."""
        if self.full:
            raise QueueFullError(
                f"The queue is full: {self._capacity} requests wait. Send fewer, try again later, "
                "or make max_queue larger."
            )

    def put(self, item: T, key: Hashable, now: float, deadline: float = math.inf) -> int:
        """Append an item; returns its ticket, which is never used again. Raises QueueFullError."""
        self.require_room()
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._entries[ticket] = Entry(ticket, item, key, now, deadline)
        return ticket

    def remove(self, ticket: int) -> Entry[T] | None:
        """Take one entry out of turn; None when it has left the queue already."""
        return self._entries.pop(ticket, None)

    def expire(self, now: float) -> list[Entry[T]]:
        """Remove and return the entries whose deadline has passed."""
        late = [entry for entry in self._entries.values() if entry.expired(now)]
        for entry in late:
            del self._entries[entry.ticket]
        return late

    def wait(self, now: float) -> float:
        """Seconds until a batch should be taken: 0 at once, infinity while the queue is empty.

        At once means that the oldest entry's batch is full or that some entry has waited long enough.
        """
        if not self._entries:
            return math.inf
        if len(self._oldest()) == self._max_batch:
            return 0.0
        return max(0.0, min(entry.waits_until(self._max_wait) for entry in self._entries.values()) - now)

    def take(self, now: float) -> tuple[list[Entry[T]], list[Entry[T]]]:
        """(batch, expired), both removed. The batch is the oldest live entry and the next ones of its key, in order."""
        late = self.expire(now)
        batch = self._oldest()
        for entry in batch:
            del self._entries[entry.ticket]
        return batch, late

    def clear(self) -> list[Entry[T]]:
        """Remove and return everything, in order of arrival."""
        entries = list(self._entries.values())
        self._entries.clear()
        return entries

    def _oldest(self) -> list[Entry[T]]:
        batch: list[Entry[T]] = []
        for entry in self._entries.values():
            if not batch or entry.key == batch[0].key:
                batch.append(entry)
                if len(batch) == self._max_batch:
                    break
        return batch
