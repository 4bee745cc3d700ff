"""Films and cameras: read upright at their own times, and written side by side with depth and normals (PyAV)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import ImageError
from densegeo.files import atomic_write
from densegeo.inputs import is_stream
from densegeo.runtime import Geometry

TIMEOUT_S = 10.0  # to open a stream, and for each of its packets
STREAM_OPTIONS = {"rtsp_transport": "tcp"}  # UDP loses packets, and firewalls drop it
SAMPLED = 8  # frames of a film from which its range of colours is taken
_CLOCK = Fraction(1, 90_000)  # seconds; the clock of MPEG, which divides by all usual frame rates
_CRF = "18"  # of H.264: hardly visible losses


@dataclass(frozen=True, eq=False)
class FilmFrame:
    """pixels: (H, W, 3) RGB uint8, upright. seconds: since the film's first frame. index: counts from 0."""

    pixels: NDArray[np.uint8]
    seconds: float
    index: int


@contextmanager
def opened(path: str) -> Iterator[Generator[FilmFrame]]:
    """The frames of a film, a stream or a video device, each at its own time. Damaged ones are left out.

    Raises ImageError, also while frames are read, when a film or stream cannot be opened or ends with an error.
    """
    with _container(path) as container:
        yield _frames(container, path)


def newest(frames: Iterator[FilmFrame]) -> Generator[FilmFrame]:
    """Of a camera's frames those that are the newest when they are asked for; the others are dropped.

    They are read by a thread of its own, which has ended when this is closed.
    """
    box: deque[FilmFrame] = deque(maxlen=1)
    changed, stop = threading.Condition(), threading.Event()
    ended: list[Exception | None] = []

    def read() -> None:
        error = None
        try:
            for frame in frames:
                with changed:
                    box.append(frame)
                    changed.notify()
                if stop.is_set():
                    break
        except Exception as fault:  # carried to the reader
            error = fault
        with changed:
            ended.append(error)
            changed.notify()

    thread = threading.Thread(target=read, name="densegeo-camera", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: box or ended)
                if not box:
                    break
                frame = box.popleft()
            yield frame
    finally:
        stop.set()
        thread.join()
    if ended[0] is not None:
        raise ended[0]


def sampled(path: str, count: int = SAMPLED) -> list[NDArray[np.uint8]]:
    """Some frames from all over a film, or the first one where it cannot be searched. Raises ImageError."""
    with _container(path) as container:
        stream = container.streams.video[0]
        samples = [next(_frames(container, path)).pixels]
        for part in range(1, count if stream.duration else 1):
            try:
                container.seek((stream.start_time or 0) + part * stream.duration // count, stream=stream)
                samples.append(next(_frames(container, path)).pixels)
            except (ImageError, OSError):  # a damaged part: the others do
                continue
        return samples


def span_of(geometries: list[Geometry]) -> tuple[float, float] | None:
    """One range of colours for results of one film: from the least 2nd to the greatest 98th percentile."""
    ends = []
    for geometry in geometries:
        if geometry.prediction is not None and geometry.valid.any():
            values = geometry.depth if geometry.has_depth else geometry.prediction
            ends.append(np.percentile(values[geometry.valid], (2, 98)))
    if not ends:
        return None
    low, high = float(min(pair[0] for pair in ends)), float(max(pair[1] for pair in ends))
    return (low, high) if low < high else None


def in_order(
    frames: Iterator[FilmFrame], work: Callable[[FilmFrame], Any], workers: int
) -> Iterator[tuple[FilmFrame, Any]]:
    """Each frame with what `work` made of it, in order, several at once."""
    waiting: deque[tuple[FilmFrame, Future[Any]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="densegeo-film") as pool:
        try:
            for frame in frames:
                waiting.append((frame, pool.submit(work, frame)))
                if len(waiting) > workers:
                    first, outcome = waiting.popleft()
                    yield first, outcome.result()
            while waiting:
                first, outcome = waiting.popleft()
                yield first, outcome.result()
        finally:
            for _, future in waiting:
                future.cancel()


class FilmWriter:
    """An MP4 file (H.264) that appears when the block ends, of pictures of one size at their own times."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> FilmWriter:
        self._av = import_module("av")
        self._file = atomic_write(self._path)
        self._container: Any = self._av.open(str(self._file.__enter__()), "w")
        self._stream: Any = None
        self._last = -1
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
        except BaseException as fault:  # of the last bytes: the film is not whole either
            self._file.__exit__(type(fault), fault, fault.__traceback__)
            raise
        self._file.__exit__(*error)

    def add(self, picture: NDArray[np.uint8], seconds: float) -> None:
        """(H, W, 3) RGB. An odd row or column at the end is left out, which H.264 cannot hold. Times must grow."""
        height, width = (side - side % 2 for side in picture.shape[:2])
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=30, options={"crf": _CRF, "preset": "veryfast"})
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.codec_context.time_base = self._stream.time_base = _CLOCK
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        self._last = max(self._last + 1, round(seconds / _CLOCK))
        frame.pts, frame.time_base = self._last, _CLOCK
        self._container.mux(self._stream.encode(frame))


@contextmanager
def _container(path: str) -> Iterator[Any]:
    av = import_module("av")
    options: dict[str, Any] = {}
    if is_stream(path):
        options = {"timeout": TIMEOUT_S}
        if path.startswith("rtsp"):
            options["options"] = STREAM_OPTIONS
        if path.startswith("/dev/"):
            options["format"] = "v4l2"
            if "v4l2" not in av.formats_available:
                raise ImageError(
                    f"{path} is a video device, and this build of PyAV reads none. Give the camera's address (rtsp:// "
                    "or http://), or build PyAV on the system's FFmpeg: pip install --no-binary av av."
                )
    try:
        container = av.open(path, **options)
    except (OSError, ValueError) as error:  # FFmpeg's own errors are of these kinds
        raise ImageError(f"{path} cannot be opened: {_why(error)}.") from error
    with container:
        if not container.streams.video:
            raise ImageError(f"{path} has no pictures in it.")
        container.streams.video[0].thread_type = "AUTO"
        yield container


def _frames(container: Any, path: str) -> Generator[FilmFrame]:
    av = import_module("av")
    stream = container.streams.video[0]
    rate = float(stream.average_rate or 30)
    timeless = container.format.name in ("mpjpeg", "mjpeg")  # then frames have the time at which they come
    start, index, last = None, 0, 0.0
    try:
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:  # a damaged part of the film
                continue
            for frame in decoded:
                seconds = last + 1 / rate if frame.time is None and index else float(frame.time or 0)
                seconds = time.monotonic() if timeless else seconds
                start = seconds if start is None else start
                last = seconds
                yield FilmFrame(_upright(frame), seconds - start, index)
                index += 1
    except OSError as error:
        raise ImageError(f"{path} broke off after {index} frames: {_why(error)}.") from error
    if not index:
        raise ImageError(f"{path} has no frame that can be read.")


def _upright(frame: Any) -> NDArray[np.uint8]:
    """RGB, turned as the film's display matrix says (anticlockwise degrees)."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
