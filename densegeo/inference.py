"""`densegeo infer` on images: workers read, run and save, each one image at a time; what fails is counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from densegeo import remote
from densegeo.errors import BackendTimeoutError, BundleError, DensegeoError, ResourceError, ShutdownError
from densegeo.formats import RESULTS
from densegeo.infer_options import in_options
from densegeo.inputs import Input
from densegeo.notices import Notices, warn_if_empty
from densegeo.records import Results, source_record
from densegeo.runtime import Camera, Estimator, Geometry
from densegeo.runtime.images import load_image
from densegeo.runtime.writers import require_short_names
from densegeo.signals import ending_on_signal

# What would hit every further image alike: the run ends.
FATAL = (BackendTimeoutError, BundleError, ShutdownError)


@dataclass(frozen=True)
class Making:
    """How a result is made of what the estimator returns. Numbers as in `Geometry.to_metric` and `save`."""

    formats: tuple[str, ...]
    depth_range: tuple[float, float] | None = None  # metres: near, far
    scale_shift: tuple[float, float] | None = None
    intrinsics: Camera | tuple[float, float, float, float] | None = None  # a calibration; pixels: fx, fy, cx, cy
    fov: float | None = None  # horizontal, degrees, instead of intrinsics
    dtype: Any = "float32"
    value_range: tuple[float, float] | None = None  # of images, as in `load_image`
    truncated: bool = False
    drop_flying: bool = False

    def calibrated(self, geometry: Geometry) -> Geometry:
        """In metres when the command line says how, up to scale where a format needs depth, else as it is.

        Warns (ResultWarning) of one that says nothing.
        """
        warn_if_empty(geometry)
        if self.depth_range:
            near, far = self.depth_range
            return geometry.to_metric(near=near, far=far)
        if self.scale_shift:
            scale, shift = self.scale_shift
            return geometry.to_metric(scale=scale, shift=shift)
        if any(RESULTS[name].needs == "depth" for name in self.formats):
            return geometry.to_scale(self.camera(geometry))
        return geometry

    def camera(self, geometry: Geometry) -> Any:
        """Of the image, as `Camera.of` takes it, or None."""
        return self.intrinsics if self.fov is None else Camera.from_fov(self.fov, geometry.source_size)

    def record(self) -> dict[str, Any]:
        """The options that decide what a result is, for its record."""
        record: dict[str, Any] = {"depth_range": _listed(self.depth_range), "scale_shift": _listed(self.scale_shift)}
        record |= {"intrinsics": self._camera_record(), "dtype": self.dtype}
        if self.value_range is not None:
            record["value_range"] = _listed(self.value_range)
        record |= {"drop_flying": True} if self.drop_flying else {}
        return record | ({"truncated": True} if self.truncated else {})

    def _camera_record(self) -> Any:
        if isinstance(self.intrinsics, Camera):
            return asdict(self.intrinsics)
        return {"fov": self.fov} if self.fov is not None else _listed(self.intrinsics)


@dataclass(frozen=True)
class Failure:
    """What could not be done. frame: of a film that went on without it, or None for all of the source."""

    source: str
    reason: str
    frame: int | None = None

    @property
    def where(self) -> str:
        """In words."""
        return self.source if self.frame is None else f"{self.source}, frame {self.frame}"


@dataclass
class Tally:
    """How a run went. done: images and films. stopped_by: the signal that ended it early, by name, or empty."""

    done: int = 0
    failures: list[Failure] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notices: Notices = field(default_factory=Notices)
    seconds: float = 0.0
    stopped_by: str = ""


@dataclass(frozen=True)
class Outcome:
    """How one image went. error: empty where it was done."""

    item: Input
    files: tuple[str, ...] = ()
    error: str = ""
    warnings: tuple[str, ...] = ()


def run_images(
    estimator: Estimator,
    items: Sequence[Input],
    making: Making,
    results: Results,
    tally: Tally,
    workers: int,
    advance: Callable[[], None],
) -> None:
    """Work through images; `tally` and the journal say how each went, also when this is interrupted.

    On KeyboardInterrupt the images that are being worked on are finished, and then it is raised again. Raises what
    would hit every image alike, and ResourceError when the journal cannot be written.
    """
    todo, stop = _Shared(items), threading.Event()
    ended: SimpleQueue[Outcome | BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            for item in todo:
                if stop.is_set():
                    break
                with tally.notices.about(item.path) as warnings:
                    ended.put(run_one(estimator, item, making, results, warnings))
        except BaseException as error:  # carried to the caller's thread
            ended.put(error)
        finally:
            ended.put(None)

    threads = [threading.Thread(target=work, name=f"densegeo-infer-{index}") for index in range(workers)]
    running, fault = len(threads), None
    with ending_on_signal(ended.put):  # a signal waits in the line of outcomes, so that none of them is lost
        for thread in threads:
            thread.start()
        while running:
            outcome = ended.get()
            if outcome is None:
                running -= 1
                continue
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                take(outcome, results, tally)
                advance()
            except BaseException as error:
                fault = fault or error
                stop.set()
    if isinstance(fault, OSError):
        raise ResourceError(f"Cannot write to {results.folder}: {fault.strerror or fault}.") from fault
    if fault is not None:
        raise fault


def take(outcome: Outcome, results: Results, tally: Tally) -> None:
    """Count an outcome, and note it in the journal."""
    warned = {"warnings": outcome.warnings} if outcome.warnings else {}
    if outcome.error:
        tally.failures.append(Failure(outcome.item.path, outcome.error))
        results.note(outcome.item, "failed", error=outcome.error, **warned)
    else:
        tally.done += 1
        results.note(outcome.item, "done", files=outcome.files, **warned)


def run_one(estimator: Estimator, item: Input, making: Making, results: Results, warnings: list[str]) -> Outcome:
    """One image from its file to its results'. warnings: those about it, which grow meanwhile.

    Raises what would hit every image alike.
    """
    try:
        folder, stem = results.where(item)
        paths = save_one(estimator, item, making, results.maker, warnings, folder, stem)
        results.clear(item, paths)
    except FATAL:
        raise
    except (DensegeoError, OSError, MemoryError) as error:
        return Outcome(item, error=reason(error), warnings=tuple(warnings))
    files = tuple(path.relative_to(results.folder).as_posix() for path in paths)
    return Outcome(item, files, warnings=tuple(warnings))


def save_one(
    estimator: Estimator,
    item: Input,
    making: Making,
    maker: Mapping[str, Any],
    warnings: list[str],
    folder: Path,
    stem: str,
) -> list[Path]:
    """One image's results, saved into a folder; their files. maker: as of `Results`. Raises DensegeoError, OSError."""
    formats = (*making.formats, "json")
    if stem:
        require_short_names(folder, (f"{stem}_{file}" for name in formats for file in RESULTS[name].files))
    content = remote.read(item.path) if remote.is_remote(item.path) else None
    image = item.path if content is None else content
    frame = load_image(image, value_range=making.value_range, truncated=making.truncated)
    source = source_record(item.path, maker, content) | {"warnings": warnings}
    together = estimator.images_together > 1
    geometry = estimator.submit(frame).result() if together else estimator(frame)
    return making.calibrated(geometry).save(
        folder,
        formats,
        stem=stem,
        intrinsics=making.camera(geometry),
        image=frame,
        dtype=making.dtype,
        drop_flying=making.drop_flying,
        source=source,
    )


def reason(error: Exception) -> str:
    """Of a failure, in the command line's words."""
    return in_options(str(error)) or "not enough memory"


def _listed(pair: tuple[float, ...] | None) -> list[float] | None:
    return None if pair is None else list(pair)


class _Shared(Iterator[Input]):
    """One iterator for several threads."""

    def __init__(self, items: Sequence[Input]) -> None:
        self._items, self._lock = iter(items), threading.Lock()

    def __next__(self) -> Input:
        with self._lock:
            return next(self._items)
