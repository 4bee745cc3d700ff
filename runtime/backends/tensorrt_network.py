"""One bucket's engines on fixed buffers, recorded once; preparation of images before them, and their output after."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

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
from densegeo.runtime.backends.cuda_ring import FLOAT, Ring, Shape, Slot
from densegeo.runtime.backends.tensorrt_kernels import NORMALS, PREPROCESS, PREPROCESS_YCBCR, SPLIT, resize_depth_name
from densegeo.runtime.bundle import Bucket, Graph, Manifest, Stage
from densegeo.runtime.resample import Placement, inside, whole

log = logging.getLogger("densegeo")
# Every stage's input and output among the buffers.
ENDS: dict[Stage, tuple[str, str]] = {
    "encoder": ("rgb", "latent"),
    "denoiser": ("latent", "output"),
    "decoder": ("latents", "decoded"),
}


class Step(Protocol):
    """One network of a bucket. workspace: bytes that it needs besides its input and output."""

    workspace: int

    def use(self, workspace: Any) -> None:
        """Take the workspace, which networks of one stream share."""
        ...

    def launch(self, stream: Any, addresses: Mapping[str, int]) -> None:
        """Enqueue one run on these addresses, on a stream or in its recording. Raises BackendError."""
        ...

    def keep_compiled(self) -> None:
        """For the next process: what running it compiled."""
        ...


Steps = Mapping[Stage, Step]


class Network:
    """The three networks of one bucket. Its work goes to the memory's stream, from one thread at a time.

    workspace: at least as large as every engine's need; networks of one stream may share it.
    """

    def __init__(
        self,
        ring: Ring,
        kernels: Kernels,
        manifest: Manifest,
        bucket: Bucket,
        steppers: Steps,
        workspace: Any,
        *,
        record: bool = True,
    ) -> None:
        """Raises BackendError."""
        memory = ring.memory
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
        # Images of the bucket's own size and their maps have room now; larger ones take more when they first come.
        own = [whole(bucket.size)] * bucket.batch
        ring.reserve([3 * bucket.size.pixels] * bucket.batch, [shape for place in own for shape in self.shapes(place)])
        with ring.slot() as slot:
            self._graph = self._record(slot) if record else None
            if not record:
                self._try(slot)

    def close(self) -> None:
        """Release its buffers and its recording."""
        if self._graph is not None:
            self._graph.close()
        for buffer in {id(buffer): buffer for buffer in self._buffers.values()}.values():
            buffer.close()

    @property
    def recorded(self) -> bool:
        """Whether images replay a recording."""
        return self._graph is not None

    def run(self, slot: Slot, stage: Stage, array: NDArray[np.float32]) -> None:
        """Enqueue one engine, eager, on a host array; the slot brings its result back. Raises BackendError."""
        graph: Graph = getattr(self._bucket, stage)
        source, target = ENDS[stage]
        if list(array.shape) != graph.inputs[0].shape:
            raise BackendError(f"the {stage} at {self._bucket.name} takes {graph.inputs[0].shape}, not {array.shape}")
        slot.put(array, self._address(source))
        self._launch(stage, self._memory.stream, self._address(source), self._address(target))
        slot.fetch(self._address(target), tuple(graph.outputs[0].shape))

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
        maps = {}
        for row in self._decode.outputs:
            shape = _shape(row, placement)
            buffer = self._memory.device_buffer(FLOAT * _count(shape))
            self._map(row, index, placement, int(buffer.handle), metres)
            maps[row.name] = DeviceArray(self._memory, buffer, shape)
        return Maps(**maps)

    def shapes(self, placement: Placement) -> list[Shape]:
        """Of an image's maps at its own size, in the outputs' order."""
        return [_shape(row, placement) for row in self._decode.outputs]

    def maps(self, index: int, placement: Placement, addresses: Iterator[int]) -> None:
        """The maps of image `index`, of `shapes`, at the next device addresses."""
        for row in self._decode.outputs:
            self._map(row, index, placement, next(addresses), None)

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

    def _record(self, slot: Slot) -> Any:
        """A CUDA graph of `_enqueue` that gave the eager run's bits, or None, with a line in the log that says why."""
        stream = self._memory.stream
        self._memory.clear(self._address("rgb"), FLOAT * _count(self._shapes["rgb"]))
        self._enqueue(stream)  # libraries allocate in their first run
        self._enqueue(stream)
        eager = self._decoded(slot)
        try:
            graph = self._memory.graph(self._enqueue)
            graph.upload(stream)
            graph.launch(stream)
        except Exception as error:  # cuda-core's errors have no common base
            log.warning("%s runs eager: recording failed: %s", self._bucket.name, error)
            return None
        if not np.array_equal(self._decoded(slot), eager, equal_nan=True):
            log.warning("%s runs eager: its recording gave other numbers", self._bucket.name)
            return None
        return graph

    def _try(self, slot: Slot) -> None:
        """Run once, unrecorded: libraries choose their algorithms and allocate."""
        self._memory.clear(self._address("rgb"), FLOAT * _count(self._shapes["rgb"]))
        self._enqueue(self._memory.stream)
        self._decoded(slot)

    def _decoded(self, slot: Slot) -> NDArray[np.float32]:
        slot.fetch(self._address("decoded"), tuple(self._shapes["decoded"]))
        return slot.results()[0]

    def _address(self, name: str) -> int:
        return int(self._buffers[name].handle)


def _shape(row: Output, placement: Placement) -> Shape:
    """Of an output's map at the source's size."""
    width, height = placement.source
    return (height, width) if row.frame is None else (height, width, 3)


def _count(shape: Any) -> int:
    return int(np.prod(shape))
