"""The autoencoder of Flux and, with the convolutions around its latents, of Stable Diffusion.

Parameter names are those of the Flux checkpoint (`models.diffusers_format` translates); images are (N, 3, H, W) in
[-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.models.config import VAEConfig
from densegeo.models.quantized import QuantizedConvolution


class Norm(nn.GroupNorm):
    """GroupNorm that can be followed by SiLU."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-6) -> None:
        super().__init__(groups, channels, eps)

    def silu(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The norm and SiLU, in another type if one is given."""
        return F.silu(self(x if dtype is None else x.to(dtype)))


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1.silu(x))
        h = self.conv2(self.norm2.silu(h))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """One attention head over all channels; tokens are pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = Norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 over zeros right and below."""

    PADS = (0, 1, 0, 1)  # left, right, top, bottom

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(channels, channels, 3, stride=2)
        self.pads = True  # False: the convolution does

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.PADS) if self.pads else x)


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PhaseUpsample(nn.Module):
    """Upsample as one 2x2 convolution a phase on the small image: 4/9 of the multiplications, the same function.

    After nearest x2, a 3x3 window sees only 2x2 different pixels; their weights are sums of the 3x3 ones. Output
    phase (py, px) of pixel (i, j) is the 2x2 window at (i + py - 1, j + px - 1).
    """

    PHASES = 4
    conv: Any  # nn.Conv2d, or what that became in 8 bits

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        weight, bias = upsample.conv.weight.detach(), upsample.conv.bias
        assert bias is not None
        channels = weight.shape[0]
        halves = [
            (weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]),
            (weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]),
        ]
        phases = []
        for rows in halves:  # py
            tall = torch.stack(rows, dim=2)  # (out, in, 2, 3)
            phases.append(torch.stack([tall[..., 0], tall[..., 1] + tall[..., 2]], dim=3))
            phases.append(torch.stack([tall[..., 0] + tall[..., 1], tall[..., 2]], dim=3))
        self.conv = nn.Conv2d(channels, 4 * channels, 2, padding=1, device="meta")
        self.conv.weight = nn.Parameter(torch.cat(phases).contiguous(), requires_grad=False)
        self.conv.bias = nn.Parameter(bias.detach().repeat(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.interleaved(self.conv(x))

    @staticmethod
    def interleaved(phases: Tensor) -> Tensor:
        """(N, 4 C, H + 1, W + 1) -> (N, C, 2 H, 2 W)."""
        height, width = phases.shape[-2] - 1, phases.shape[-1] - 1
        p00, p01, p10, p11 = phases.chunk(4, dim=1)  # each (N, C, H + 1, W + 1)
        top = torch.stack([p00[:, :, :height, :width], p01[:, :, :height, 1:]], dim=-1)
        bottom = torch.stack([p10[:, :, 1:, :width], p11[:, :, 1:, 1:]], dim=-1)
        return torch.stack([top.flatten(-2), bottom.flatten(-2)], dim=-2).flatten(-3, -2)


class TransposedUpsample(PhaseUpsample):
    """The phases as one transposed convolution of 4x4 and stride 2, whose kernel is theirs in another order: nothing is
    interleaved. Parameters are those of PhaseUpsample.
    """

    def __init__(self, upsample: PhaseUpsample) -> None:
        nn.Module.__init__(self)
        self.conv = upsample.conv
        self.ready: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        kernel = self.kernel() if self.ready is None else self.ready
        if isinstance(self.conv, QuantizedConvolution):
            return self.conv.upsampled(x, kernel)
        return F.conv_transpose2d(x, kernel, self.conv.bias[: kernel.shape[1]], stride=2, padding=1)

    def kernel(self) -> Tensor:
        """(in, out, 4, 4). Row a of the window of phase py reaches output row 2 (i + py - 1 + a) - 1 + k = 2 i + py, so
        that k = 3 - (2 a + py); columns alike.
        """
        outputs, inputs = self.conv.weight.shape[0] // 4, self.conv.weight.shape[1]
        phases = self.conv.weight.reshape(2, 2, outputs, inputs, 2, 2)  # py, px, out, in, a, b
        return phases.permute(3, 2, 4, 0, 5, 1).reshape(inputs, outputs, 4, 4).flip(2, 3)

    def make_ready(self) -> None:
        """Keep the kernel, with a pixel's channels adjacent; the parameters may not change afterwards."""
        self.ready = self.kernel().contiguous(memory_format=torch.channels_last)


class Level(nn.Module):
    """One resolution: residual blocks, then an optional change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, blocks: int, resample: str = "") -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(in_channels if index == 0 else out_channels, out_channels, groups) for index in range(blocks)
        )
        if resample == "down":
            self.downsample: nn.Module = Downsample(out_channels)
        elif resample == "up":
            self.upsample: nn.Module = Upsample(out_channels)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.resample == "down":
            return self.downsample(x)
        return self.upsample(x) if self.resample == "up" else x


class Encoder(nn.Module):
    """rgb (N, 3, H, W) -> latent (N, z, H/8, W/8): the Gaussian's mean, scaled and shifted."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.scale, self.shift, self.z_channels = config.scale_factor, config.shift_factor, config.z_channels
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                config.ch if level == 0 else widths[level - 1],
                width,
                config.groups,
                config.num_res_blocks,
                "" if level == last else "down",
            )
            for level, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = Norm(widths[-1], config.groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1) if config.latent_convs else None

    def moments(self, rgb: Tensor) -> Tensor:
        """The Gaussian's mean and log variance, (N, 2z, H/8, W/8); the mean alone once that is folded."""
        x = self.conv_in(rgb.to(self.conv_in.weight.dtype))
        for level in self.down:
            x = level(x)
        moments = self.conv_out(self.norm_out.silu(self.mid(x)))
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def forward(self, rgb: Tensor) -> Tensor:
        return self.scale * (self.moments(rgb)[:, : self.z_channels].float() - self.shift)


class Decoder(nn.Module):
    """latent (N, z, H/8, W/8) -> image (N, 3, H, W), not clamped; the tail runs in its own dtype, float32.

    The latent comes unscaled, `latent / scale + shift`, unless the configuration says that the decoder does that.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.scaled, self.scale, self.shift = config.decodes_scaled, config.scale_factor, config.shift_factor
        channels = config.z_channels
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.latent_convs else None
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList(  # index 0 is the full resolution and runs last
            Level(widths[min(level + 1, last)], width, config.groups, config.num_res_blocks + 1, "up" if level else "")
            for level, width in enumerate(widths)
        )
        self.norm_out = Norm(widths[0], config.groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        if self.scaled:
            latent = latent / self.scale + self.shift
        latent = latent.to(self.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out.silu(x, self.conv_out.weight.dtype)).float()


class VAE(nn.Module):
    """Encoder and decoder under the checkpoint's names."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)


def transpose_upsampling(
    decoder: Decoder, where: Callable[[PhaseUpsample], bool] = lambda phases: True
) -> list[TransposedUpsample]:
    """Make phases transposed convolutions, in place, but those in fp8 and what `where` denies; returns these."""
    transposed = []
    for level in decoder.up:
        assert isinstance(level, Level)
        phases = getattr(level, "upsample", None)
        if type(phases) is PhaseUpsample and _transposable(phases.conv) and where(phases):
            level.upsample = TransposedUpsample(phases)
            transposed.append(level.upsample)
    return transposed


def _transposable(phases: nn.Module) -> bool:
    """Whether phases are in floating point, or in int8 with one scale a feature, as bundles before them had not."""
    if not isinstance(phases, QuantizedConvolution):
        return isinstance(phases, nn.Conv2d)
    scales = phases.weight_scale.reshape(PhaseUpsample.PHASES, -1)
    return phases.weight.dtype == torch.int8 and (scales.is_meta or bool((scales == scales[:1]).all()))
