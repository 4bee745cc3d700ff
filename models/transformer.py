"""The FE2E transformer: one image latent in, the velocity of depth and normals out, in a single step.

Parameter names are the checkpoint's (Step1X-Edit, a Flux-like DiT). `bind` fixes the prompt and the image size, after
which `forward` is pure tensors and exportable; `densegeo.models.fe2e` then makes it fast without changing it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.models.config import TransformerConfig
from densegeo.models.connector import Connector
from densegeo.models.denoiser import Denoiser
from densegeo.models.layers import (
    Attention,
    FinalModulation,
    MLPEmbedder,
    Modulated,
    Modulation,
    QKNorm,
    heads_first,
    rope_tables,
    rotate,
    sinusoid,
    split_qkv,
)
from densegeo.models.prompt import Prompt
from densegeo.size import Size

Rope = tuple[Tensor, Tensor]  # cosines and sines, (text + image tokens, head size / 2), float32


class StreamAttention(nn.Module):
    """One stream's projections in a double block."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, hidden), already modulated -> normed q, k and v, each (B, heads, T, size)."""
        q, k, v = split_qkv(self.qkv(x), self.heads)
        return *self.norm(q, k), v


def _repeat(x: Tensor, batch: int) -> Tensor:
    """(1 or batch, ...) -> (batch, ...) without a copy, and without a graph node where nothing is to be done."""
    return x if x.shape[0] == batch else x.expand(batch, *x.shape[1:])


def pack(latent: Tensor) -> Tensor:
    """latent (B, C, h, w) -> tokens (B, hw/4, 4C): "b c (h 2) (w 2) -> b (h w) (c 2 2)"."""
    batch, channels, height, width = latent.shape
    pixels = latent.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return pixels.reshape(batch, -1, 4 * channels)


def _mlp(hidden: int, wide: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, wide), nn.GELU(approximate="tanh"), nn.Linear(wide, hidden))


