"""The U-Net of Stable Diffusion 1 and 2, run once at t = 0 with a constant prompt: FiffDepth (arXiv 2412.00671).

Parameter names are those of a diffusers checkpoint (`UNet2DConditionModel`). Pictures are (N, C, h, w), tokens are
(N, h * w, C). Inference only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.models.config import UNetConfig
from densegeo.models.denoiser import Denoiser
from densegeo.models.layers import Attention, attention, heads_first, sinusoid
from densegeo.models.prompt import Prompt
from densegeo.models.vae import Norm
from densegeo.size import Size

ATTENTION_NORM_EPS = 1e-6  # of the group norm before a block's tokens; its layer norms have 1e-5


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 that returns its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class ResBlock(nn.Module):
    """Two convolutions; the time embedding's projection is added to the first one's result."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = Norm(in_channels, config.groups, config.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Linear | None = nn.Linear(config.time_features, out_channels)
        self.norm2 = Norm(out_channels, config.groups, config.eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        h = self.conv1(self.norm1.silu(x))
        if self.time_emb_proj is not None:
            assert time is not None
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(self.norm2.silu(h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class SelfAttention(nn.Module):
    """Attention of tokens to tokens; `to_out.0` as in the checkpoint."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.attention: nn.Module = Attention()
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_first(layer(x), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out(self.attention(q, k, v))


class CrossAttention(nn.Module):
    """Attention of tokens to the prompt (1, T, prompt features)."""

    def __init__(self, channels: int, heads: int, prompt: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(prompt, channels, bias=False)
        self.to_v = nn.Linear(prompt, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def keys_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """(1, heads, T, size) each, of the prompt's type."""
        return heads_first(self.to_k(prompt), self.heads), heads_first(self.to_v(prompt), self.heads)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        k, v = (part.expand(x.shape[0], -1, -1, -1) for part in self.keys_values(prompt.to(x.dtype)))
        return self.to_out(attention(heads_first(self.to_q(x), self.heads), k, v))


class ConstantCrossAttention(nn.Module):
    """Cross-attention once keys and values are constants (DESIGN 4.8)."""

    cast_buffers = True
    keys: Tensor  # (1, heads, T, size)
    values: Tensor

    def __init__(self, block: CrossAttention, prompt: Tensor) -> None:
        super().__init__()
        self.heads = block.heads
        self.to_q: nn.Linear = block.to_q
        self.to_out: nn.Sequential = block.to_out
        for name, tensor in zip(("keys", "values"), block.keys_values(prompt.to(block.to_k.weight.dtype)), strict=True):
            self.register_buffer(name, tensor.detach().contiguous())

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        k, v = (part.expand(x.shape[0], -1, -1, -1) for part in (self.keys, self.values))
        return self.to_out(attention(heads_first(self.to_q(x), self.heads), k, v))


class GatedCrossAttention(nn.Module):
    """Cross-attention to two constant tokens: each head weighs the second value by the sigmoid of a difference of
    logits, which is linear in x, and the result is linear in these weights. Two thin linears, channels <-> heads.
    """

    def __init__(self, block: ConstantCrossAttention) -> None:
        super().__init__()
        heads, keys, values = block.heads, block.keys[0], block.values[0]  # (heads, 2, size)
        size = keys.shape[-1]
        query, out = block.to_q.weight, block.to_out[0]
        assert isinstance(out, nn.Linear)
        difference = (keys[:, 1] - keys[:, 0]) * size**-0.5  # (heads, size)
        self.gate = nn.Linear(query.shape[1], heads, bias=False, device="meta")
        self.gate.weight = _parameter(torch.einsum("hs,hsc->hc", difference, query.unflatten(0, (heads, size))))
        weight = out.weight.unflatten(1, (heads, size))  # (channels, heads, size)
        self.mix = nn.Linear(heads, out.out_features, device="meta")
        self.mix.weight = _parameter(torch.einsum("chs,hs->ch", weight, values[:, 1] - values[:, 0]))
        self.mix.bias = _parameter(out.bias + torch.einsum("chs,hs->c", weight, values[:, 0]))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return self.mix(self.gate(x).sigmoid())


class GEGLU(nn.Module):
    """linear -> [value | gate], value * gelu(gate)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The checkpoint's `ff.net.0.proj` and `ff.net.2`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TokenBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward, each on a norm and added."""

    def __init__(self, channels: int, heads: int, prompt: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = SelfAttention(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.attn2: nn.Module = CrossAttention(channels, heads, prompt)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), prompt)
        return x + self.ff(self.norm3(x))


class TokenStage(nn.Module):
    """A picture's pixels as tokens through blocks, added to the picture."""

    def __init__(self, channels: int, heads: int, blocks: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = Norm(channels, config.groups, ATTENTION_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TokenBlock(channels, heads, config.cross_attention_dim) for _ in range(blocks)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, prompt)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)


class Sampler(nn.Module):
    """The convolution of a change of resolution, under the checkpoint's name `conv`."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """Residual blocks, each perhaps followed by a token stage, and at last perhaps a change of resolution.

    widths: (in, out) channels of each residual block. heads: of the token stages; 0 for none.
    """

    def __init__(
        self, widths: list[tuple[int, int]], heads: int, blocks: int, config: UNetConfig, resample: str = ""
    ) -> None:
        super().__init__()
        channels = widths[-1][1]
        self.resnets = nn.ModuleList(ResBlock(*pair, config) for pair in widths)
        if heads:
            self.attentions = nn.ModuleList(TokenStage(channels, heads, blocks, config) for _ in widths)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Sampler(channels, 2)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Sampler(channels, 1)])
        self.heads, self.resample = heads, resample

    def steps(self, x: Tensor, time: Tensor | None, prompt: Tensor, skips: list[Tensor] | None) -> Iterator[Tensor]:
        """The picture after each residual block and its token stage. skips: taken from the end, one a block."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x if skips is None else torch.cat([x, skips.pop()], dim=1), time)
            if self.heads:
                x = self.attentions[index](x, prompt)
            yield x


class Middle(nn.Module):
    def __init__(self, channels: int, heads: int, blocks: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([TokenStage(channels, heads, blocks, config)])

    def forward(self, x: Tensor, time: Tensor | None, prompt: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), prompt), time)


class TimeEmbedding(nn.Module):
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.block_out_channels[0], config.time_features)
        self.linear_2 = nn.Linear(config.time_features, config.time_features)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids.to(self.linear_1.weight.dtype))))


