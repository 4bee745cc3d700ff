"""TensorRT engines on an NVIDIA GPU, without torch: one CUDA graph from the network's input to its decoded pictures.

Never executed on a GPU yet: `densegeo verify BUNDLE --backend tensorrt` tells whether it works on yours.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import BackendError, EngineError
from densegeo.runtime.backends.cuda_kernels import Kernels
from densegeo.runtime.backends.cuda_memory import DeviceArray, Memory, architecture_of, host_view, open_device
from densegeo.runtime.bundle import STAGES, Bucket, Engine, Manifest, Stage
from densegeo.runtime.engines import read_engine, rebuild_command, select_engine, trusted
from densegeo.runtime.images import Color
from densegeo.runtime.resample import Placement, in_batches, inside
from densegeo.runtime.tensorfile import tensor_offsets

log = logging.getLogger("densegeo")
FLOAT = 4  # bytes
# How the bundle's normals (left, up, back) become OpenCV's (right, down, forward).
OPENCV = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0)


def open_backend(directory: Path, manifest: Manifest, device: str) -> TensorRTBackend:
    """Load the first bucket's engines. Raises BackendError where TensorRT, a GPU or a fitting engine is missing."""
    if not manifest.engines:
        raise BackendError(f"{directory} has no TensorRT engines. Build some: {rebuild_command(manifest, directory)}")
    return TensorRTBackend(directory, manifest, open_device(device))


def load_library(manifest: Manifest) -> tuple[str, Any]:
    """The TensorRT library that the bundle's engines were built with. Raises EngineError when it is not installed."""
    names = sorted({engine.library for engine in manifest.engines})
    for name in names:
        try:
            return name, import_module(name)
        except ImportError:
            continue
    raise EngineError(
        f"these engines need {' or '.join(names)}, which is not installed: pip install "
        + ('"densegeo[tensorrt-rtx]"' if "tensorrt_rtx" in names else "tensorrt")
    )


