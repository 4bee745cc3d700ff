"""Streams: a camera puts frames in, a consumer iterates over results, each with its frame's stamp and id."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from densegeo.errors import ConfigError, ImageError, ShutdownError
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.guard import Process
from densegeo.runtime.metrics import Metrics


@dataclass(frozen=True, eq=False)
class FrameResult:
    """What became of one frame. frame_id and stamp: as given to `put`; error: why there is no geometry, or None."""

    frame_id: object
    stamp: object
    outcome: Geometry | Exception

    @property
    def error(self) -> Exception | None:
        """The error that this frame ended with, or None."""
        return self.outcome if isinstance(self.outcome, Exception) else None

    @property
    def geometry(self) -> Geometry:
        """The result; raises the frame's error when there is none."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass(frozen=True, eq=False)
class _Frame:
    frame_id: object
    stamp: object
    image: object
    future: Future[Geometry] | None  # None: not submitted yet


class Stream:
    """Made by `Estimator.stream`. Threads may share it: usually one puts and another iterates.

    latest=True: a mailbox for one frame. `put` never waits; a frame that nobody took yet is replaced, and counted in
    `dropped`. A frame is taken when the consumer asks for the next result, so no result lies waiting and gets old.
    latest=False: every frame is queued by `put`, which waits while `depth` frames have not been read. Results come in
    the order of `put`, and frames are run while the consumer is busy.

    Iteration ends after `close`, when the remaining frames were read. A frame that failed does not end it: it comes
    as a `FrameResult` with an error. Leaving a `with` block closes the stream and drops what was not read.
    """

    def __init__(
        self, submit: Callable[[object], Future[Geometry]], metrics: Metrics, *, latest: bool, depth: int
    ) -> None:
        if not isinstance(depth, int) or depth < 1:
            raise ConfigError(f"depth must be a whole number above 0, not {depth!r}.")
        self._submit, self._metrics, self._latest, self._depth = submit, metrics, latest, depth
        self._process = Process()
        self._producer = threading.Lock()  # one `put` at a time keeps the order when latest=False
        self._changed = threading.Condition()  # guards what follows
        self._frames: deque[_Frame] = deque()
        self._count = 0
        self._dropped = 0
        self._closed = False

    @property
    def dropped(self) -> int:
        """Frames that were replaced by newer ones, or left over when the stream was closed without draining."""
        with self._changed:
            return self._dropped

    def put(self, image: object, *, stamp: object = None, frame_id: object = None) -> object:
        """Hand in a frame; returns its id (by default its number, from 0). stamp: anything, comes back as it is.

        With latest=True the image is read later: do not overwrite an array after handing it in.
        Raises ShutdownError when the stream or its estimator is closed, BackendTimeoutError after a hang (with
        latest=True the frame's result carries it), BackendError in a process that was forked since.
        """
        self._process.require()
        if self._latest:
            with self._changed:
                frame = self._number(image, stamp, frame_id)
                self._drop_all()
                self._frames.append(frame)
                self._changed.notify()
            return frame.frame_id
        with self._producer:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._frames) < self._depth)
                frame = self._number(None, stamp, frame_id)
            future = self._start(image)
            with self._changed:
                if self._closed:
                    future.cancel()
                    self._require_open()
                self._frames.append(_Frame(frame.frame_id, stamp, None, future))
                self._changed.notify_all()
        return frame.frame_id

    def close(self, drain: bool = True) -> None:
        """Take no more frames. drain: those already put are still read; otherwise they are dropped and counted."""
        if not self._process.is_here:  # the locks and the frames stayed in the parent
            return
        with self._changed:
            self._closed = True
            if not drain:
                self._drop_all()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[FrameResult]:
        return self

    def __next__(self) -> FrameResult:
        self._process.require()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._frames)
            if not self._frames:
                raise StopIteration
            frame = self._frames.popleft()
            self._changed.notify_all()
        outcome: Geometry | Exception
        try:
            future = self._start(frame.image) if frame.future is None else frame.future
            outcome = future.result()
        except Exception as error:
            outcome = error
        return FrameResult(frame.frame_id, frame.stamp, outcome)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=False)

    def _start(self, image: object) -> Future[Geometry]:
        """Submit a frame; an unusable image becomes a failed future, so that its error comes out in its turn."""
        try:
            return self._submit(image)
        except ImageError as error:
            failed: Future[Geometry] = Future()
            failed.set_exception(error)
            return failed

    def _number(self, image: object, stamp: object, frame_id: object) -> _Frame:
        """A frame with its id; the lock is held."""
        self._require_open()
        number, self._count = self._count, self._count + 1
        return _Frame(number if frame_id is None else frame_id, stamp, image, None)

    def _drop_all(self) -> None:
        """Drop and count the frames that nobody took; the lock is held."""
        for frame in self._frames:
            if frame.future is not None:
                frame.future.cancel()
        self._dropped += len(self._frames)
        self._metrics.count("dropped", len(self._frames))
        self._frames.clear()

    def _require_open(self) -> None:
        if self._closed:
            raise ShutdownError("This stream is closed. Make a new one with Estimator.stream().")
