"""The thread that takes results from an estimator's stream, newest frame only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from densegeo.colors import Color
from densegeo.errors import ShutdownError
from densegeo.runtime import Estimator
from densegeo.runtime.stream import FrameResult


class Worker:
    """on_result: called in the worker's thread with each result; what it raises goes to on_failure and ends the thread.

    An image of another color than the one before starts a new stream: a stream has one color.
    """

    def __init__(
        self, estimator: Estimator, on_result: Callable[[FrameResult], None], on_failure: Callable[[Exception], None]
    ) -> None:
        self._estimator, self._on_result, self._on_failure = estimator, on_result, on_failure
        self._stream: Any = None
        self._color: Color | None = None
        self._thread: threading.Thread | None = None
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """Images that newer ones replaced before the network was free."""
        return self._dropped + (0 if self._stream is None else self._stream.dropped)

    def put(self, image: object, color: Color, frame: object, **observations: Any) -> None:
        """Hand an image in; never waits. frame: the result's `frame_id`; observations: see `Stream.put`."""
        if color != self._color:
            self.close()
            self._color, self._stream = color, self._estimator.stream(color=color)
            self._thread = threading.Thread(target=self._work, args=(self._stream,), name="densegeo", daemon=True)
            self._thread.start()
        self._stream.put(image, frame_id=frame, **observations)

    def close(self) -> None:
        """Drop what waits, and wait for the image that is run."""
        if self._stream is None:
            return
        self._stream.close(drain=False)
        if self._thread is not None:
            self._thread.join()
        self._dropped += self._stream.dropped
        self._stream, self._thread, self._color = None, None, None

    def _work(self, stream: Any) -> None:
        try:
            for result in stream:
                self._on_result(result)
        except ShutdownError:
            pass
        except Exception as error:
            self._on_failure(error)