class TensorRTBackend:
    """Engines of one bundle on one device; calls from several threads take turns."""

    name = "tensorrt"
    takes_frames = True

    def __init__(self, directory: Path, manifest: Manifest, device: Any) -> None:
        self._directory, self._manifest = directory, manifest
        self.frames_at_once = max(bucket.batch for bucket in manifest.buckets)
        self._library, self._trt = load_library(manifest)
        self.device = f"cuda:{device.device_id}"
        self._gpu, self._architecture = device, architecture_of(device)
        self._memory = Memory(device)
        self._kernels = Kernels(directory, manifest.kernels, self._architecture)
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._runtime.engine_host_code_allowed = False
        self._weights: dict[str, tuple[Any, dict[str, int]]] = {}  # stage -> its device buffer, offsets by name
        self._networks: dict[str, Network] = {}  # by the bucket's name
        self._lock = threading.Lock()
        self._closed = False
        with self._lock:
            self._network(manifest.buckets[0])

    def run(self, bucket: Bucket, stage: Stage, array: NDArray[Any]) -> NDArray[np.float32]:
        """Run one engine, eager: (its input) -> its output. Raises BackendError."""
        with self._lock:
            return self._network(bucket).run(stage, np.ascontiguousarray(array, dtype=np.float32))

    def estimate(
        self, bucket: Bucket, pixels: Sequence[NDArray[np.uint8]], placements: Sequence[Placement]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
        """Pixels (h, w, 3) RGB -> predictions (h, w) and OpenCV normals (h, w, 3) or None, in the bundle's batches.

        Raises BackendError.
        """
        results: list[tuple[NDArray[np.float32], NDArray[np.float32] | None]] = []
        with self._lock:
            for fitting, part in in_batches(self._manifest.buckets, bucket, len(pixels)):
                network = self._network(fitting)
                for index, (image, placement) in enumerate(zip(pixels[part], placements[part], strict=True)):
                    frame = network.upload(np.ascontiguousarray(image))
                    network.prepare(index, frame, (3 * image.shape[1], 3), placement, "rgb")
                network.launch()
                for index, placement in enumerate(placements[part]):
                    prediction, normals = network.outputs(index, placement)
                    on_host = None if normals is None else network.download(normals)
                    results.append((network.download(prediction), on_host))
        return results

    def keep(
        self, bucket: Bucket, image: Any, placement: Placement, color: Color
    ) -> tuple[DeviceArray, DeviceArray | None]:
        """The same for an array on the device, uint8 (h, w, 3), channels adjacent; the results stay there."""
        described = getattr(image, "__cuda_array_interface__", None)
        if described is None:
            raise BackendError("Device arrays need __cuda_array_interface__ here (torch, CuPy and Numba have it).")
        width = described["shape"][1]
        strides = described.get("strides") or (3 * width, 3, 1)
        if described["typestr"] != "|u1" or strides[2] != 1:
            raise BackendError("Images on the device must be uint8 (h, w, 3) with adjacent channels.")
        with self._lock:
            network = self._network(bucket)
            self._gpu.sync()  # whoever makes the image is done, whatever stream that was on
            network.prepare(0, described["data"][0], strides[:2], placement, color)
            network.launch()
            results = network.outputs(0, placement)
            self._memory.stream.sync()
            return results

    def close(self) -> None:
        """Drop engines and buffers."""
        with self._lock:
            self._closed = True
            self._networks.clear()
            self._weights.clear()

    def _network(self, bucket: Bucket) -> Network:
        if self._closed:
            raise BackendError("This estimator is closed. Make a new Estimator.")
        self._gpu.set_current()  # a context belongs to a thread
        if bucket.name not in self._networks:
            engines = {stage: self._load(bucket, stage) for stage in STAGES}
            self._networks[bucket.name] = Network(self._memory, self._kernels, self._manifest, bucket, engines)
        return self._networks[bucket.name]

    def _load(self, bucket: Bucket, stage: Stage) -> Any:
        record = select_engine(
            self._directory,
            self._manifest,
            stage,
            bucket,
            library=self._library,
            version=str(self._trt.__version__),
            architecture=self._architecture,
        )
        data = read_engine(self._directory, self._manifest, record, trust=trusted())
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineError(
                f"{self._directory / record.file} cannot be loaded on this GPU (sm_{self._architecture}). "
                f"Rebuild it: {rebuild_command(self._manifest, self._directory)}"
            )
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return Stepper(engine, engine.create_execution_context(strategy), self._addresses(record))

    def _addresses(self, record: Engine) -> dict[str, int]:
        """Device addresses of an engine's weight inputs: one copy of a stage's weights for all its engines."""
        if not record.weight_inputs:
            return {}
        if record.stage not in self._weights:
            path = self._directory / f"{record.stage}.safetensors"
            start, offsets = tensor_offsets(path)
            buffer = self._memory.upload_file(path, start, path.stat().st_size - start)
            self._weights[record.stage] = (buffer, offsets)
        buffer, offsets = self._weights[record.stage]
        return {name: int(buffer.handle) + offsets[name] for name in record.weight_inputs}


class Stepper:
    """One engine with its context; weights that are inputs are bound once."""

    def __init__(self, engine: Any, context: Any, weights: dict[str, int]) -> None:
        self._engine, self._context = engine, context
        self.workspace = int(engine.device_memory_size_v2)
        for name, address in weights.items():
            context.set_tensor_address(name, address)

    def use(self, workspace: Any) -> None:
        """Take the shared workspace."""
        self._context.set_device_memory(int(workspace.handle), workspace.size)

    def launch(self, stream: Any, addresses: dict[str, int]) -> None:
        """Enqueue one run on these addresses. Raises BackendError."""
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(int(stream.__cuda_stream__()[1])):
            raise BackendError("TensorRT could not launch an engine; its log says why")


class Network:
    """The three engines of one bucket on fixed buffers, recorded once; preparation and output around them."""

    def __init__(
        self, memory: Memory, kernels: Kernels, manifest: Manifest, bucket: Bucket, steppers: dict[Stage, Stepper]
    ) -> None:
        self._memory, self._kernels, self._bucket, self._steppers = memory, kernels, bucket, steppers
        self._decode = manifest.decode
        pictures = self._decode.pictures * bucket.batch
        self._shapes = {
            "rgb": bucket.encoder.inputs[0].shape,
            "latent": bucket.denoiser.inputs[0].shape,
            "output": bucket.denoiser.outputs[0].shape,
            "latents": [pictures, *bucket.decoder.inputs[0].shape[1:]],
            "decoded": [pictures, *bucket.decoder.outputs[0].shape[1:]],
        }
        self._buffers = {name: memory.device_buffer(FLOAT * _count(shape)) for name, shape in self._shapes.items()}
        if self._decode.packing == "latent":
            self._buffers["latents"] = self._buffers["output"]  # the decoder takes it as it is
        self._workspace = memory.device_buffer(max(stepper.workspace for stepper in steppers.values()))
        for stepper in steppers.values():
            stepper.use(self._workspace)
        self._frame, self._pinned = memory.device_buffer(1), memory.pinned_buffer(1)
        self._graph = self._record()

    def run(self, stage: Stage, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """One engine, eager, from host to host."""
        source, target = {
            "encoder": ("rgb", "latent"),
            "denoiser": ("latent", "output"),
            "decoder": ("latents", "decoded"),
        }[stage]
        graph = getattr(self._bucket, stage)
        shape = graph.outputs[0].shape
        self._stage(array.view(np.uint8).ravel(), self._buffers[source])
        names = (graph.inputs[0].name, graph.outputs[0].name)
        addresses = dict(zip(names, (self._address(source), self._address(target)), strict=True))
        self._steppers[stage].launch(self._memory.stream, addresses)
        return self.download(DeviceArray(self._buffers[target], tuple(shape)))

    def upload(self, pixels: NDArray[np.uint8]) -> int:
        """pixels (h, w, 3), contiguous -> their address on the device, good until the next upload is prepared."""
        if self._frame.size < pixels.size:
            self._frame = self._memory.device_buffer(pixels.size)
        self._stage(pixels.ravel(), self._frame)
        return int(self._frame.handle)

    def prepare(self, index: int, address: int, strides: tuple[int, int], placement: Placement, color: Color) -> None:
        """uint8 pixels at a device address (row and pixel strides in bytes) become image `index` of the next launch."""
        bucket, (width, height), box = self._bucket, placement.source, placement.box
        self._kernels.launch(
            "preprocess.u8_fp32",
            self._memory.stream,
            {
                "frame": address,
                "rgb": self._address("rgb") + index * FLOAT * _count(self._shapes["rgb"][1:]),
                "source_width": width,
                "source_height": height,
                "row_stride": strides[0],
                "pixel_stride": strides[1],
                "red": 2 if color == "bgr" else 0,
                **_named(box),
                "width": bucket.width,
                "height": bucket.height,
                "taps_x": _taps(width, box[2]),
                "taps_y": _taps(height, box[3]),
            },
        )

    def launch(self) -> None:
        """Run the networks on the prepared images."""
        if self._graph is None:
            self._enqueue(self._memory.stream)
        else:
            self._graph.launch(self._memory.stream)

    def download(self, array: DeviceArray) -> NDArray[np.float32]:
        """A device array as an array of its own on the host."""
        size = FLOAT * _count(array.shape)
        pinned = self._pinned_for(size)
        self._memory.to_host(pinned, array.pointer, size)
        self._memory.stream.sync()
        result: NDArray[np.float32] = host_view(pinned, size).view(np.float32).reshape(array.shape).copy()
        return result

    def outputs(self, index: int, placement: Placement) -> tuple[DeviceArray, DeviceArray | None]:
        """Prediction (h, w) and normals (h, w, 3) of image `index` at its own size, on the device."""
        width, height = placement.source
        pixels = width * height
        depth, valid, prediction = (self._memory.device_buffer(n * pixels) for n in (4, 1, 4))
        _, channels, rows, columns = self._shapes["decoded"]
        plane = rows * columns
        picture = FLOAT * channels * plane
        depths = self._address("decoded") + index * picture
        strides = {
            "batch_stride": channels * plane,
            "channel_stride": plane,
            "row_stride": columns,
            "column_stride": 1,
        }
        box = _named(inside(placement.box, columns, rows))
        shared = {**strides, **box, "width": width, "height": height}
        order = "clamp_mean" if self._decode.clip == "channels" else "mean_clamp"
        self._kernels.launch(
            f"log_dequantize.{order}{channels}_fp32",
            self._memory.stream,
            {
                "decoded": depths,
                "depth": int(depth.handle),
                "valid": int(valid.handle),
                "prediction": int(prediction.handle),
                **shared,
                "scale": 1.0,
                "shift": 0.0,
                "low": 0.0,
                "high": float("inf"),
            },
            batch=1,
        )
        if self._decode.pictures == 1:
            return DeviceArray(prediction, (height, width)), None
        normals = self._memory.device_buffer(3 * FLOAT * pixels)
        matrix = {f"m{row}{column}": OPENCV[3 * row + column] for row in range(3) for column in range(3)}
        self._kernels.launch(
            "normals.fp32",
            self._memory.stream,
            {"decoded": depths + self._bucket.batch * picture, "normals": int(normals.handle), **shared, **matrix},
            batch=1,
        )
        return DeviceArray(prediction, (height, width)), DeviceArray(normals, (height, width, 3))

    def _enqueue(self, stream: Any) -> None:
        """What depends on the bucket alone: encoder, denoiser, split, decoder."""
        bucket, steppers = self._bucket, self._steppers
        self._launch(steppers["encoder"], stream, bucket.encoder, self._address("rgb"), self._address("latent"))
        self._launch(steppers["denoiser"], stream, bucket.denoiser, self._address("latent"), self._address("output"))
        if self._decode.packing == "tokens":
            self._split(stream)
        pictures, at_once = self._shapes["latents"][0], bucket.decoder.inputs[0].shape[0]
        sizes = [FLOAT * _count(self._shapes[name]) // pictures for name in ("latents", "decoded")]
        for first in range(0, pictures, at_once):
            source, target = (self._address(n) + first * s for n, s in zip(("latents", "decoded"), sizes, strict=True))
            self._launch(steppers["decoder"], stream, bucket.decoder, source, target)

    def _split(self, stream: Any) -> None:
        """Velocity -> the decoder's input."""
        bucket, (tokens, features) = self._bucket, self._shapes["output"][1:]
        self._kernels.launch(
            "split.fp32_fp32",
            stream,
            {
                "velocity": self._address("output"),
                "latents": self._address("latents"),
                "batch": bucket.batch,
                "rows": bucket.height // 16,
                "columns": bucket.width // 16,
                "features": features,
                "batch_stride": tokens * features,
                "token_stride": features,
                "scale": self._decode.latent_scale,
                "shift": self._decode.latent_shift,
                "depth_sign": self._decode.depth_sign,
                "normal_sign": self._decode.normal_sign,
            },
        )

    def _launch(self, stepper: Stepper, stream: Any, graph: Any, source: int, target: int) -> None:
        stepper.launch(stream, {graph.inputs[0].name: source, graph.outputs[0].name: target})

    def _record(self) -> Any:
        """A CUDA graph of `_enqueue` that gave the eager run's bits, or None, with a line in the log that says why."""
        stream = self._memory.stream
        self._stage(np.zeros(FLOAT * _count(self._shapes["rgb"]), dtype=np.uint8), self._buffers["rgb"])
        self._enqueue(stream)  # libraries allocate in their first run
        self._enqueue(stream)
        decoded = DeviceArray(self._buffers["decoded"], tuple(self._shapes["decoded"]))
        eager = self.download(decoded)
        try:
            builder = stream.create_graph_builder().begin_building("thread_local")
            self._enqueue(builder)
            graph = builder.end_building().complete()
            graph.upload(stream)
            graph.launch(stream)
        except Exception as error:  # cuda-core's errors have no common base
            log.warning("%s runs eager: recording failed: %s", self._bucket.name, error)
            return None
        if not np.array_equal(self.download(decoded), eager, equal_nan=True):
            log.warning("%s runs eager: its recording gave other numbers", self._bucket.name)
            return None
        return graph

    def _stage(self, data: NDArray[np.uint8], target: Any) -> None:
        pinned = self._pinned_for(data.size)
        host_view(pinned, data.size)[:] = data
        self._memory.to_device(int(target.handle), pinned, data.size)

    def _pinned_for(self, size: int) -> Any:
        """The pinned buffer, large enough, once the last copy that it is part of has ended."""
        self._memory.stream.sync()
        if self._pinned.size < size:
            self._pinned = self._memory.pinned_buffer(size)
        return self._pinned

    def _address(self, name: str) -> int:
        return int(self._buffers[name].handle)


def _named(box: tuple[int, int, int, int]) -> dict[str, int]:
    """A box as the kernels' arguments."""
    return dict(zip(("left", "top", "box_width", "box_height"), box, strict=True))


def _count(shape: Any) -> int:
    return int(np.prod(shape))


def _taps(source: int, target: int) -> int:
    """How many source pixels a result's pixel can depend on, in one direction (kernels/preprocess)."""
    return -(-2 * max(source, target) // target)
