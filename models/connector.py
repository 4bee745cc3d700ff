"""The connector: Qwen2.5-VL prompt embeddings -> text tokens and a pooled vector (Step1X-Edit, DESIGN section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.models.config import TransformerConfig
from densegeo.models.layers import EPS, attention, split_qkv


class _Mlp(nn.Module):
    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, wide)
        self.fc2 = nn.Linear(wide, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


def _wide(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in float32, back to x's dtype."""
    normed: Tensor = norm(x.float())
    return normed.to(x.dtype)


class _RefinerBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden, eps=EPS)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=EPS)
        self.mlp = _Mlp(hidden, mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, condition: Tensor, bias: Tensor) -> Tensor:
        gate_attention, gate_mlp = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        q, k, v = split_qkv(self.self_attn_qkv(_wide(self.norm1, x)), self.heads)
        x = x + gate_attention * self.self_attn_proj(attention(q, k, v, bias))
        return x + gate_mlp * self.mlp(_wide(self.norm2, x))


class _Refiner(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _RefinerBlock(config.connector_hidden, config.connector_heads, config.connector_mlp_hidden)
            for _ in range(config.connector_depth)
        )


class _TimestepEmbedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))


class _ContextEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)


class _TokenRefiner(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.prompt_dim, config.connector_hidden)
        self.t_embedder = _TimestepEmbedder(config.connector_hidden)
        self.c_embedder = _ContextEmbedder(config.prompt_dim, config.connector_hidden)
        self.individual_token_refiner = _Refiner(config)


class Connector(nn.Module):
    """Prompt embedding and mask -> (text tokens (B, T, context), pooled (B, vec)), in the parameters' dtype."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.S = _TokenRefiner(config)
        self.scale_factor = nn.Parameter(torch.zeros(1))
        self.global_proj_out = nn.Linear(config.prompt_dim, config.vec_in_dim)

    def forward(self, embeds: Tensor, mask: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """embeds: (B, T, prompt); mask: (B, T) float32, 1 for valid tokens; timestep: (1, 256) sinusoid."""
        dtype = self.global_proj_out.weight.dtype
        weights = mask / mask.sum(-1, keepdim=True)
        mean = torch.einsum("bt,btc->bc", weights, embeds.float()).to(dtype)
        pooled = self.global_proj_out((mean * (1 + self.scale_factor)).to(dtype))
        refiner = self.S
        context = refiner.c_embedder.linear_2(F.silu(refiner.c_embedder.linear_1(mean)))
        condition = refiner.t_embedder.mlp(timestep.to(dtype)) + context
        tokens = refiner.input_embedder(embeds.to(dtype))
        bias = self_attention_bias(mask)
        for block in refiner.individual_token_refiner.blocks:
            tokens = block(tokens, condition, bias.to(dtype))
        return tokens, pooled


def self_attention_bias(mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, 1, T, T) float32 logit bias: query valid AND key valid, key 0 always visible."""
    visible = mask[:, :, None] * mask[:, None, :]
    first = torch.zeros_like(mask)
    first[:, 0] = 1
    visible = torch.maximum(visible, first[:, None, :])
    return (1 - visible)[:, None] * -1e30


class ConstantText(nn.Module):
    """What the connector becomes when the prompt is a constant: stored text tokens (after txt_in) and pooled vector."""

    cast_buffers = True  # to the compute dtype

    def __init__(self, text: Tensor, pooled: Tensor) -> None:
        super().__init__()
        self.text: Tensor
        self.pooled: Tensor
        self.register_buffer("text", text.detach().clone())
        self.register_buffer("pooled", pooled.detach().clone())

    def forward(self, embeds: Tensor, mask: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.text, self.pooled
