"""One image on the device, end to end: the camera's bytes go in, prediction and normals at its resolution come out.

Inside the recording: encoder, transformer, split, decoder, which depend on the bucket alone. Around it, launched
anew for every image: preprocess, log_dequantize and normals, which depend on the source's size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densegeo.kernels.log_dequantize import log_dequantize
from densegeo.kernels.normals import normals
from densegeo.kernels.preprocess import preprocess
from densegeo.kernels.split import split
from densegeo.models.vae import VAE
from densegeo.runtime.backends.torch_capture import Recorder, Replay
from densegeo.runtime.bundle import Bucket, Decode
from densegeo.runtime.images import Color
from densegeo.runtime.resample import Placement


class DeviceNetwork:
    """The networks of one bucket on one device. One call at a time: its buffers are fixed.

    transformer: latent (1, C, H/8, W/8) -> velocity (1, 2L, 4C). parts: how many latents the decoder takes at once.
    """

    def __init__(
        self,
        vae: VAE,
        transformer: nn.Module,
        parts: int,
        decode: Decode,
        bucket: Bucket,
        device: str,
        recorder: Recorder | None,
    ) -> None:
        self._vae, self._transformer, self._parts = vae, transformer, parts
        self._decode, self._bucket, self._size = decode, bucket, (bucket.width, bucket.height)
        example = torch.zeros(1, 3, bucket.height, bucket.width, device=device)
        self._replay = Replay(f"The network at {bucket.width}x{bucket.height}", self._network, (example,), recorder)

    @property
    def captured(self) -> bool:
        """Whether the networks are replayed from a recording."""
        return self._replay.captured

    def __call__(self, frame: Tensor, placement: Placement, color: Color = "rgb") -> tuple[Tensor, Tensor]:
        """frame (h, w, 3) uint8 on the device -> prediction (h, w) and OpenCV normals (h, w, 3), float32, there."""
        with torch.inference_mode():
            rgb = preprocess(frame, self._size, box=placement.box, color=color)
            decoded = self._replay(rgb)
            box, size = placement.box, placement.source
            _, _, prediction = log_dequantize(decoded[:1], box, size, scale=1.0, shift=0.0, with_prediction=True)
            assert prediction is not None
            return prediction[0], normals(decoded[1:], box, size)[0]

    def _network(self, rgb: Tensor) -> Tensor:
        """rgb (1, 3, H, W) -> decoded (2, 3, H, W) float32."""
        velocity = self._transformer(self._vae.encoder(rgb))
        latents = split(
            velocity,
            self._bucket.height,
            self._bucket.width,
            scale=self._decode.latent_scale,
            shift=self._decode.latent_shift,
            depth_sign=self._decode.depth_sign,
            normal_sign=self._decode.normal_sign,
        )
        return torch.cat([self._vae.decoder(part) for part in latents.split(self._parts)])
