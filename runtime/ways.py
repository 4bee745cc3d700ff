"""How an image goes through a backend: prepared and finished on the host, or whole to the device and back.

An estimator has one or both; the first that takes an image is its way. Images of one way and one size run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from densegeo.colors import Color
from densegeo.outputs import Maps
from densegeo.runtime.backends import Backend, FrameBackend
from densegeo.runtime.bundle import Bucket, Manifest
from densegeo.runtime.host_chain import Chain, assemble
from densegeo.runtime.images import Frame
from densegeo.runtime.request_metrics import StageTimings
from densegeo.runtime.resample import (
    Placement,
    authors_bucket,
    choose_bucket,
    in_batches,
    place,
    prepare,
    prepare_authors,
    whole,
)

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Job:
    """An image made ready for its bucket and its way, and where its time went so far.

    array: what the way's `fit` made of it. placement: where the image lies in its bucket. color: the image's layout.
    """

    way: Way
    bucket: Bucket
    array: NDArray[Any]
    placement: Placement
    timings: StageTimings
    color: Color = "rgb"

    @property
    def key(self) -> tuple[Way, str, Color]:
        """Jobs of one key may run together."""
        return self.way, self.bucket.name, self.color


class Way(Protocol):
    """One way through a backend. together: how many images of one size it runs at once."""

    together: int

    def takes(self, frame: Frame) -> bool:
        """Whether it can run this image."""
        ...

    def fit(self, frame: Frame) -> tuple[Bucket, NDArray[Any], Placement]:
        """The image's bucket, and what `run` takes of it. The array may be the image's own."""
        ...

    def run(self, jobs: Sequence[Job]) -> list[Maps[Float]]:
        """Of each of some jobs of one bucket its maps, at the image's size. Raises BackendError."""
        ...


class HostWay:
    """Resized by numpy and Pillow, the networks one by one, assembled by numpy.

    fit: "stretch" or "pad". own_size: results stay as large as the image was in the network.
    """

    def __init__(self, backend: Backend, manifest: Manifest, fit: str = "stretch", own_size: bool = False) -> None:
        self._backend, self._manifest, self._fit, self._own_size = backend, manifest, fit, own_size
        self.together = max(bucket.batch for bucket in manifest.buckets)

    def takes(self, frame: Frame) -> bool:
        """Every image."""
        return True

    def fit(self, frame: Frame) -> tuple[Bucket, Float, Placement]:
        """rgb (1, 3, H, W) float32 in [-1, 1]."""
        bucket = choose_bucket(self._manifest.buckets, frame.size)
        placement = place(bucket.size, frame.size, self._fit)
        return bucket, prepare(frame, bucket.size, placement), placement

    def run(self, jobs: Sequence[Job]) -> list[Maps[Float]]:
        """In batches that the bundle has graphs for. Raises BackendError."""
        maps: list[Maps[Float]] = []
        for bucket, part in in_batches(self._manifest.buckets, jobs[0].bucket, len(jobs)):
            maps += self._at_once(bucket, jobs[part])
        return maps

    def _at_once(self, bucket: Bucket, jobs: Sequence[Job]) -> list[Maps[Float]]:
        """As many jobs as the bucket takes."""

        def end_stage(name: str) -> None:
            for job in jobs:
                job.timings.end_stage(name)

        decode, rgb = self._manifest.decode, [job.array for job in jobs]
        chain = Chain(self._backend, decode, bucket, end_stage)
        decoded = chain(rgb[0] if len(rgb) == 1 else np.concatenate(rgb)).decoded
        places = [job.placement.unscaled() if self._own_size else job.placement for job in jobs]
        return [assemble(decoded[i :: len(jobs)], placement, decode) for i, placement in enumerate(places)]


class AuthorsWay(HostWay):
    """The same with the authors' sizes and filters."""

    def __init__(self, backend: Backend, manifest: Manifest, own_size: bool = False) -> None:
        super().__init__(backend, manifest, own_size=own_size)

    def fit(self, frame: Frame) -> tuple[Bucket, Float, Placement]:
        """Raises BundleError for a size that the bundle lacks."""
        bucket = authors_bucket(self._manifest.buckets, frame.size)
        return bucket, prepare_authors(frame, bucket.size), whole(bucket.size, frame.size)


class DeviceWay:
    """Pixels go to the backend's device as they are, and maps come back."""

    def __init__(self, backend: FrameBackend, manifest: Manifest, fit: str = "stretch") -> None:
        self._backend, self._manifest, self._fit = backend, manifest, fit
        self.together = backend.frames_at_once

    def takes(self, frame: Frame) -> bool:
        """What a camera gives: 8 bits a channel."""
        return frame.pixels.dtype == np.uint8

    def fit(self, frame: Frame) -> tuple[Bucket, NDArray[np.uint8], Placement]:
        """The bytes as they lie: RGB (h, w, 3), or YCbCr."""
        bucket = choose_bucket(self._manifest.buckets, frame.size)
        return bucket, frame.pixels, place(bucket.size, frame.size, self._fit)

    def run(self, jobs: Sequence[Job]) -> list[Maps[Float]]:
        """All at once, as far as the device has room."""
        pixels, placements = [job.array for job in jobs], [job.placement for job in jobs]
        results = self._backend.estimate(jobs[0].bucket, pixels, placements, jobs[0].color)
        for job in jobs:
            job.timings.end_stage("device")
        return results


def ways_through(
    backend: Backend, frames: FrameBackend | None, manifest: Manifest, fit: str, *, authors: bool, own_size: bool
) -> list[Way]:
    """The ways of an estimator, the preferred first; the last, by way of the host, takes every image.

    frames: the backend, where whole images may go to its device. authors: resized by the authors' rules, and own_size:
    results as large as the image was in the network. Both are the host's alone.
    """
    if authors:
        return [AuthorsWay(backend, manifest, own_size)]
    host = HostWay(backend, manifest, fit, own_size)
    return [host] if frames is None or own_size else [DeviceWay(frames, manifest, fit), host]
