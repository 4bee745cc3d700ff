"""The request queue against a plain list, step by step, in random order."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from densegeo.errors import QueueFullError
from densegeo.runtime.queueing import BoundedQueue, Entry


class QueueMachine(RuleBasedStateMachine):
    """The model is the list of live tickets with their keys and times; every ticket must end exactly once."""

    @initialize(capacity=st.integers(1, 6), max_batch=st.integers(1, 4), max_wait=st.integers(0, 5))
    def start(self, capacity: int, max_batch: int, max_wait: int) -> None:
        self.capacity, self.max_batch, self.max_wait = capacity, max_batch, max_wait
        self.queue: BoundedQueue[str] = BoundedQueue(capacity, max_batch, max_wait)
        self.live: list[tuple[int, str, int, float]] = []  # ticket, key, arrived, deadline
        self.ended: list[int] = []
        self.accepted = 0
        self.now = 0

    def end(self, entries: list[Entry[str]]) -> None:
        for entry in entries:
            assert entry.item == f"item {entry.ticket}"
            (match,) = [row for row in self.live if row[0] == entry.ticket]
            assert match == (entry.ticket, entry.key, entry.arrived, entry.deadline)
            self.live.remove(match)
            self.ended.append(entry.ticket)

    def late(self) -> list[int]:
        return [ticket for ticket, _, _, deadline in self.live if deadline < self.now]

    @rule(key=st.sampled_from("abc"), seconds=st.none() | st.integers(0, 8))
    def put(self, key: str, seconds: int | None) -> None:
        deadline = math.inf if seconds is None else self.now + seconds
        if len(self.live) == self.capacity:
            with pytest.raises(QueueFullError, match=str(self.capacity)):
                self.queue.put("never", key, self.now, deadline)
            return
        ticket = self.queue.put(f"item {self.accepted}", key, self.now, deadline)
        assert ticket == self.accepted
        self.live.append((ticket, key, self.now, deadline))
        self.accepted += 1

    @rule(by=st.integers(1, 4))
    def time_passes(self, by: int) -> None:
        self.now += by

    @rule()
    def take(self) -> None:
        late = self.late()
        alive = [row for row in self.live if row[0] not in late]
        expected = [ticket for ticket, key, _, _ in alive if key == alive[0][1]][: self.max_batch]
        batch, expired = self.queue.take(self.now)
        assert [entry.ticket for entry in expired] == late
        assert [entry.ticket for entry in batch] == expected
        self.end(batch + expired)

    @rule()
    def expire(self) -> None:
        late = self.late()
        expired = self.queue.expire(self.now)
        assert [entry.ticket for entry in expired] == late
        self.end(expired)

    @precondition(lambda self: self.accepted > 0)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        ticket = data.draw(st.integers(0, self.accepted - 1))
        entry = self.queue.remove(ticket)
        assert (entry is None) == (ticket in self.ended)
        self.end([] if entry is None else [entry])

    @rule()
    def clear(self) -> None:
        tickets = [row[0] for row in self.live]
        entries = self.queue.clear()
        assert [entry.ticket for entry in entries] == tickets
        self.end(entries)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.queue) == len(self.live) <= self.capacity
        assert self.queue.full == (len(self.live) == self.capacity)
        assert sorted([*self.ended, *(row[0] for row in self.live)]) == list(range(self.accepted))

    @invariant()
    def waiting_is_bounded(self) -> None:
        wait = self.queue.wait(self.now)
        if not self.live:
            assert wait == math.inf
            return
        oldest = self.live[0]
        assert 0 <= wait <= max(0, oldest[2] + self.max_wait - self.now)
        if sum(key == oldest[1] for _, key, _, _ in self.live) >= self.max_batch:
            assert wait == 0
        for _, _, arrived, deadline in self.live:  # half of its time is left when it is taken
            if deadline < math.inf:
                assert self.now + wait <= max(self.now, (arrived + deadline) / 2)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_a_batch_is_of_one_key_and_leaves_the_others_in_order() -> None:
    queue: BoundedQueue[int] = BoundedQueue(capacity=9, max_batch=3, max_wait=0)
    for item, key in enumerate("abaabab"):
        queue.put(item, key, now=0)
    batches = [[entry.item for entry in queue.take(now=0)[0]] for _ in range(4)]
    assert batches == [[0, 2, 3], [1, 4, 6], [5], []]


def test_a_deadline_is_the_last_moment_to_start() -> None:
    queue: BoundedQueue[str] = BoundedQueue(capacity=2, max_batch=2, max_wait=0)
    queue.put("in time", "a", now=0, deadline=1.0)
    queue.put("late", "a", now=0, deadline=math.nextafter(1.0, 0))
    batch, expired = queue.take(now=1.0)
    assert [entry.item for entry in batch] == ["in time"]
    assert [entry.item for entry in expired] == ["late"]


def test_others_are_awaited_for_max_wait_or_half_of_the_deadline() -> None:
    queue: BoundedQueue[int] = BoundedQueue(capacity=9, max_batch=2, max_wait=4)
    queue.put(0, "a", now=10)
    assert queue.wait(now=11) == 3
    queue.put(1, "b", now=11, deadline=13)
    assert queue.wait(now=11) == 1
    queue.put(2, "a", now=11)
    assert queue.wait(now=11) == 0
