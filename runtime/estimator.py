"""The estimator: image -> `Geometry`.

One call, in order: `load_image`, `fit_to_bucket`, `run_network` (encoder, denoiser, `latents_of`, decoder),
`assemble`. `submit` and `stream` do the same through a queue: the first two in the caller's thread, the rest in a
worker thread.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, cast
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError, BundleError, ConfigError, ShutdownError
from densegeo.runtime.backends import Backend, FrameBackend, open_backend
from densegeo.runtime.batcher import Batcher, BatchOptions
from densegeo.runtime.bundle import Bucket, Manifest, check_files, read_manifest
from densegeo.runtime.chain import assemble, assemble_whole, run_network
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.images import MAX_PIXELS, Color, Frame, device_size, load_image
from densegeo.runtime.metrics import Laps, Metrics
from densegeo.runtime.ready import find_bundle
from densegeo.runtime.resample import (
    Placement,
    authors_bucket,
    choose_bucket,
    in_batches,
    place,
    prepare,
    prepare_authors,
)
from densegeo.runtime.stream import Stream

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Job:
    """An image made ready for its bucket, and where its time went so far.

    image: rgb (1, 3, H, W) float32 in [-1, 1], or uint8 pixels (h, w, 3) for a backend that takes those.
    """

    bucket: Bucket
    image: NDArray[Any]
    placement: Placement
    laps: Laps


class Estimator:
    """A loaded bundle. Calls are independent of each other, so threads may share one estimator.

    bundle: directory made by `densegeo build`, or the name of a bundle that comes with densegeo ("fe2e-tiny"; a
    directory of that name wins). backend: "auto" or a name of `backends.BACKENDS`.
    device: "auto", "cpu", "cuda", "cuda:N". fit: "stretch" fills the bucket, "pad" keeps the aspect ratio.
    preprocessing: "densegeo" (nearest aspect ratio, antialiased) or "authors" (their sizes and filters).
    check_digests: also compare every file's SHA-256 (sizes are always compared). max_pixels: larger images
    are refused before decoding.
    For `submit` and `stream`: max_batch, requests of one bucket that are taken from the queue together; max_wait_ms,
    how long the oldest waits for company (worth it where several run at once: torch on a GPU, or a bundle built with
    `--batch`);
    max_queue, requests that may wait; timeout_s, the longest the backend may take for one run (None: no limit).
    On a GPU with torch or tensorrt, opening takes the memory and the time that first images would: every size of the
    bundle is loaded, compiled and recorded, for as many images at once as fit (torch: up to max_batch, tensorrt: as the
    bundle was built). What does not fit is left out, with a line in the log. onnxruntime and openvino load further
    sizes when they are first used.
    Raises BundleError and its kinds for a bad bundle, BackendError, and ConfigError for a bad option.

    metrics: what was counted and timed, direct calls included. Threads start with the first submitted image or frame
    and end with `close`, which `with` calls.
    """

    manifest: Manifest
    metrics: Metrics

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        device: str = "auto",
        *,
        fit: Literal["stretch", "pad"] = "stretch",
        preprocessing: Literal["densegeo", "authors"] = "densegeo",
        check_digests: bool = True,
        max_pixels: int = MAX_PIXELS,
        max_batch: int = 8,
        max_wait_ms: float = 0.0,
        max_queue: int = 64,
        timeout_s: float | None = None,
    ) -> None:
        if fit not in ("stretch", "pad"):
            raise ConfigError(f'fit must be "stretch" or "pad", not {fit!r}.')
        if preprocessing not in ("densegeo", "authors"):
            raise ConfigError(f'preprocessing must be "densegeo" or "authors", not {preprocessing!r}.')
        if preprocessing == "authors" and fit == "pad":
            raise ConfigError('The authors\' preprocessing stretches: use fit="stretch" with it.')
        options = BatchOptions(max_batch, max_wait_ms, max_queue, timeout_s)
        directory = find_bundle(bundle)
        manifest = read_manifest(directory)
        if not manifest.buckets:
            raise BundleError(f"{directory} has no buckets. Rebuild it with at least one `--size WxH`.")
        check_files(directory, manifest, digests=check_digests)
        self._fit, self._preprocessing, self._max_pixels = fit, preprocessing, max_pixels
        self._start(open_backend(backend, directory, manifest, device), manifest, options)

    @classmethod
    def from_backend(cls, backend: Backend, manifest: Manifest, *, max_batch: int = 8) -> Estimator:
        """An estimator over a backend that is open already, other options at their defaults. It closes the backend."""
        estimator = cls.__new__(cls)
        estimator._fit, estimator._preprocessing, estimator._max_pixels = "stretch", "densegeo", MAX_PIXELS
        estimator._start(backend, manifest, BatchOptions(max_batch))
        return estimator

    def _start(self, backend: Backend, manifest: Manifest, options: BatchOptions) -> None:
        self._backend, self.manifest = backend, manifest
        takes_frames = isinstance(self._backend, FrameBackend) and self._backend.takes_frames
        self._frames = cast(FrameBackend, self._backend) if takes_frames else None
        if self._frames is not None:
            self._frames.warm_up(min(options.max_batch, self._frames.frames_at_once))
            together = min(options.max_batch, self._frames.frames_at_once)
            options = dataclasses.replace(options, lanes=2, together=together)
        else:
            together = min(options.max_batch, max(bucket.batch for bucket in manifest.buckets))
            options = dataclasses.replace(options, together=together)
        self._options = options
        self.metrics = Metrics()
        self._lock = threading.Lock()  # guards what follows
        self._batcher: Batcher[Job, Geometry] | None = None
        self._streams: WeakSet[Stream] = WeakSet()
        self._closed = False

    def __call__(self, image: object, color: Color = "rgb") -> Geometry:
        """Depth and normals of one image, at the image's own (upright) resolution.

        image: path, encoded bytes, PIL image, or array (numpy, DLPack, `__array__`) HxWx3, HxW or HxWx4,
        uint8 or float in [0, 1]. color: channel order of arrays. Raises ImageError and BackendError.
        """
        return self._compute_counted([self._prepare(image, color)])[0]

    def submit(self, image: object, color: Color = "rgb", *, deadline_ms: float | None = None) -> Future[Geometry]:
        """Queue one image; a future of what `estimator(image)` gives, with a span "queue" in `timings`.

        The image is read and resized here, in the caller's thread, so it may be overwritten afterwards. Images of one
        bucket are run in the order of submission. The future may be cancelled until it runs. Its callbacks are called
        by the worker thread: keep them short.
        deadline_ms: milliseconds from now. When the request's turn comes later than that, it is not run and ends with
        DeadlineError; when it was started in time, its result is delivered even if late.
        Raises ImageError, QueueFullError, ShutdownError after `close`, BackendTimeoutError after a hang. The future
        raises DeadlineError, BackendError, BackendTimeoutError, ShutdownError or `concurrent.futures.CancelledError`.
        """
        if deadline_ms is not None and not deadline_ms > 0:
            raise ConfigError(f"deadline_ms must be milliseconds above 0, not {deadline_ms!r}.")
        return self._enqueue(image, color, math.inf if deadline_ms is None else deadline_ms, wait=False)

    def stream(self, latest: bool = True, color: Color = "rgb", depth: int = 4) -> Stream:
        """A `Stream` for a camera: frames are `put` in, and results with their stamps and ids are iterated over.

        latest: only the newest frame waits, older ones are dropped and counted. Otherwise every frame is run, and
        `put` waits while `depth` frames wait to be read. Raises ShutdownError, ConfigError.
        """
        with self._lock:
            self._require_open()
            stream = Stream(
                lambda image: self._enqueue(image, color, math.inf, wait=True),
                self.metrics,
                latest=latest,
                depth=depth,
            )
            self._streams.add(stream)
        return stream

    def tensors(self, image: Any, color: Color = "rgb") -> tuple[Any, Any]:
        """Prediction (h, w) and unit OpenCV normals (h, w, 3) or None, float32, left on the backend's device.

        image: uint8 (h, w, 3) with DLPack or `__cuda_array_interface__` (PyTorch, CuPy, PyCUDA, numpy ...), on the host
        or on that device. It is read after what its producer's stream was given so far (of a tensor with
        the torch backend: the current stream). What lies on the device is not copied to the host. The image may be
        overwritten when this returns; a tensor with the torch backend, which is read in place, in the order of the
        current stream. The results have DLPack, and are ready for the caller's current stream. Not counted in
        `metrics`. Raises ImageError, and BackendError for an image on another device and for a backend that returns
        host arrays.
        """
        if not isinstance(self._backend, FrameBackend) or self._preprocessing == "authors":
            raise BackendError(
                f'{self.backend} with preprocessing="{self._preprocessing}" returns host arrays. '
                'Use backend="torch" and preprocessing="densegeo".'
            )
        width, height = device_size(image)
        bucket = choose_bucket(self.manifest.buckets, width, height)
        return self._backend.keep(bucket, image, place(bucket, (width, height), self._fit), color)

    def batch(self, images: Iterable[object], color: Color = "rgb") -> list[Geometry]:
        """One Geometry an image, in order. Images may differ in size.

        Where several run at once (torch on a GPU, a bundle built with `--batch`), images of one bucket that follow each
        other are run together, at most `max_batch`. Raises what a call with the first bad image raises.
        """
        results: list[Geometry] = []
        group: list[Job] = []
        for image in images:
            job = self._prepare(image, color)
            if group and (len(group) == self._options.together or job.bucket is not group[0].bucket):
                results += self._compute_counted(group)
                group = []
            group.append(job)
        return results + self._compute_counted(group)

    def replay(self, rgb: Float) -> dict[str, Float]:
        """Run a bucket's graphs on a ready input: rgb (B, 3, H, W) in [-1, 1] of one bucket's batch and size.

        Returns float32 "encoder", "denoiser", "decoder" (see `Activations`), "prediction" (B, H, W) and, where there
        are any, "normals" (B, H, W, 3; unit, OpenCV frame). Raises BackendError, ConfigError.
        """
        shape = tuple(rgb.shape)
        for bucket in self.manifest.buckets:
            if shape == (bucket.batch, 3, bucket.height, bucket.width):
                break
        else:
            raise ConfigError(f"This bundle has no bucket for an input of shape {shape}.")
        activations = run_network(self._backend, self.manifest.decode, bucket, rgb, ())
        outputs = {"encoder": activations.latent, "denoiser": activations.output, "decoder": activations.decoded}
        return outputs | assemble_whole(activations.decoded, bucket, self.manifest.decode)

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def device(self) -> str:
        """The device in use: "cpu" or "cuda:N"."""
        return self._backend.device

    @property
    def frames(self) -> FrameBackend | None:
        """The backend, where whole images go to its device; None where the host prepares them and finishes results."""
        return self._frames

    @property
    def images_together(self) -> int:
        """The most images of one bucket that are run together, in `batch` and from the queue."""
        return self._options.together

    def close(self, drain: bool = True) -> None:
        """Release the graphs; later calls raise BackendError, its kind ShutdownError for `submit` and `stream`.

        drain: finish accepted requests first; otherwise those not yet started end with ShutdownError. Waits for the
        request that is being run; while the backend hangs only `timeout_s` ends that wait, and the graphs are kept.
        """
        with self._lock:
            self._closed = True
            batcher, streams = self._batcher, list(self._streams)
        for stream in streams:
            stream.close()
        if batcher is None or batcher.close(drain):
            self._backend.close()

    def __enter__(self) -> Estimator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, image: object, color: Color, *, keep: bool = False) -> Job:
        """keep: the caller may overwrite the image before it is run."""
        laps = Laps()
        try:
            frame = load_image(image, color, self._max_pixels)
            laps.lap("load")
            bucket, pixels, placement = self._fit_to_bucket(frame)
            if keep and pixels is frame.pixels:
                pixels = pixels.copy()
        except BaseException:
            self.metrics.count("rejected")
            raise
        laps.lap("prepare")
        return Job(bucket, pixels, placement, laps)

    def _fit_to_bucket(self, frame: Frame) -> tuple[Bucket, NDArray[Any], Placement]:
        if self._preprocessing == "authors":
            bucket = authors_bucket(self.manifest.buckets, *frame.size)
            return bucket, *prepare_authors(frame, bucket)
        bucket = choose_bucket(self.manifest.buckets, *frame.size)
        placement = place(bucket, frame.size, self._fit)
        if self._frames is not None and frame.pixels.dtype == np.uint8:
            return bucket, frame.pixels, placement
        return bucket, prepare(frame, bucket, placement), placement

    def _compute_counted(self, jobs: list[Job]) -> list[Geometry]:
        self.metrics.count("accepted", len(jobs))
        try:
            geometries = self._compute(jobs)
        except BaseException:
            self.metrics.count("failed", len(jobs))
            raise
        self.metrics.count("completed", len(jobs))
        return geometries

    def _compute(self, jobs: list[Job]) -> list[Geometry]:
        """Jobs of one bucket -> their results."""
        whole = [job for job in jobs if job.image.dtype == np.uint8]
        pairs: dict[Job, tuple[Float, Float | None]] = {}
        if whole:
            assert self._frames is not None  # others get ready pictures
            found = self._frames.estimate(
                whole[0].bucket, [job.image for job in whole], [job.placement for job in whole]
            )
            pairs = dict(zip(whole, found, strict=True))
        for job in whole:
            job.laps.lap("device")
        ready = [job for job in jobs if job not in pairs]
        if ready:
            for bucket, part in in_batches(self.manifest.buckets, ready[0].bucket, len(ready)):
                pairs |= zip(ready[part], self._by_stages(bucket, ready[part]), strict=True)
        return [self._finish(job, *pairs[job]) for job in jobs]

    def _by_stages(self, bucket: Bucket, jobs: list[Job]) -> list[tuple[Float, Float | None]]:
        """As many jobs as the bucket takes at once."""
        decode, laps = self.manifest.decode, [job.laps for job in jobs]
        rgb = jobs[0].image if len(jobs) == 1 else np.concatenate([job.image for job in jobs])
        decoded = run_network(self._backend, decode, bucket, rgb, laps).decoded
        return [assemble(decoded[i :: len(jobs)], job.placement, decode) for i, job in enumerate(jobs)]

    def _finish(self, job: Job, prediction: Float, normals: Float | None) -> Geometry:
        valid = np.isfinite(prediction)
        job.laps.lap("finish")
        timings = {**job.laps.milliseconds, "total": job.laps.total}
        self.metrics.observe(timings)
        return Geometry(
            prediction=prediction,
            depth_kind=self.manifest.decode.depth_kind,
            normals=normals,
            valid=valid,
            source_size=job.placement.source,
            timings=timings,
            model=self.manifest.model,
        )

    def _compute_queued(self, jobs: list[Job]) -> list[Geometry]:
        for job in jobs:
            job.laps.lap("queue")
        return self._compute(jobs)

    def _enqueue(self, image: object, color: Color, deadline_ms: float, wait: bool) -> Future[Geometry]:
        with self._lock:
            self._require_open()
            if self._batcher is None:
                self._batcher = Batcher(self._compute_queued, self._options, self.metrics)
            batcher = self._batcher
        batcher.admit(wait)
        job = self._prepare(image, color, keep=True)
        return batcher.submit(job, job.bucket.size, (deadline_ms - job.laps.total) / 1e3, wait)

    def _require_open(self) -> None:
        if self._closed:
            raise ShutdownError("This estimator is closed. Make a new Estimator.")