class DoubleBlock(nn.Module):
    """Text and image streams with their own weights, attending jointly."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.img_mod: nn.Module = Modulation(hidden, 2)
        self.txt_mod: nn.Module = Modulation(hidden, 2)
        self.img_attn = StreamAttention(hidden, heads)
        self.txt_attn = StreamAttention(hidden, heads)
        self.attention: nn.Module = Attention()
        self.img_mlp = _mlp(hidden, config.mlp_hidden)
        self.txt_mlp = _mlp(hidden, config.mlp_hidden)

    def qkv(self, image: Tensor, text: Tensor, image_mod: Modulated, text_mod: Modulated) -> tuple[Tensor, ...]:
        """Joint q, k, v (B, heads, text + image tokens, size), before RoPE."""
        pairs = zip(self.txt_attn(text_mod.norm(text)), self.img_attn(image_mod.norm(image)), strict=True)
        return tuple(torch.cat(pair, dim=2) for pair in pairs)

    def forward(
        self, image: Tensor, text: Tensor, vec: Tensor | None, rope: Rope, key_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        image_attn, image_mlp = self.img_mod(vec)
        text_attn, text_mlp = self.txt_mod(vec)
        q, k, v = self.qkv(image, text, image_attn, text_attn)
        mixed = self.attention(rotate(q, *rope), rotate(k, *rope), v, key_bias)
        image = image_attn.add(image, self.img_attn.proj(mixed[:, text.shape[1] :]))
        text = text_attn.add(text, self.txt_attn.proj(mixed[:, : text.shape[1]]))
        image = image_mlp.add(image, self.img_mlp(image_mlp.norm(image)))
        text = text_mlp.add(text, self.txt_mlp(text_mlp.norm(text)))
        return image, text


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over the joint sequence (text, left, image)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.hidden, self.heads, self.mlp_hidden = hidden, config.num_heads, config.mlp_hidden
        self.modulation: nn.Module = Modulation(hidden, 1)
        self.linear1 = nn.Linear(hidden, 3 * hidden + config.mlp_hidden)
        self.norm = QKNorm(config.head_size)
        self.attention: nn.Module = Attention()
        self.linear2 = nn.Linear(hidden + config.mlp_hidden, hidden)

    def forward(self, x: Tensor, vec: Tensor | None, rope: Rope, key_bias: Tensor | None) -> Tensor:
        (branch,) = self.modulation(vec)
        qkv, mlp = self.linear1(branch.norm(x)).split([3 * self.hidden, self.mlp_hidden], dim=-1)
        q, k, v = split_qkv(qkv, self.heads)
        q, k = self.norm(q, k)
        mixed = self.attention(rotate(q, *rope), rotate(k, *rope), v, key_bias)
        return branch.add(x, self.linear2(torch.cat([mixed, F.gelu(mlp, approximate="tanh")], dim=-1)))


class FinalLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.adaLN_modulation: nn.Module = FinalModulation(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.in_channels)

    def forward(self, x: Tensor, vec: Tensor | None) -> Tensor:
        (branch,) = self.adaLN_modulation(vec)
        return self.linear(branch.norm(x))


class Transformer(Denoiser[TransformerConfig]):
    """latent (1, C, H/8, W/8) -> velocity (1, 2L, 4C), L = (H/16)(W/16); left half depth, right half normals.

    Latents may come in a batch when there is no guidance (`guidance` is None), as in training.
    The latent comes in float32 and the velocity leaves in float32; between them linears run in the parameters' dtype
    and norms, modulation and rotations in float32.
    """

    BLOCKS = ("double_blocks", "single_blocks")
    INPUTS = ("prompt_embeds", "prompt_mask", "timestep")

    prompt_embeds: Tensor  # (1, T, prompt)
    prompt_mask: Tensor  # (1, T) float32
    timestep: Tensor  # (1, 256)
    rope_cos: Tensor
    rope_sin: Tensor
    key_bias: Tensor | None
    text_rows: Tensor | None

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.img_in = nn.Linear(config.in_channels, config.hidden_size)
        self.txt_in: nn.Module = nn.Linear(config.context_in_dim, config.hidden_size)
        self.time_in: nn.Module | None = MLPEmbedder(256, config.hidden_size)
        self.vector_in: nn.Module | None = MLPEmbedder(config.vec_in_dim, config.hidden_size)
        self.connector: nn.Module = Connector(config)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(config)
        self.guidance = 6.0  # the released code's two prompts are identical, so any value is exact
        self.constant_canvas = False  # the left half's tokens are img_in's bias, not img_in(zeros)
        for name in ("key_bias", "text_rows"):
            self.register_buffer(name, None, persistent=False)

    def bind(self, prompt: Prompt, size: Size, timestep: float) -> Transformer:
        """Fix the prompt, the image size (multiples of 16) and the timestep; returns self."""
        embeds = torch.from_numpy(prompt.embeds)[None]
        self.register_buffer("prompt_embeds", embeds, persistent=False)
        self.register_buffer("prompt_mask", torch.from_numpy(prompt.mask)[None].float(), persistent=False)
        self.register_buffer("timestep", sinusoid(timestep), persistent=False)
        self.set_size(size, embeds.shape[1])
        return self

    def set_size(self, size: Size, text_tokens: int) -> None:
        """(Re)compute the RoPE tables: zeros for text, then (0, row, column), the same for both halves."""
        rows, columns = size.height // 16, size.width // 16
        self.image_tokens = 2 * rows * columns
        grid = torch.zeros(rows, columns, 3, dtype=torch.int64)
        grid[..., 1] = torch.arange(rows)[:, None]
        grid[..., 2] = torch.arange(columns)
        half = grid.flatten(0, 1)
        positions = torch.cat([torch.zeros(text_tokens, 3, dtype=torch.int64), half, half])
        cos, sin = rope_tables(positions, self.config.axes_dim, self.config.theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def prompt_features(self) -> int:
        """Features of a prompt's token."""
        return self.config.prompt_dim

    @property
    def text_tokens(self) -> int:
        """Text tokens that enter the blocks: fewer than the prompt has once its padding is merged."""
        return self.rope_cos.shape[0] - self.image_tokens

    def resize(self, size: Size) -> None:
        """Move a bound, perhaps rewritten transformer to another image size: RoPE tables and the merged keys' bias."""
        text = self.text_tokens
        self.set_size(size, text)
        if self.key_bias is not None:
            image = self.key_bias.new_zeros(1, 1, 1, self.image_tokens)
            self.key_bias = torch.cat([self.key_bias[..., :text], image], dim=-1)

    def live_features(self, size: Size) -> int:
        """Tokens times what a block holds of one: projections, the MLP's features, the residual."""
        tokens = self.text_tokens + 2 * (size.width // 16) * (size.height // 16)
        return tokens * (9 * self.config.hidden_size + 2 * self.config.mlp_hidden)

    def summary(self) -> str:
        """The architecture in a line."""
        config = self.config
        return (
            f"transformer: hidden {config.hidden_size}, {config.num_heads} heads of {config.head_size}, "
            f"{config.depth} double + {config.depth_single_blocks} single blocks, RoPE axes {config.axes_dim}, "
            f"connector {config.prompt_dim} -> {config.connector_hidden} with {config.connector_heads} heads; "
            f"{self.text_tokens} text + {self.image_tokens} image tokens"
        )

    def conditioning(self) -> tuple[Tensor, Tensor | None]:
        """Text tokens (B, T, hidden) and the modulation vector (B, hidden), or None once modulation is folded."""
        batch = 1 if self.guidance is None else 2
        text, pooled = self.connector(
            _repeat(self.prompt_embeds, batch), _repeat(self.prompt_mask, batch), self.timestep
        )
        text = _repeat(self.txt_in(text), batch)
        if self.text_rows is not None:
            text = text.index_select(1, self.text_rows)
        if self.time_in is None or self.vector_in is None:
            return text, None
        return text, _repeat(self.time_in(self.timestep) + self.vector_in(pooled), batch)

    def canvas(self, latent: Tensor) -> Tensor:
        """latent (B, C, h, w) -> embedded canvas [zeros | image] (B, 2L, hidden)."""
        tokens = pack(latent).to(self.img_in.bias.dtype)
        if self.constant_canvas:
            image = self.img_in(tokens)
            return torch.cat([self.img_in.bias.expand_as(image), image], dim=1)
        return self.img_in(torch.cat([torch.zeros_like(tokens), tokens], dim=1))

    def forward(self, latent: Tensor) -> Tensor:
        image = self.canvas(latent)
        text, vec = self.conditioning()
        batch = max(image.shape[0], text.shape[0])
        image, text = _repeat(image, batch), _repeat(text, batch)
        rope = (self.rope_cos, self.rope_sin)
        for double in self.double_blocks:
            image, text = double(image, text, vec, rope, self.key_bias)
        x = torch.cat([text, image], dim=1)
        for single in self.single_blocks:
            x = single(x, vec, rope, self.key_bias)
        if x.shape[1] != self.image_tokens:
            x = x[:, text.shape[1] :]
        velocity = self.final_layer(x, vec).float()
        if self.guidance is None:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


class ConstantInputBlock(DoubleBlock):
    """The first block when text and the left half enter as constants: only the image half is projected (DESIGN 4.5)."""

    cast_buffers = True

    def __init__(self, block: DoubleBlock, text: Tensor, left: Tensor) -> None:
        """text: (1, T, hidden) constant tokens; left: (1, 1, hidden), the left half's one token value."""
        nn.Module.__init__(self)
        for name, module in block.named_children():
            setattr(self, name, module)
        image_mod, text_mod = self.img_mod(None)[0], self.txt_mod(None)[0]
        for name, tensor in zip("qkv", self.txt_attn(text_mod.norm(text)), strict=True):
            self.register_buffer(f"text_{name}", tensor.detach())  # (1, heads, T, size)
        for name, tensor in zip("qkv", self.img_attn(image_mod.norm(left)), strict=True):
            self.register_buffer(f"left_{name}", tensor.detach())  # (1, heads, 1, size)
        del self.txt_attn.qkv, self.txt_attn.norm

    def qkv(self, image: Tensor, text: Tensor, image_mod: Modulated, text_mod: Modulated) -> tuple[Tensor, ...]:
        half = image.shape[1] // 2
        right = self.img_attn(image_mod.norm(image[:, half:]))
        joint = []
        for name, tensor in zip("qkv", right, strict=True):
            constant = getattr(self, f"text_{name}"), getattr(self, f"left_{name}").expand(-1, -1, half, -1)
            joint.append(torch.cat([_repeat(torch.cat(constant, dim=2), image.shape[0]), tensor], dim=2))
        return tuple(joint)


class TrimmedSingleBlock(nn.Module):
    """The last block when only image tokens are wanted: text is projected to keys and values alone (DESIGN 4.6)."""

    def __init__(self, block: SingleBlock, text_tokens: int) -> None:
        super().__init__()
        hidden = block.hidden
        self.hidden, self.heads, self.mlp_hidden, self.text_tokens = hidden, block.heads, block.mlp_hidden, text_tokens
        self.modulation, self.norm, self.linear2 = block.modulation, block.norm, block.linear2
        self.attention = block.attention
        weight, bias = block.linear1.weight, block.linear1.bias
        self.key_value = _linear(weight[hidden : 3 * hidden], bias[hidden : 3 * hidden])
        rows = [*range(hidden), *range(3 * hidden, weight.shape[0])]
        self.query_mlp = _linear(weight[rows], bias[rows])

    def project(self, normed: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Joint tokens -> image queries, joint keys (both rotated) and values, and the image tokens' MLP features."""
        image, (cos, sin) = normed[:, self.text_tokens :], rope
        query, mlp = self.query_mlp(image).split([self.hidden, self.mlp_hidden], dim=-1)
        k, v = (heads_first(part, self.heads) for part in self.key_value(normed).chunk(2, dim=-1))
        q, k = self.norm(heads_first(query, self.heads), k)
        return rotate(q, cos[self.text_tokens :], sin[self.text_tokens :]), rotate(k, cos, sin), v, mlp

    def forward(self, x: Tensor, vec: Tensor | None, rope: Rope, key_bias: Tensor | None) -> Tensor:
        (branch,) = self.modulation(vec)
        q, k, v, mlp = self.project(branch.norm(x), rope)
        mixed = self.attention(q, k, v, key_bias)
        update = self.linear2(torch.cat([mixed, F.gelu(mlp, approximate="tanh")], dim=-1))
        return branch.add(x[:, self.text_tokens :], update)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear that holds copies of the given rows."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear
