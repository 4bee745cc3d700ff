"""The networks in a row in PyTorch: what exported graphs are compared with, and what the device path runs fused.

encode -> denoise -> split -> decode (in parts) -> assemble, each a function of a `Pipeline`. What is around the
networks are the operations of `densegeo.kernels`: Triton kernels on a GPU, their plain references elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densegeo.kernels.normals import normals
from densegeo.kernels.resize_depth import Metres, resize_depth
from densegeo.kernels.split import split as split_tokens
from densegeo.models.rewrites import Pipeline
from densegeo.outputs import Decode, Maps, Output, into_opencv
from densegeo.size import Size

Box = tuple[int, int, int, int]  # left, top, width, height in pixels of a decoded picture


@torch.no_grad()
def encode(pipeline: Pipeline, rgb: Tensor) -> Tensor:
    """rgb (B, 3, H, W) in [-1, 1] -> latent (B, C, H/8, W/8) float32."""
    latent: Tensor = pipeline.vae.encoder(rgb)
    return latent


@torch.no_grad()
def denoise(pipeline: Pipeline, latent: Tensor) -> Tensor:
    """latent -> the denoiser's output, float32; see `outputs.Decode`."""
    output: Tensor = pipeline.denoiser(latent)
    return output


@torch.no_grad()
def split(decode: Decode, output: Tensor, size: Size) -> Tensor:
    """The denoiser's output for B images of a size -> the decoder's input (outputs * B, C, H/8, W/8)."""
    if decode.packing == "latent":
        return output
    first, second = decode.outputs
    return split_tokens(
        output,
        size.height,
        size.width,
        scale=decode.latent_scale,
        shift=decode.latent_shift,
        first_factor=first.factor,
        second_factor=second.factor,
    )


@torch.no_grad()
def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """latents (outputs * B, C, H/8, W/8) -> decoded (outputs * B, channels, H, W) float32, as many at once as the
    pipeline says.
    """
    images = len(latents) // len(pipeline.decode.outputs)
    parts = [pipeline.vae.decoder(part) for part in latents.split(pipeline.decoder_batch * images)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def run(pipeline: Pipeline, rgb: Tensor, size: Size) -> Tensor:
    """rgb (B, 3, H, W) of a size -> decoded (outputs * B, channels, H, W) float32."""
    return decode(pipeline, split(pipeline.decode, denoise(pipeline, encode(pipeline, rgb)), size))


@torch.no_grad()
def assemble(
    decode: Decode, decoded: Tensor, source: Size, box: Box | None = None, metres: Metres | None = None
) -> Maps[Tensor]:
    """One image's decoded pictures (outputs, channels, H, W) -> its maps at the source's size.

    box: where the image lies in them; None: it fills them. metres: depth by these in place of the prediction.
    """
    lies = box or (0, 0, decoded.shape[3], decoded.shape[2])
    pairs = zip(decode.outputs, decoded.split(1), strict=True)
    return Maps(**{row.name: _map(row, picture, lies, source, metres)[0] for row, picture in pairs})


def _map(row: Output, decoded: Tensor, box: Box, size: Size, metres: Metres | None) -> Tensor:
    """A decoded picture (1, channels, H, W) -> prediction (1, h, w) or normals (1, h, w, 3)."""
    if row.frame is not None:
        return normals(decoded, box, size, matrix=into_opencv(row.frame))
    return resize_depth(decoded, box, size, clamp=row.clamp, metres=metres)


def relative_error(values: Tensor, reference: Tensor) -> float:
    """Relative L2 error of a tensor."""
    return float((values - reference).norm() / reference.norm())