class UNet(Denoiser[UNetConfig]):
    """latent (N, 4, h, w), scaled -> depth latent (N, 4, h, w), scaled, float32. `bind` gives it its prompt."""

    INPUTS = ("prompt_embeds", "timestep")

    timestep: Tensor  # (1, features of the first level)

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, heads, blocks = config.block_out_channels, config.heads, config.transformer_layers
        last, each = len(widths) - 1, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding: nn.Module | None = TimeEmbedding(config)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            pairs = [(widths[max(level - 1, 0)], width)] + [(width, width)] * (each - 1)
            resample = "" if level == last else "down"
            self.down_blocks.append(
                Level(pairs, heads[level] * config.down_attention[level], blocks[level], config, resample)
            )
        self.mid_block = Middle(widths[-1], heads[-1], blocks[-1], config)
        self.up_blocks = nn.ModuleList()
        for index in range(last + 1):
            level = last - index
            before, width, after = widths[min(level + 1, last)], widths[level], widths[max(level - 1, 0)]
            skips = [width] * each + [after]  # of the residual blocks' second inputs
            ins = [before] + [width] * each
            pairs = [(first + second, width) for first, second in zip(ins, skips, strict=True)]
            resample = "" if level == 0 else "up"
            self.up_blocks.append(
                Level(pairs, heads[level] * config.up_attention[index], blocks[level], config, resample)
            )
        self.conv_norm_out = Norm(widths[0], config.groups, config.eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def bind(self, prompt: Prompt, size: Size, timestep: float) -> UNet:
        """Fix the prompt and the timestep; any image size fits. Returns self."""
        self.register_buffer("prompt_embeds", torch.from_numpy(prompt.embeds)[None], persistent=False)
        sinusoids = sinusoid(timestep, self.config.block_out_channels[0])
        if not self.config.flip_sin_to_cos:
            sinusoids = torch.cat(sinusoids.chunk(2, dim=-1)[::-1], dim=-1)
        self.register_buffer("timestep", sinusoids, persistent=False)
        return self

    @property
    def prompt_features(self) -> int:
        """Features of a prompt's token."""
        return self.config.cross_attention_dim

    def resize(self, size: Size) -> None:
        """Any image size fits."""

    def live_features(self, size: Size) -> int:
        """Pixels of the latent times what its first level holds of one: skips, and a feed-forward's two halves."""
        return (
            (size.width // 8)
            * (size.height // 8)
            * self.config.block_out_channels[0]
            * (self.config.layers_per_block + 14)
        )

    def summary(self) -> str:
        """The architecture in a line."""
        config = self.config
        stages = ", ".join(
            f"{channels}" + (f" with {heads} heads" if attention else "")
            for channels, heads, attention in zip(
                config.block_out_channels, config.heads, config.down_attention, strict=True
            )
        )
        return (
            f"U-Net: channels {stages}; {config.layers_per_block} blocks a level, prompt {config.cross_attention_dim}"
        )

    @classmethod
    def quantizable(cls, linear: str) -> bool:
        """Linears of the token blocks; the gates of folded cross-attention are too thin to gain anything."""
        return ".transformer_blocks." in linear and not linear.endswith((".attn2.gate", ".attn2.mix"))

    def time(self) -> Tensor | None:
        """SiLU of the time embedding (1, features), what residual blocks project; None once that is folded."""
        return None if self.time_embedding is None else F.silu(self.time_embedding(self.timestep))

    def forward(self, latent: Tensor) -> Tensor:
        time, prompt = self.time(), self.prompt_embeds
        x = self.conv_in(latent.to(self.conv_in.weight.dtype))
        skips = [x]
        for level in self.down_blocks:
            assert isinstance(level, Level)
            skips += level.steps(x, time, prompt, None)
            if level.resample:
                skips.append(level.downsamplers[0](skips[-1]))
            x = skips[-1]
        x = self.mid_block(x, time, prompt)
        for level in self.up_blocks:
            assert isinstance(level, Level)
            *_, x = level.steps(x, time, prompt, skips)
            if level.resample:  # to the size of what it joins next: twice its own, or one less for odd sizes
                x = level.upsamplers[0](F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        return self.conv_out(self.conv_norm_out.silu(x)).float()


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
