"""`densegeo infer` on films and cameras, one after the other: each gives a film, and frames' results on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import DensegeoError, ImageError
from densegeo.files import atomic_write
from densegeo.films import FilmFrame, FilmWriter, in_order, newest, opened, sampled, span_of
from densegeo.formats import SIDE_BY_SIDE, SIDECAR
from densegeo.inference import FATAL, Making, Tally
from densegeo.inputs import Input, is_live
from densegeo.records import Results, source_record
from densegeo.runtime import Estimator
from densegeo.signals import told


@dataclass(frozen=True)
class FilmOptions:
    """frames: whether every frame's results are saved too. most: frames to take, or None for all."""

    frames: bool = False
    most: int | None = None
    workers: int = 3


def run_films(
    estimator: Estimator,
    items: list[Input],
    making: Making,
    results: Results,
    tally: Tally,
    options: FilmOptions,
    advance: Callable[[], None],
) -> None:
    """Work through films and cameras; `tally` and the journal say how each went. advance: called after each frame.

    Ctrl-C or SIGTERM ends a camera's film, which is kept, or gives a film up, and is raised. Raises what would hit
    every further film alike.
    """
    for item in items:
        stops: list[KeyboardInterrupt] = []
        try:
            with told(stops.append):
                count = _one(estimator, item, making, results, options, advance, stops)
        except FATAL:
            raise
        except (DensegeoError, OSError, MemoryError) as error:
            reason = str(error) or "not enough memory"
            tally.failures.append((item.path, reason))
            results.note(item, "failed", error=reason)
            continue
        tally.done += 1
        results.note(item, "done", files=[f"{item.name}_{SIDE_BY_SIDE}", f"{item.name}_{SIDECAR}"], frames=count)
        if stops:
            raise stops[0]


def _one(
    estimator: Estimator,
    item: Input,
    making: Making,
    results: Results,
    options: FilmOptions,
    advance: Callable[[], None],
    stops: list[KeyboardInterrupt],
) -> int:
    """How many frames the film got."""
    folder, stem = results.where(item)
    source = source_record(item.path, results.maker)
    span, count, live = None, 0, is_live(item.path)
    if not live:
        span = span_of([making.calibrated(estimator(pixels)) for pixels in sampled(item.path)])

    def work(frame: FilmFrame) -> NDArray[np.uint8]:
        geometry = making.calibrated(estimator(frame.pixels))
        if options.frames:
            at = {"frame": frame.index, "seconds": round(frame.seconds, 6)}
            geometry.save(
                folder / stem,
                (*making.formats, "json"),
                stem=f"{frame.index:06d}",
                intrinsics=making.camera(geometry),
                image=frame.pixels,
                dtype=making.dtype,
                source=source | at,
            )
        nonlocal span
        if span is None:  # a camera's first frame decides
            span = span_of([geometry])
        return np.asarray(geometry.visualize(frame.pixels, span=span))

    broke_off: ImageError | None = None
    with (
        opened(item.path) as frames,
        FilmWriter(folder / f"{stem}_{SIDE_BY_SIDE}") as film,
        closing(newest(frames) if live else frames) as all_frames,
    ):
        taken = _until(islice(all_frames, options.most), stops, live)
        try:
            for frame, picture in in_order(taken, work, 1 if live else options.workers):
                film.add(picture, frame.seconds)
                count += 1
                advance()
        except ImageError as error:
            if not live or not count:
                raise
            broke_off = error  # what a camera gave until then is kept
    _write_record(folder / f"{stem}_{SIDECAR}", {"source": source, "frames": count, "span": span})
    if broke_off is not None:
        raise broke_off
    return count


def _until(frames: Iterator[FilmFrame], stops: list[KeyboardInterrupt], live: bool) -> Iterator[FilmFrame]:
    """Frames until a signal came; then a camera's film ends there, and a film's is given up."""
    for frame in frames:
        yield frame
        if stops:
            if not live:
                raise stops[0]
            return


def _write_record(path: Path, record: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n")
