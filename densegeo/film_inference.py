"""`densegeo infer` on films and cameras, one after the other: each gives a film, and frames' results on request."""

from __future__ import annotations

import glob
import json
import logging
import math
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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
from densegeo.inference import FATAL, Failure, Making, Tally, reason
from densegeo.inputs import Input, is_live
from densegeo.records import Results, source_record
from densegeo.runtime import Estimator, Geometry
from densegeo.runtime.pictures import Span
from densegeo.runtime.writers import require_short_names
from densegeo.signals import ending_on_signal

log = logging.getLogger("densegeo")


@dataclass(frozen=True)
class FilmOptions:
    """frames: whether every frame's results are saved too. max_frames: those to take, or None for all."""

    frames: bool = False
    max_frames: int | None = None
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
            with tally.notices.about(item.path) as warnings, ending_on_signal(stops.append):
                count = _Film(estimator, item, making, results, tally, options, warnings).make(advance, stops)
        except FATAL:
            raise
        except (DensegeoError, OSError, MemoryError) as error:
            tally.failures.append(Failure(item.path, reason(error)))
            results.note(item, "failed", error=reason(error))
        else:
            tally.done += 1
            files, warned = [f"{item.name}_{SIDE_BY_SIDE}", f"{item.name}_{SIDECAR}"], {"warnings": warnings}
            results.note(item, "done", files=files, frames=count, **(warned if warnings else {}))
        if stops:
            raise stops[0]


@dataclass(frozen=True)
class _Refused:
    """Why a frame is left out."""

    reason: str


class _Film:
    """One film or camera. Frames that are refused are left out and counted; the others go on."""

    def __init__(
        self,
        estimator: Estimator,
        item: Input,
        making: Making,
        results: Results,
        tally: Tally,
        options: FilmOptions,
        warnings: list[str],
    ) -> None:
        """warnings: gets what is warned of any frame, each text once."""
        self._estimator, self._item, self._making, self._results = estimator, item, making, results
        self._tally, self._options, self._warnings = tally, options, warnings
        self._folder, self._stem = results.where(item)
        require_short_names(self._folder, (f"{self._stem}_{file}" for file in (SIDE_BY_SIDE, SIDECAR)))
        self._source = source_record(item.path, results.maker)
        self._live = is_live(item.path)
        self._span: Span | None = None if self._live else self._sampled_span()
        self._first = threading.Lock()
        self._refused = 0

    def make(self, advance: Callable[[], None], stops: list[KeyboardInterrupt]) -> int:
        """How many frames the film got. Raises what ends it."""
        with self._frame_folder() as frames:
            count, broke_off = self._write(frames, advance, stops)
        record = {"source": self._source, "frames": count, "refused": self._refused, "span": self._span}
        _write_record(self._folder / f"{self._stem}_{SIDECAR}", record | {"warnings": self._warnings})
        if broke_off is not None:
            raise broke_off
        return count

    def _write(
        self, results: Path, advance: Callable[[], None], stops: list[KeyboardInterrupt]
    ) -> tuple[int, ImageError | None]:
        """The film itself: its frames, and how a camera broke off. results: the folder of the frames' results."""
        count, why = 0, ""
        with (
            opened(self._item.path) as frames,
            FilmWriter(self._folder / f"{self._stem}_{SIDE_BY_SIDE}") as film,
            closing(newest(frames) if self._live else frames) as all_frames,
        ):
            chosen_frames = _until(islice(all_frames, self._options.max_frames), stops, self._live)
            workers = 1 if self._live else self._options.workers
            try:
                for frame, picture in in_order(chosen_frames, lambda frame: self._picture(frame, results), workers):
                    if isinstance(picture, _Refused):
                        why = why or picture.reason
                        self._note_refusal(frame, picture)
                    else:
                        film.add(picture, frame.seconds)
                        count += 1
                    advance()
            except ImageError as error:
                if not self._live or not count:
                    raise
                return count, error  # what a camera gave until then is kept
            if self._live and not stops and count + self._refused < (self._options.max_frames or math.inf):
                log.warning("The stream ended by itself after %d frames.", count)
            if not count:
                raise ImageError(f"None of its {self._refused} frames gave a result. The first: {why}")
        return count, None

    def _picture(self, frame: FilmFrame, results: Path) -> NDArray[np.uint8] | _Refused:
        """Side by side; in a thread of its own."""
        with self._tally.notices.about(self._item.path) as warnings:
            try:
                geometry = self._making.calibrated(self._estimator(frame.pixels))
                if self._options.frames:
                    self._save(geometry, frame, results, warnings)
                with self._first:
                    if self._span is None:  # a camera's first frame decides
                        self._span = span_of([geometry])
                return np.asarray(geometry.visualize(frame.pixels, span=self._span))
            except FATAL:
                raise
            except (DensegeoError, OSError, MemoryError) as error:
                return _Refused(reason(error))
            finally:
                with self._first:
                    self._warnings += [text for text in warnings if text not in self._warnings]

    def _save(self, geometry: Geometry, frame: FilmFrame, results: Path, warnings: list[str]) -> None:
        geometry.save(
            results,
            (*self._making.formats, "json"),
            stem=_frame_stem(frame),
            intrinsics=self._making.camera(geometry),
            image=frame.pixels,
            dtype=self._making.dtype,
            drop_flying=self._making.drop_flying,
            source=self._source | {"frame": frame.index, "seconds": round(frame.seconds, 6), "warnings": warnings},
        )

    def _note_refusal(self, frame: FilmFrame, refused: _Refused) -> None:
        self._refused += 1
        self._tally.failures.append(Failure(self._item.path, refused.reason, frame.index))
        line = Input(self._item.path, f"{self._item.name}/{_frame_stem(frame)}")
        self._results.note(line, "failed", error=refused.reason, frame=frame.index)

    def _sampled_span(self) -> Span | None:
        """Of those samples that are not refused."""
        results = []
        for pixels in sampled(self._item.path):
            try:
                results.append(self._making.calibrated(self._estimator(pixels)))
            except FATAL:
                raise
            except DensegeoError:  # it is told when its frame comes
                continue
        return span_of(results)

    @contextmanager
    def _frame_folder(self) -> Iterator[Path]:
        """Where frames' results are written: a camera's in their place at once, a film's when it is finished."""
        final = self._folder / self._stem
        if self._live or not self._options.frames:
            yield final
            return
        prefix = f".{self._stem[:64]}.frames-"
        for stale in self._folder.glob(f"{glob.escape(prefix)}*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        hidden = self._folder / f"{prefix}{secrets.token_hex(6)}"
        try:
            yield hidden
            final.mkdir(parents=True, exist_ok=True)
            # of each frame the sidecar last: where it is, the result is whole
            for path in sorted(hidden.iterdir(), key=lambda path: (path.name[:6], path.name.endswith(SIDECAR))):
                os.replace(path, final / path.name)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _frame_stem(frame: FilmFrame) -> str:
    return f"{frame.index:06d}"


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
