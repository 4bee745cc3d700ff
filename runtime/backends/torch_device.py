"""One image on the device, end to end: the camera's bytes go in, prediction and normals at its resolution come out.

Inside the recording: encoder, denoiser, split, decoder, which depend on the bucket alone. Around it, launched
anew for every image: preprocess, resize_depth and normals, which depend on the source's size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from densegeo.colors import Color
from densegeo.errors import TensorSizeError
from densegeo.kernels.preprocess import preprocess
from densegeo.kernels.resize_depth.arguments import Metres
from densegeo.models import chain
from densegeo.models.rewrites import Pipeline
from densegeo.outputs import Maps
from densegeo.runtime.backends.torch_capture import Recorder, Replay
from densegeo.runtime.bundle import Bucket
from densegeo.runtime.resample import Placement, inside, whole

MOST = 8  # images in one recording

log = logging.getLogger("densegeo")


class DeviceNetwork:
    """The networks of one bucket on one device. One call at a time: its buffers are fixed.

    pipeline: fused; it is this object's own. The networks are recorded for 1 image at once, for 2, 4 and `MOST` in
    `warm_up` or when first needed.
    """

    def __init__(self, pipeline: Pipeline, bucket: Bucket, device: str, recorder: Recorder | None) -> None:
        self._pipeline, self._size = pipeline, bucket.size
        self._device, self._recorder, self._most = device, recorder, MOST
        self._replays: dict[int, Replay] = {}
        self._largest(1)

    def warm_up(self, largest_group: int) -> int:
        """Pay for what first images cost: recordings of every size up to `largest_group` images, the largest first,
        because the smaller ones then fit into its memory; and the kernels around them. Returns how many images fit at
        once.
        """
        with torch.inference_mode():
            _, largest = self._largest(largest_group)
            for power in range(largest.bit_length() - 2, 0, -1):
                self._largest(1 << power)
        blank = torch.zeros(self._size.height, self._size.width, 3, dtype=torch.uint8, device=self._device)
        self([blank], [whole(self._size)])
        return min(largest, self._most)

    def recorded(self, count: int) -> Replay:
        """The networks for `count` images, at most `MOST`: rgb (count, 3, H, W) -> decoded (outputs * count,
        channels, 8h, 8w). Raises torch.OutOfMemoryError, TensorSizeError.
        """
        if count not in self._replays:
            shape = (count, 3, self._size.height, self._size.width)  # what is copied in takes its order of memory
            example = torch.empty(shape, device=self._device, memory_format=torch.channels_last).zero_()
            images = "1 image" if count == 1 else f"{count} images"
            name = f"The network at {self._size} for {images}"
            self._replays[count] = Replay(name, self._network, (example,), self._recorder)
        return self._replays[count]

    def __call__(
        self,
        frames: Sequence[Tensor],
        placements: Sequence[Placement],
        color: Color = "rgb",
        metres: Metres | None = None,
    ) -> list[Maps[Tensor]]:
        """frames (h, w, 3) or YCbCr, uint8, on the device -> each one's maps there. metres: see `FrameBackend.keep`."""
        results: list[Maps[Tensor]] = []
        with torch.inference_mode():
            while len(results) < len(frames):
                replay, count = self._largest(len(frames) - len(results))
                part = slice(len(results), len(results) + count)
                rgb = [
                    preprocess(frame, self._size, box=placement.box, color=color)
                    for frame, placement in zip(frames[part], placements[part], strict=True)
                ]
                decoded = replay(torch.cat(rgb))
                results += [self._finish(decoded[i::count], place, metres) for i, place in enumerate(placements[part])]
        return results

    def _largest(self, count: int) -> tuple[Replay, int]:
        """The recording for the largest power of two up to `count` that the device has memory for."""
        size = min(self._most, 1 << (count.bit_length() - 1))
        while True:
            try:
                return self.recorded(size), size
            except (torch.OutOfMemoryError, TensorSizeError) as error:
                if size == 1 and self._pipeline.decoder_batch == 1:
                    raise
                why = "no memory for" if isinstance(error, torch.OutOfMemoryError) else "32-bit offsets do not reach"
            if size > 1:
                log.warning("%s: %s %d images at once, %d from now on", self._size, why, size, size // 2)
                self._most = size = size // 2
            else:
                log.warning("%s: %s an image's pictures at once, one by one from now on", self._size, why)
                self._pipeline.decoder_batch = 1
            torch.cuda.empty_cache()  # of all devices; here, where the error no longer holds what was allocated

    def _finish(self, decoded: Tensor, placement: Placement, metres: Metres | None) -> Maps[Tensor]:
        """One image's decoded pictures (outputs, channels, 8h, 8w) -> its maps."""
        box = inside(placement.box, decoded.shape[3], decoded.shape[2])
        return chain.assemble(self._pipeline.decode, decoded, placement.source, box, metres)

    def _network(self, rgb: Tensor) -> Tensor:
        """rgb (B, 3, H, W) -> decoded (outputs * B, channels, 8h, 8w) float32."""
        return chain.run(self._pipeline, rgb, self._size)
