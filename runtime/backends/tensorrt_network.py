"""One bucket's engines on fixed buffers, recorded once; preparation of images before them, and their output after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.colors import COLORS, Color
from densegeo.errors import BackendError
from densegeo.kernels.normals import arguments as normals
from densegeo.kernels.preprocess import arguments as preprocess
from densegeo.kernels.resize_depth import arguments as resize_depth
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.kernels.split import arguments as split
from densegeo.outputs import Maps, Output, into_opencv
from densegeo.runtime.backends.cuda_array import DeviceArray
from densegeo.runtime.backends.cuda_input import Pixels
from densegeo.runtime.backends.cuda_kernels import Kernels
from densegeo.runtime.backends.cuda_memory import Memory
from densegeo.runtime.backends.cuda_weights import aligned
from densegeo.runtime.backends.tensorrt_context import Stepper
from densegeo.runtime.backends.tensorrt_kernels import NORMALS, PREPROCESS, PREPROCESS_YCBCR, SPLIT, resize_depth_name
from densegeo.runtime.bundle import Bucket, Graph, Manifest, Stage
from densegeo.runtime.resample import Placement, inside, whole

log = logging.getLogger("densegeo")
FLOAT = 4  # bytes
# Every stage's input and output among the buffers.
ENDS: dict[Stage, tuple[str, str]] = {
    "encoder": ("rgb", "latent"),
    "denoiser": ("latent", "output"),
    "decoder": ("latents", "decoded"),
}


class Network:
    """The three engines of one bucket. Its work goes to the memory's stream, one call at a time.

    workspace: at least as large as every engine's need; networks of one stream may share it.
    """

    def __init__(
        self,
        memory: Memory,
        kernels: Kernels,
        manifest: Manifest,
        bucket: Bucket,
        steppers: dict[Stage, Stepper],
        workspace: Any,
    ) -> None:
        """Raises BackendError."""
        self._memory, self._kernels, self._bucket, self._steppers = memory, kernels, bucket, steppers
        self._decode = manifest.decode
        pictures = len(self._decode.outputs) * bucket.batch
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
        self._workspace = workspace
        for stepper in steppers.values():
            stepper.use(workspace)
        self._reserve()
        self._graph = self._record()

    def _reserve(self) -> None:
        """Room for images of the bucket's own size and their maps; larger ones take more when they first come."""
        bucket, size = self._bucket, self._bucket.size.pixels
        maps = [FLOAT * _count(_shape(row, whole(bucket.size))) for row in self._decode.outputs]
        self._frame = self._memory.device_buffer(3 * size)
        self._maps = self._memory.device_buffer(bucket.batch * sum(map(aligned, maps)))
        self._memory.staging.reserve(3 * size)
        self._memory.landing.reserve(bucket.batch * sum(maps))

    @property
    def recorded(self) -> bool:
        """Whether images replay a recording."""
        return self._graph is not None

    def run(self, stage: Stage, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """One engine, eager, from host to host. Raises BackendError."""
        graph: Graph = getattr(self._bucket, stage)
        source, target = ENDS[stage]
        if list(array.shape) != graph.inputs[0].shape:
            raise BackendError(f"the {stage} at {self._bucket.name} takes {graph.inputs[0].shape}, not {array.shape}")
        self._memory.staging.upload(array.view(np.uint8).ravel(), self._address(source))
        self._launch(stage, self._memory.stream, self._address(source), self._address(target))
        (made,) = self._memory.landing.download([(self._address(target), tuple(graph.outputs[0].shape))])
        return made

    def upload(self, pixels: NDArray[np.uint8]) -> Pixels:
        """pixels, contiguous -> the same on the device, good until the next upload is prepared."""
        if self._frame.size < pixels.size:
            self._frame = self._memory.device_buffer(pixels.size)
        self._memory.staging.upload(pixels.ravel(), int(self._frame.handle))
        return Pixels(int(self._frame.handle), (pixels.strides[0], pixels.strides[1]), self._frame)

    def prepare(self, index: int, pixels: Pixels, placement: Placement, color: Color) -> None:
        """Pixels on the device become image `index` of the next launch."""
        row = COLORS[color]
        rgb = self._address("rgb") + index * FLOAT * _count(self._shapes["rgb"][1:])
        self._kernels.launch(
            PREPROCESS if row.ycbcr is None else PREPROCESS_YCBCR,
            self._memory.stream,
            preprocess.arguments(
                row, pixels.address, rgb, placement.source, pixels.strides, placement.box, self._bucket.size
            ),
        )

    def launch(self) -> None:
        """Run the networks on the prepared images."""
        if self._graph is None:
            self._enqueue(self._memory.stream)
        else:
            self._graph.launch(self._memory.stream)

    def outputs(self, index: int, placement: Placement, metres: Metres | None = None) -> Maps[DeviceArray]:
        """The maps of image `index` at its own size, in the memory's stream. metres: see `FrameBackend.keep`.

        In memory of their own, which lives as long as they are held.
        """
        found = {}
        for row in self._decode.outputs:
            shape = _shape(row, placement)
            made = self._memory.device_buffer(FLOAT * _count(shape))
            self._map(row, index, placement, int(made.handle), metres)
            found[row.name] = DeviceArray(self._memory, made, shape)
        return Maps(**found)

    def results(self, placements: Sequence[Placement]) -> list[Maps[NDArray[np.float32]]]:
        """The maps of the first images on the host, through memory that stays; waits once, for all of them."""
        rows = [(index, row) for index in range(len(placements)) for row in self._decode.outputs]
        shapes = [_shape(row, placements[index]) for index, row in rows]
        starts = [0, *np.cumsum([aligned(FLOAT * _count(shape)) for shape in shapes]).tolist()]
        if self._maps.size < starts[-1]:
            self._maps = self._memory.device_buffer(starts[-1])
        addresses = [int(self._maps.handle) + start for start in starts[:-1]]
        for (index, row), address in zip(rows, addresses, strict=True):
            self._map(row, index, placements[index], address, None)
        arrays = self._memory.landing.download([*zip(addresses, shapes, strict=True)])
        found: list[dict[str, NDArray[np.float32]]] = [{} for _ in placements]
        for (index, row), array in zip(rows, arrays, strict=True):
            found[index][row.name] = array
        return [Maps(**maps) for maps in found]

    def _map(self, row: Output, index: int, placement: Placement, target: int, metres: Metres | None) -> None:
        """Make an output's map of image `index` at a device address."""
        _, channels, rows, columns = self._shapes["decoded"]
        plane = rows * columns
        number = self._decode.outputs.index(row) * self._bucket.batch + index
        decoded = self._address("decoded") + number * FLOAT * channels * plane
        box, size = inside(placement.box, columns, rows), placement.source
        ends = (decoded, target, channels * plane, plane, columns, 1, *box, *size)
        if row.frame is None:
            line = (metres.scale, metres.shift, metres.near, metres.far) if metres else ()
            name, depth = resize_depth_name(row, channels, metres is not None), resize_depth.Arguments(*ends, *line)
            self._kernels.launch(name, self._memory.stream, depth)
        else:
            axes = (value for axis in into_opencv(row.frame) for value in axis)
            self._kernels.launch(NORMALS, self._memory.stream, normals.Arguments(*ends, *axes))

    def _enqueue(self, stream: Any) -> None:
        """What depends on the bucket alone: encoder, denoiser, split, decoder."""
        for stage in ("encoder", "denoiser"):
            source, target = ENDS[stage]
            self._launch(stage, stream, self._address(source), self._address(target))
        if self._decode.packing == "tokens":
            self._split(stream)
        pictures, at_once = self._shapes["latents"][0], self._bucket.decodes_at_once
        sizes = [FLOAT * _count(self._shapes[name]) // pictures for name in ENDS["decoder"]]
        for first in range(0, pictures, at_once):
            addresses = (self._address(n) + first * s for n, s in zip(ENDS["decoder"], sizes, strict=True))
            self._launch("decoder", stream, *addresses)

    def _split(self, stream: Any) -> None:
        """Velocity -> the decoder's input."""
        bucket, (tokens, features) = self._bucket, self._shapes["output"][1:]
        self._kernels.launch(
            SPLIT,
            stream,
            split.Arguments(
                velocity=self._address("output"),
                latents=self._address("latents"),
                batch=bucket.batch,
                rows=bucket.height // 16,
                columns=bucket.width // 16,
                features=features,
                batch_stride=tokens * features,
                token_stride=features,
                scale=self._decode.latent_scale,
                shift=self._decode.latent_shift,
                first_factor=self._decode.outputs[0].factor,
                second_factor=self._decode.outputs[1].factor,
            ),
        )

    def _launch(self, stage: Stage, stream: Any, source: int, target: int) -> None:
        graph: Graph = getattr(self._bucket, stage)
        self._steppers[stage].launch(stream, {graph.inputs[0].name: source, graph.outputs[0].name: target})

    def _record(self) -> Any:
        """A CUDA graph of `_enqueue` that gave the eager run's bits, or None, with a line in the log that says why."""
        stream, staging = self._memory.stream, self._memory.staging
        staging.upload(np.zeros(FLOAT * _count(self._shapes["rgb"]), dtype=np.uint8), self._address("rgb"))
        self._enqueue(stream)  # libraries allocate in their first run
        self._enqueue(stream)
        decoded, shape = self._address("decoded"), tuple(self._shapes["decoded"])
        (eager,) = self._memory.landing.download([(decoded, shape)])
        try:
            graph = self._memory.graph(self._enqueue)
            graph.upload(stream)
            graph.launch(stream)
        except Exception as error:  # cuda-core's errors have no common base
            log.warning("%s runs eager: recording failed: %s", self._bucket.name, error)
            return None
        (replayed,) = self._memory.landing.download([(decoded, shape)])
        if not np.array_equal(replayed, eager, equal_nan=True):
            log.warning("%s runs eager: its recording gave other numbers", self._bucket.name)
            return None
        return graph

    def _address(self, name: str) -> int:
        return int(self._buffers[name].handle)


def _shape(row: Output, placement: Placement) -> tuple[int, ...]:
    """Of an output's map at the source's size."""
    width, height = placement.source
    return (height, width) if row.frame is None else (height, width, 3)


def _count(shape: Any) -> int:
    return int(np.prod(shape))
