"""Small pieces the transformer and the connector share. Inference only; tensors are (batch, tokens, features)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every norm in the model


def sinusoid(position: float, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding (1, dim) in float32, cosines first."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = position * frequencies
    return torch.cat([angles.cos(), angles.sin()])[None]


class MLPEmbedder(nn.Module):
    """linear, SiLU, linear."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class RMSNorm(nn.Module):
    """RMS norm over the last axis, its weight applied in float32; returns the input's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * self.scale).to(x.dtype)


class QKNorm(nn.Module):
    """RMS norms of queries and keys, over the head's features."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_size)
        self.key_norm = RMSNorm(head_size)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class Modulated(Protocol):
    """What a block does to its residual stream around attention or MLP."""

    def norm(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, update: Tensor) -> Tensor: ...


class Branch:
    """AdaLN modulation computed at run time; shift, scale and gate are (batch, 1, features)."""

    def __init__(self, shift: Tensor, scale: Tensor, gate: Tensor | None = None) -> None:
        self.shift, self.scale, self.gate = shift, scale, gate

    def norm(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
        return ((1 + self.scale.float()) * normed + self.shift.float()).to(x.dtype)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        assert self.gate is not None
        return x + self.gate * update


class FoldedBranch(nn.Module):
    """Constant modulation: an affine LayerNorm. The gate lies in the rows of the linear that makes the update."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + branch.scale[0, 0].float(), requires_grad=False)
        self.bias = nn.Parameter(branch.shift[0, 0].float().clone(), requires_grad=False)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, EPS).to(x.dtype)

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update


class Modulation(nn.Module):
    """Linear(SiLU(vec)) in chunks (shift, scale, gate) for each of `branches` residual branches."""

    def __init__(self, hidden: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.lin = nn.Linear(hidden, 3 * branches * hidden)

    def forward(self, vec: Tensor) -> tuple[Modulated, ...]:
        chunks = self.lin(F.silu(vec))[:, None].chunk(3 * self.branches, dim=-1)
        return tuple(Branch(*chunks[3 * i : 3 * i + 3]) for i in range(self.branches))


class FinalModulation(nn.Sequential):
    """The final layer's (shift, scale), under the checkpoint's name `adaLN_modulation.1`."""

    def __init__(self, hidden: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, vec: Tensor) -> tuple[Modulated, ...]:
        return (Branch(*super().forward(vec)[:, None].chunk(2, dim=-1)),)


class FoldedModulation(nn.Module):
    """What a Modulation becomes when the timestep and the prompt are constants."""

    def __init__(self, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.folded = nn.ModuleList(FoldedBranch(branch) for branch in branches)

    def forward(self, vec: Tensor | None) -> tuple[Modulated, ...]:
        return tuple(self.folded)  # type: ignore[arg-type]


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * size) -> (batch, heads, tokens, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_qkv(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features ordered (3, heads, size) -> three of (batch, heads, tokens, size)."""
    q, k, v = (heads_first(part, heads) for part in x.chunk(3, dim=-1))
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """Softmax attention of (batch, heads, tokens, size) tensors -> (batch, tokens, heads * size).

    key_bias: float32 (1, 1, 1, keys), added to the logits: ln(multiplicity) of merged keys (DESIGN 4.4).
    """
    if q.requires_grad and q.device.type == "cpu":  # in training: the fused kernel's backward is slower than this
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        out = (logits if key_bias is None else logits + key_bias).softmax(-1).to(v.dtype) @ v
    elif key_bias is not None and q.is_cuda:
        # torch's CUDA kernels read a float32 bias as if it were of q's type (seen with 2.11: results off by 40 %)
        q32, k32, v32 = (x.to(key_bias.dtype) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q32, k32, v32, attn_mask=key_bias).to(q.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """`attention` as a module without weights: it has a name, and may become 8-bit (`models.quantized`)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        return attention(q, k, v, key_bias)


def rope_tables(positions: Tensor, axes: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head_size / 2) in float32 for integer positions (tokens, axes)."""
    angles = []
    for axis, dim in enumerate(axes):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[:, axis, None].double() * frequencies)
    joined = torch.cat(angles, dim=-1)
    return joined.cos().float(), joined.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent feature pairs: (x0, x1) -> (c x0 - s x1, s x0 + c x1), in float32, back to x's dtype."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * x0 - sin * x1, sin * x0 + cos * x1], dim=-1).flatten(-2).to(x.dtype)
