"""The estimator: a bundle, opened. A runner for one call, a service for queues and streams, over one backend.

One call, in order: `load_image`, then of the image's way (`runtime.ways`) `fit` and `run`: on the host that is the
`Chain` of the networks and `assemble`, on a device the backend's `estimate`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import number_of, one_of, require_flags, shown, whole_of
from densegeo.colors import Color
from densegeo.errors import BackendError, BundleError, ConfigError
from densegeo.runtime.backends import Backend, FrameBackend, open_backend
from densegeo.runtime.backends.sharing import Sharing
from densegeo.runtime.batcher import BatchOptions
from densegeo.runtime.bundle import MANIFEST, Manifest, check_files, read_manifest
from densegeo.runtime.device_maps import clipped_line, maps_on_device
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.guard import Original, Process, keep_in_children
from densegeo.runtime.host_chain import replay
from densegeo.runtime.images import MAX_PIXELS
from densegeo.runtime.levels import Range
from densegeo.runtime.queue_service import Service
from densegeo.runtime.ready import FOLDER, find_bundle
from densegeo.runtime.request_metrics import Metrics
from densegeo.runtime.runner import Runner
from densegeo.runtime.stream import Stream
from densegeo.runtime.ways import ways_through

Float = NDArray[np.float32]


class Estimator:
    """A loaded bundle. Calls are independent of each other, so threads may share one estimator.

    Opening checks the bundle's files and loads its networks. On a GPU with torch or tensorrt it also takes the memory
    and the time that first images would: every size of the bundle is loaded, compiled and recorded, for as many images
    at once as fit (torch: up to `max_batch`, tensorrt: as the bundle was built). What does not fit is left out, with a
    line in the log. onnxruntime and openvino load further sizes when they are first used. Threads start with the first
    submitted image or frame and end with `close`, which `with` calls.

    When another bundle takes this one's place, the next call raises BundleError. In a process that was forked after
    this was made, calls raise BackendError. Pickled (for a process that is spawned, a DataLoader's worker) it is its
    bundle's path and its options, and opens anew there.

    Args:
        bundle: Directory made by `densegeo build`, or the name of a bundle that comes with densegeo ("fe2e-tiny"; a
            directory of that name wins).
        backend: "auto", or a name of `densegeo.backends.BACKENDS`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        fit: "stretch" fills the bucket, "pad" keeps the aspect ratio.
        preprocessing: "densegeo" (nearest aspect ratio, antialiased), or "authors" (their sizes and filters).
        check_digests: Also compare every file's SHA-256; sizes are always compared.
        max_pixels: Larger images are refused before decoding.
        max_batch: Of the queue, how many requests of one bucket are taken together.
        max_wait_ms: Of the queue, how long the oldest request waits for others. Worth it where several run at once:
            torch on a GPU, or a bundle built with `--batch`.
        max_queue: How many requests may wait.
        timeout_s: The longest the backend may take for one run; None for no limit.
        threads: Of the CPU, that the networks may use. None leaves it to the library, which often counts the machine's
            cores and not a container's share of them. With torch it holds for the whole process.
        resolution: "image" gives results at the image's size, "network" as the network made them (always by way of the
            host). Intrinsics, pictures and anchors are of the image all the same.
        keep_replaced: When another bundle has taken this one's place, go on with what is in memory; a size that is not
            raises BundleError then.
        truncated: Take JPEGs without their last bytes, as some cameras send them; what is missing is grey.
        priority: Of the streams on a GPU that others use too: 0, or below 0 before other work, as far as the GPU has it
            (torch and tensorrt).
        memory_limit: Bytes of the GPU's memory. It is checked before anything is allocated (tensorrt against all that
            it takes, others against their weights), and then held by torch for the whole process, and by ONNX Runtime.
        calls_at_once: How many calls, from as many threads of the caller, share the CPU's threads among them: more
            images a second, each of them later (openvino; other backends share them as calls come).

    Attributes:
        manifest: What the bundle says of itself.
        metrics: What was counted and timed, direct calls included.

    Raises:
        BundleError: For a bad bundle; its kinds SchemaVersionError and DigestError say more.
        BackendError: No backend can run the bundle here; the message has every reason.
        ConfigError: For an option that is none.

    Example:
        >>> from densegeo import Estimator
        >>> with Estimator("fe2e-tiny") as estimator:
        ...     geometry = estimator("photo.jpg")
        >>> geometry.prediction.shape, geometry.depth_kind
        ((384, 512), 'log_affine')
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
        threads: int | None = None,
        resolution: Literal["image", "network"] = "image",
        keep_replaced: bool = False,
        truncated: bool = False,
        priority: int = 0,
        memory_limit: int | None = None,
        calls_at_once: int = 1,
    ) -> None:
        calls_at_once, max_pixels = whole_of("calls_at_once", calls_at_once), whole_of("max_pixels", max_pixels)
        threads = None if threads is None else whole_of("threads", threads, none=True)
        one_of("resolution", resolution, ("image", "network"))
        one_of("fit", fit, ("stretch", "pad"))
        one_of("preprocessing", preprocessing, ("densegeo", "authors"))
        require_flags(check_digests=check_digests, keep_replaced=keep_replaced, truncated=truncated)
        if preprocessing == "authors" and fit == "pad":
            raise ConfigError('The authors\' preprocessing stretches: use fit="stretch" with it.')
        options = BatchOptions(max_batch, max_wait_ms, max_queue, timeout_s)
        directory = find_bundle(bundle)
        original = Original(directory / MANIFEST)
        manifest = read_manifest(directory)
        if not manifest.buckets:
            raise BundleError(f"{directory} has no buckets. Rebuild it with at least one `--size WxH`.")
        check_files(directory, manifest, digests=check_digests)
        sharing = Sharing(priority, memory_limit)
        opened = open_backend(backend, directory, manifest, device, threads, sharing, calls_at_once)
        original.require(needed=True)
        self._original: Original | None = None if keep_replaced else original
        again = os.fspath(bundle) if directory.parent == FOLDER else directory.absolute()
        self._again: Callable[[], Estimator] | None = partial(
            type(self),
            again,
            backend,
            device,
            fit=fit,
            preprocessing=preprocessing,
            check_digests=check_digests,
            max_pixels=max_pixels,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            max_queue=max_queue,
            timeout_s=timeout_s,
            threads=threads,
            resolution=resolution,
            keep_replaced=keep_replaced,
            truncated=truncated,
            priority=priority,
            memory_limit=memory_limit,
            calls_at_once=calls_at_once,
        )
        self._start(opened, manifest, options, fit, preprocessing, max_pixels, resolution, truncated=truncated)

    @classmethod
    def from_backend(
        cls, backend: Backend, manifest: Manifest, *, fit: Literal["stretch", "pad"] = "stretch", max_batch: int = 8
    ) -> Estimator:
        """An estimator over a backend that is open already, other options at their defaults.

        Args:
            backend: Runs the bundle's graphs; the estimator closes it.
            manifest: Of the bundle that the backend has opened.
            fit: As in the class.
            max_batch: As in the class.

        Returns:
            The estimator. It knows no bundle directory, so that it does not notice when the files are replaced.
        """
        estimator = cls.__new__(cls)
        estimator._original = estimator._again = None
        estimator._start(backend, manifest, BatchOptions(max_batch), fit, "densegeo", MAX_PIXELS)
        return estimator

    def _start(
        self,
        backend: Backend,
        manifest: Manifest,
        options: BatchOptions,
        fit: str,
        preprocessing: str,
        max_pixels: int,
        resolution: str = "image",
        *,
        truncated: bool = False,
    ) -> None:
        self._backend, self.manifest, self.metrics = backend, manifest, Metrics()
        self._process = Process()
        keep_in_children(backend)
        self._fit, self._authors = fit, preprocessing == "authors"
        own_size = resolution == "network"
        self._frames: FrameBackend | None = None
        if isinstance(backend, FrameBackend) and backend.takes_frames:
            self._frames = backend
            backend.warm_up(min(options.max_batch, backend.frames_at_once))
            options = dataclasses.replace(options, workers=2)
        ways = ways_through(backend, self._frames, manifest, fit, authors=self._authors, own_size=own_size)
        limit = ways[-1].together if self._frames is None else self._frames.frames_at_once
        together = min(options.max_batch, limit)
        self._runner = Runner(manifest, ways, self.metrics, together, max_pixels, truncated=truncated)
        self._service = Service(self._runner, dataclasses.replace(options, together=together), self._require)

    def __call__(self, image: object, color: Color = "rgb", *, value_range: Range | None = None) -> Geometry:
        """Depth and normals of one image, at the image's own (upright) resolution.

        Args:
            image: A path, encoded bytes, an open file, a PIL image, or an array (numpy, DLPack, `__array__`) HxWx3, HxW
                or HxWx4, uint8 or float in [0, 1].
            color: Channel order of arrays, or the layout of a camera's YCbCr bytes (uint8): nv12 is (3 H / 2, W), yuyv
                and uyvy are (H, W, 2), with the suffixes -bt709 (else BT.601) and -full (else video range).
            value_range: The values of black and white, where they are others: (0, 1023) for 10 bits in uint16 arrays
                and in grey files of 16 bits. An ImageWarning says when values look like those of another range.

        Returns:
            The image's geometry.

        Raises:
            ImageError: For what cannot be read or used.
            BackendError: The networks failed.
            ConfigError: For a color or value_range that is none.
        """
        self._require()
        return self._runner.run_counted([self._runner.prepare(image, color, value_range)])[0]

    def submit(
        self,
        image: object,
        color: Color = "rgb",
        *,
        value_range: Range | None = None,
        deadline_ms: float | None = None,
    ) -> Future[Geometry]:
        """Queue one image.

        The image is read and resized here, in the caller's thread, so it may be overwritten afterwards. Images of one
        bucket are run in the order of submission. The future may be cancelled until it runs. Its callbacks are called
        by the worker thread: keep them short.

        Args:
            image: As in a call.
            color: As in a call.
            value_range: As in a call.
            deadline_ms: Milliseconds from now. When the request's turn comes later than that, it is not run and ends
                with DeadlineError; when it was started in time, its result is delivered even if late.

        Returns:
            A future of what a call gives, with a span "queue" in `timings`. It raises DeadlineError, BackendError,
            BackendTimeoutError, ShutdownError or `concurrent.futures.CancelledError`.

        Raises:
            ImageError: For what cannot be read or used.
            QueueFullError: `max_queue` requests wait already.
            ShutdownError: After `close`.
            BackendTimeoutError: After a hang.
        """
        within = math.inf if deadline_ms is None else number_of(deadline_ms)
        if within is None or not within > 0:
            raise ConfigError(f"deadline_ms must be milliseconds above 0, not {shown(deadline_ms)}.")
        return self._service.submit(image, color, value_range, within)

    def stream(
        self, latest: bool = True, color: Color = "rgb", depth: int = 4, *, value_range: Range | None = None
    ) -> Stream:
        """A `Stream` for a camera: frames are `put` in, and results with their stamps and ids are iterated over.

        Frames that are put with intrinsics, anchors or the camera's height come back in metres or up to scale, steady
        over time (`ScaleTracker`).

        Args:
            latest: Only the newest frame waits, older ones are dropped and counted. Otherwise every frame is run.
            color: Of all frames, as in a call.
            depth: Without `latest`, how many frames may wait to be read before `put` waits.
            value_range: Of all frames, as in a call.

        Returns:
            The stream; `close` it, or leave its `with` block.

        Raises:
            ShutdownError: After `close`.
            ConfigError: For an option that is none.
        """
        return self._service.stream(latest, color, depth, value_range)

    def tensors(
        self,
        image: Any,
        color: Color = "rgb",
        *,
        scale: float | None = None,
        shift: float | None = None,
        near: float | None = None,
        far: float | None = None,
    ) -> tuple[Any, Any]:
        """The maps of an image that may lie on the backend's device, left there.

        The image is read after what its producer's stream was given so far (of a tensor with the torch backend: the
        current stream). What lies on the device is not copied to the host. The image may be overwritten when this
        returns; a tensor with the torch backend, which is read in place, in the order of the current stream. The
        results have DLPack, and are ready for the caller's current stream. Not counted in `metrics`.

        Args:
            image: uint8 (h, w, 3), or YCbCr as `color` says, with DLPack or `__cuda_array_interface__` (PyTorch, CuPy,
                PyCUDA, numpy ...), on the host or on that device.
            color: As in a call.
            scale: With `shift`, the line of the depth kind, see `Geometry.to_metric`: depth in metres takes the
                prediction's place, NaN where the line gives no positive depth.
            shift: See `scale`.
            near: Metres that depth is clipped to, from below.
            far: Metres that depth is clipped to, from above.

        Returns:
            Prediction (h, w) and unit OpenCV normals (h, w, 3), float32; None for what the model has not.

        Raises:
            ImageError: For what cannot be used.
            CalibrationError: For an unusable line.
            MissingOutputError: There is no depth.
            BackendError: For an image on another device, and for a backend that returns host arrays.
        """
        self._require()
        if not isinstance(self._backend, FrameBackend) or self._authors:
            rule = "authors" if self._authors else "densegeo"
            raise BackendError(
                f'{self.backend} with preprocessing="{rule}" returns host arrays. '
                'Use backend="torch" and preprocessing="densegeo".'
            )
        metres = clipped_line(self.manifest, scale, shift, near, far)
        maps = maps_on_device(self._backend, self.manifest, image, color, self._fit, metres)
        return maps.prediction, maps.normals

    def batch(
        self, images: Iterable[object], color: Color = "rgb", *, value_range: Range | None = None
    ) -> list[Geometry]:
        """Several images, which may differ in size.

        Where several run at once (torch on a GPU, a bundle built with `--batch`), images of one bucket that follow each
        other are run together, at most `max_batch`.

        Args:
            images: Each as in a call.
            color: Of all of them, as in a call.
            value_range: Of all of them, as in a call.

        Returns:
            One Geometry an image, in order.

        Raises:
            ImageError: As a call with the first bad image; so do the others.
        """
        self._require()
        return self._runner.run_all(images, color, value_range)

    def replay(self, rgb: Float) -> dict[str, Float]:
        """Run a bucket's graphs on a ready input: rgb (B, 3, H, W) in [-1, 1] of one bucket's batch and size.

        Returns float32 "encoder", "denoiser", "decoder" (see `Activations`), "prediction" (B, H, W) and, where there
        are any, "normals" (B, H, W, 3; unit, OpenCV frame). Raises BackendError, ConfigError.
        """
        self._require()
        return replay(self._backend, self.manifest, rgb)

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
        return self._runner.together

    @property
    def max_queue(self) -> int:
        """How many submitted images may wait."""
        return self._service.max_queue

    def close(self, drain: bool = True) -> None:
        """Release the graphs; later calls raise BackendError, its kind ShutdownError for `submit` and `stream`.

        Waits for the request that is being run; while the backend hangs only `timeout_s` ends that wait, and the graphs
        are kept. After a fork the child has nothing to close.

        Args:
            drain: Finish accepted requests first; otherwise those not yet started end with ShutdownError.
        """
        if self._process.is_here and self._service.close(drain):
            self._backend.close()

    def _require(self) -> None:
        """Raise BackendError after a fork, BundleError when the bundle was replaced."""
        self._process.require()
        if self._original is not None:
            self._original.require()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, a pickle and an argument of another process are the bundle opened anew, with the same options."""
        if self._again is None:
            raise TypeError("An estimator over a backend that was open already cannot be copied or pickled.")
        return self._again, ()

    def __enter__(self) -> Estimator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
