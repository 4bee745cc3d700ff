"""Streams: a camera puts frames in, a consumer iterates over results, each with its frame's stamp and id."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from numpy.typing import ArrayLike

from densegeo.argument_checks import number_of, require_flags, shown, whole_of
from densegeo.errors import CalibrationError, ConfigError, DeadlineError, ImageError, ShutdownError
from densegeo.runtime.camera import CameraLike
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.guard import Process
from densegeo.runtime.observations import Observations, ObservedScale, checked_observations, take_over
from densegeo.runtime.request_metrics import Metrics

log = logging.getLogger("densegeo")
_POLL = 0.1  # seconds


@dataclass(frozen=True, eq=False)
class FrameResult:
    """What became of one frame. frame_id and stamp: as given to `put`; error: why there is no geometry, or None.

    refusal: why its depth is neither metric nor up to scale although `put` was told intrinsics or anchors, or None.
    """

    frame_id: object
    stamp: object
    outcome: Geometry | Exception
    refusal: CalibrationError | None = None

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
    observations: Observations


class Stream:
    """Made by `Estimator.stream`. Threads may share it: usually one puts and another iterates.

    latest=True: a mailbox for one frame. `put` never waits; a frame that nobody took yet is replaced, and counted in
    `dropped`. A frame is taken when the consumer asks for the next result, so no result lies waiting and gets old.
    latest=False: every frame is queued by `put`, which waits while `depth` frames have not been read. Results come in
    the order of `put`, and frames are run while the consumer is busy.

    Results are taken with `for` or `async for`, with `get`, or by a callback (`subscribe`).
    Frames that `put` is told intrinsics or anchors of come back with depth, by one `ScaleTracker` a stream.

    Iteration ends after `close`, when the remaining frames were read. A frame that failed does not end it: it comes
    as a `FrameResult` with an error. Leaving a `with` block closes the stream and drops what was not read.

    Args:
        submit: Queues an image; gives the future of its result.
        metrics: Of the estimator, which count the frames.
        latest: See above.
        depth: Without `latest`, how many frames may wait to be read.

    Raises:
        ConfigError: For a depth that is no number above 0.

    Example:
        >>> from densegeo import Estimator
        >>> with Estimator("fe2e-tiny") as estimator, estimator.stream(latest=False) as stream:
        ...     for stamp in (0.0, 0.1):
        ...         number = stream.put("photo.jpg", stamp=stamp)
        ...     stream.close(drain=True)
        ...     for frame in stream:
        ...         print(frame.frame_id, frame.stamp, frame.geometry.normals.shape)
        0 0.0 (384, 512, 3)
        1 0.1 (384, 512, 3)
    """

    def __init__(
        self, submit: Callable[[object], Future[Geometry]], metrics: Metrics, *, latest: bool, depth: int
    ) -> None:
        require_flags(latest=latest)
        self._submit, self._metrics, self._latest, self._depth = submit, metrics, latest, whole_of("depth", depth)
        self._process = Process()
        self._producer = threading.Lock()  # one `put` at a time keeps the order when latest=False
        self._changed = threading.Condition()  # guards what follows
        self._frames: deque[_Frame] = deque()
        self._count = 0
        self._dropped = 0
        self._closed = False
        self._consumer = threading.Lock()  # one result at a time, in order; guards what follows
        self._submitted: _Frame | None = None  # submitted, and not delivered yet
        self._scale = ObservedScale()

    @property
    def dropped(self) -> int:
        """Frames that were replaced by newer ones, or left over when the stream was closed without draining."""
        with self._changed:
            return self._dropped

    def put(
        self,
        image: object,
        *,
        stamp: object = None,
        frame_id: object = None,
        intrinsics: CameraLike | None = None,
        anchors: Any = None,
        up: ArrayLike | None = None,
        camera_height: float | None = None,
        motion: ArrayLike | None = None,
    ) -> object:
        """Hand in a frame.

        With latest=True the image is read later: do not overwrite an array after handing it in.

        Args:
            image: As the estimator takes it.
            stamp: Anything; comes back with the result as it is.
            frame_id: By default the frame's number, from 0.
            intrinsics: As in `Geometry.to_metric`; holds for later frames too.
            anchors: As there, of this frame.
            up: As there, of this frame.
            camera_height: As there; holds for later frames too.
            motion: (4, 4), points of the camera at the last `put` into the camera now; the identity: it stands still.

        Returns:
            The frame's id.

        Raises:
            ConfigError: For intrinsics, anchors, a direction, a height or a motion of another type or shape.
            ShutdownError: The stream or its estimator is closed.
            BackendTimeoutError: After a hang (with latest=True the frame's result carries it).
            BackendError: In a process that was forked since.
        """
        self._process.require()
        observations = checked_observations(intrinsics, anchors, up, camera_height, motion)
        if self._latest:
            with self._changed:
                frame = self._number(image, stamp, frame_id, observations)
                for unread in self._frames:
                    take_over(unread.observations, observations)
                self._drop_all()
                self._frames.append(frame)
                self._changed.notify()
            return frame.frame_id
        with self._producer:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._frames) < self._depth)
                frame = self._number(None, stamp, frame_id, observations)
            future = self._start(image)
            with self._changed:
                if self._closed:
                    future.cancel()
                    self._require_open()
                self._frames.append(_Frame(frame.frame_id, stamp, None, future, observations))
                self._changed.notify_all()
        return frame.frame_id

    def close(self, drain: bool = True) -> None:
        """Take no more frames.

        Args:
            drain: Those already put are still read; otherwise they are dropped, and counted in `dropped`.
        """
        if not self._process.is_here:  # the locks and the frames stayed in the parent
            return
        with self._changed:
            self._closed = True
            if not drain:
                self._drop_all()
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> FrameResult:
        """The next result.

        Args:
            timeout: Seconds to wait at most; None: as long as it takes.

        Returns:
            The result of the oldest frame that was not read yet.

        Raises:
            ConfigError: For a timeout that is no number of seconds.
            DeadlineError: There is none by then; it comes with a later call. (A TimeoutError.)
            ShutdownError: The stream is closed and all was read.
        """
        seconds = math.inf if timeout is None else number_of(timeout)
        if seconds is None or math.isnan(seconds):
            raise ConfigError(f"timeout must be seconds, or None for no limit, not {shown(timeout)}.")
        end = None if seconds > threading.TIMEOUT_MAX else time.monotonic() + seconds
        result = self._next(end)
        if result is None:
            self._require_open()
            raise DeadlineError(f"No result within {seconds:g} s. It comes with a later call.")
        return result

    def subscribe(self, callback: Callable[[FrameResult], object]) -> threading.Thread:
        """Call a function with every result, in a thread of its own.

        Args:
            callback: Takes a `FrameResult`. What it raises is logged, and the next result comes all the same.

        Returns:
            The thread, which ends when the stream does.

        Raises:
            ConfigError: For what is not callable.
        """
        if not callable(callback):
            raise ConfigError(f"A callback is a function of one argument, not {shown(callback)}.")

        def deliver() -> None:
            for result in self:
                try:
                    callback(result)
                except Exception:
                    log.exception("A stream's callback failed on frame %s", result.frame_id)

        thread = threading.Thread(target=deliver, name="densegeo-stream", daemon=True)
        thread.start()
        return thread

    def __iter__(self) -> Iterator[FrameResult]:
        return self

    def __next__(self) -> FrameResult:
        result = self._next(None)
        if result is None:
            raise StopIteration
        return result

    def __aiter__(self) -> AsyncIterator[FrameResult]:
        return self

    async def __anext__(self) -> FrameResult:
        import asyncio

        while True:
            # short waits in a thread: a cancelled task leaves none behind, and no result is lost
            ready = await asyncio.get_running_loop().run_in_executor(None, self._ready, time.monotonic() + _POLL)
            if ready:
                result = self._next(time.monotonic())
                if result is not None:
                    return result
                with self._changed:
                    if self._closed and not self._frames and self._submitted is None:
                        raise StopAsyncIteration

    def _ready(self, end: float | None) -> bool:
        """Whether a result can be delivered at once, or the stream is over, by `end`."""
        self._process.require()
        if not self._consumer.acquire(timeout=-1 if end is None else max(0.0, end - time.monotonic())):
            return False
        try:
            return self._wait(end)
        finally:
            self._consumer.release()

    def _next(self, end: float | None) -> FrameResult | None:
        """The next result; None when there is none by `end`, or none any more."""
        self._process.require()
        if not self._consumer.acquire(timeout=-1 if end is None else max(0.0, end - time.monotonic())):
            return None
        try:
            if not self._wait(end) or self._submitted is None:
                return None
            frame, self._submitted = self._submitted, None
            assert frame.future is not None
            try:
                geometry, refusal = self._scale.apply(frame.future.result(), frame.observations)
                return FrameResult(frame.frame_id, frame.stamp, geometry, refusal)
            except Exception as error:
                self._scale.skip(frame.observations)
                return FrameResult(frame.frame_id, frame.stamp, error)
        finally:
            self._consumer.release()

    def _wait(self, end: float | None) -> bool:
        """Take a frame and wait until it was run; False when that takes longer. The consumer's lock is held."""
        if self._submitted is None:
            with self._changed:
                seconds_left = None if end is None else max(0.0, end - time.monotonic())
                if not self._changed.wait_for(lambda: self._closed or self._frames, seconds_left):
                    return False
                if not self._frames:
                    return True
                frame = self._frames.popleft()
                self._changed.notify_all()
            try:
                future = self._start(frame.image) if frame.future is None else frame.future
            except Exception as error:
                future = Future()
                future.set_exception(error)
            self._submitted = dataclasses.replace(frame, image=None, future=future)
        assert self._submitted.future is not None
        seconds_left = None if end is None else max(0.0, end - time.monotonic())
        return bool(wait([self._submitted.future], seconds_left).done)

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

    def _number(self, image: object, stamp: object, frame_id: object, observations: Observations) -> _Frame:
        """A frame with its id; the lock is held."""
        self._require_open()
        number, self._count = self._count, self._count + 1
        return _Frame(number if frame_id is None else frame_id, stamp, image, None, observations)

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
