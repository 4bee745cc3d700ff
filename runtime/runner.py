"""The runner: image -> `Geometry`, in the caller's thread. `load_image`, a way's `fit` and `run`, and that is all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from densegeo.colors import Color
from densegeo.outputs import Maps
from densegeo.runtime.bundle import Manifest
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.images import MAX_PIXELS, load_image, require_several
from densegeo.runtime.levels import Range
from densegeo.runtime.request_metrics import Metrics, StageTimings
from densegeo.runtime.ways import Float, Job, Way


class Runner:
    """ways: in order of preference; the last takes every image. together: the most images that it runs at once.

    max_pixels: larger images are refused before decoding. truncated: JPEGs without an end are taken. metrics: what is
    counted and timed goes there.
    """

    def __init__(
        self,
        manifest: Manifest,
        ways: Sequence[Way],
        metrics: Metrics,
        together: int,
        max_pixels: int = MAX_PIXELS,
        *,
        truncated: bool = False,
    ) -> None:
        self._manifest, self._ways, self._max_pixels, self._truncated = manifest, ways, max_pixels, truncated
        self.metrics, self.together = metrics, together

    def prepare(self, image: object, color: Color, value_range: Range | None = None, *, keep: bool = False) -> Job:
        """An image read and fitted. keep: the caller may overwrite the image before it is run.

        Raises ImageError, and what the way's `fit` raises.
        """
        timings = StageTimings()
        try:
            frame = load_image(image, color, self._max_pixels, value_range, truncated=self._truncated)
            timings.end_stage("load")
            way = next(way for way in self._ways if way.takes(frame))
            bucket, array, placement = way.fit(frame)
            if keep and array is frame.pixels:
                array = array.copy()
        except BaseException:
            self.metrics.count("rejected")
            raise
        timings.end_stage("prepare")
        return Job(way, bucket, array, placement, timings, frame.color)

    def run(self, jobs: Sequence[Job]) -> list[Geometry]:
        """Jobs of one key -> their results. Raises BackendError."""
        maps = jobs[0].way.run(jobs)
        return [self._finish(*pair) for pair in zip(jobs, maps, strict=True)]

    def run_counted(self, jobs: Sequence[Job]) -> list[Geometry]:
        """The same, with its outcome in the metrics."""
        self.metrics.count("accepted", len(jobs))
        try:
            geometries = self.run(jobs)
        except BaseException:
            self.metrics.count("failed", len(jobs))
            raise
        self.metrics.count("completed", len(jobs))
        return geometries

    def run_all(self, images: Iterable[object], color: Color, value_range: Range | None = None) -> list[Geometry]:
        """One result an image, in order; those of one key that follow each other run together."""
        require_several(images)
        results: list[Geometry] = []
        group: list[Job] = []
        for image in images:
            job = self.prepare(image, color, value_range)
            if group and (len(group) == self.together or job.key != group[0].key):
                results += self.run_counted(group)
                group = []
            group.append(job)
        return results + (self.run_counted(group) if group else [])

    def _finish(self, job: Job, maps: Maps[Float]) -> Geometry:
        valid = validity(maps)
        job.timings.end_stage("finish")
        timings = {**job.timings.milliseconds, "total": job.timings.total}
        self.metrics.observe(timings)
        return Geometry(
            prediction=maps.prediction,
            depth_kind=self._manifest.decode.depth_kind,
            normals=maps.normals,
            valid=valid,
            source_size=job.placement.source,
            timings=timings,
            model=self._manifest.model,
        )


def validity(maps: Maps[Float]) -> NDArray[np.bool_]:
    """(h, w) bool: where the prediction is finite; of normals alone, where they are."""
    if maps.prediction is not None:
        return np.isfinite(maps.prediction)
    assert maps.normals is not None
    return np.asarray(np.isfinite(maps.normals).all(axis=-1))
