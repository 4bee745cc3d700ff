"""The networks over the project's kernels: the same weights and the same function, fewer passes over memory.

Linears, convolutions and attention stay the libraries'. On a CPU the kernels' references run, which is for tests.
"""

from __future__ import annotations

import copy
import logging
from typing import TypeVar

import torch
from torch import Tensor, nn

from densegeo.kernels.attention import attention, choose
from densegeo.kernels.gated_residual import residual_layer_norm
from densegeo.kernels.gelu_quantize import gelu_quantize
from densegeo.kernels.group_norm_silu import group_norm_silu
from densegeo.kernels.layer_norm import layer_norm
from densegeo.kernels.qk_norm_rope import qk_norm_rope
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.layers import EPS, FoldedBranch, FoldedModulation, heads_first, rotate
from densegeo.models.transformer import (
    ConstantInputBlock,
    DoubleBlock,
    SingleBlock,
    StreamAttention,
    Transformer,
    TrimmedSingleBlock,
)
from densegeo.models.unet import LayerNorm, UNet
from densegeo.models.vae import VAE, Norm

log = logging.getLogger("densegeo")


def can_fuse(model: Transformer) -> bool:
    """Whether the rewrites that the fused form builds on were applied: guidance and modulation."""
    return model.guidance is None and isinstance(model.final_layer.adaLN_modulation, FoldedModulation)


class FusedTransformer(nn.Module):
    """A rewritten transformer's forward: latent (B, C, h, w) -> velocity (B, 2L, 4C) float32.

    strategy: of `kernels.attention`, for the merged padding tokens.
    """

    def __init__(self, model: Transformer, strategy: str = "auto") -> None:
        super().__init__()
        assert can_fuse(model)
        self.model, self.strategy = model, strategy
        text = model.text_tokens
        bias = model.key_bias
        self.counts = None if bias is None else [round(count) for count in bias[0, 0, 0, :text].exp().tolist()]

    def forward(self, latent: Tensor) -> Tensor:
        model = self.model
        image, (text, _) = model.canvas(latent), model.conditioning()
        text = text.expand(image.shape[0], -1, -1).contiguous()
        normed: tuple[Tensor, Tensor] | None = None  # text and image, for the next block's attention
        doubles, singles = list(model.double_blocks), list(model.single_blocks)
        for index, double in enumerate(doubles):
            assert isinstance(double, DoubleBlock)
            image, text, normed = self._double(double, image, text, normed, _after(index, [*doubles, *singles[:1]]))
        if normed is None:
            normed = _norm(text, _next(singles[0])[0]), _norm(image, _next(singles[0])[1])
        x, ready = torch.cat([text, image], dim=1), torch.cat(normed, dim=1)
        for index, single in enumerate(singles):
            x, ready = self._single(single, x, ready, _after(index, singles))
        ready = ready[:, ready.shape[1] - model.image_tokens :]
        return model.final_layer.linear(ready).float()

    @property
    def _final(self) -> FoldedBranch:
        return _branches(self.model.final_layer.adaLN_modulation)[0]

    def _double(
        self,
        block: DoubleBlock,
        image: Tensor,
        text: Tensor,
        normed: tuple[Tensor, Tensor] | None,
        following: nn.Module | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """One double block, and the norms of its results that the following block begins with."""
        model, tokens = self.model, text.shape[1]
        image_attn, image_mlp = _branches(block.img_mod)
        text_attn, text_mlp = _branches(block.txt_mod)
        if isinstance(block, ConstantInputBlock):
            q, k, v = block.qkv(image, text, image_attn, text_attn)
            q, k = (rotate(x, model.rope_cos, model.rope_sin) for x in (q, k))
        else:
            if normed is None:
                normed = _norm(text, text_attn), _norm(image, image_attn)
            parts = [
                self._heads(block.txt_attn, normed[0], slice(0, tokens)),
                self._heads(block.img_attn, normed[1], slice(tokens, None)),
            ]
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        mixed = self._attend(q, k, v)
        proj, update = block.txt_attn.proj, block.img_attn.proj(mixed[:, tokens:])
        image, wide = residual_layer_norm(image, update, None, image_mlp.weight, image_mlp.bias, EPS)
        image_update = _mlp(block.img_mlp, wide)
        text, wide = residual_layer_norm(text, proj(mixed[:, :tokens]), None, text_mlp.weight, text_mlp.bias, EPS)
        text_update = _mlp(block.txt_mlp, wide)
        text_next, image_next = (self._final, self._final) if following is None else _next(following)
        image, image_normed = residual_layer_norm(image, image_update, None, image_next.weight, image_next.bias, EPS)
        text, text_normed = residual_layer_norm(text, text_update, None, text_next.weight, text_next.bias, EPS)
        return image, text, (text_normed, image_normed)

    def _single(
        self, block: nn.Module, x: Tensor, normed: Tensor, following: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """One single block, and the norm of its result that the following block, or the final layer, begins with."""
        if isinstance(block, TrimmedSingleBlock):
            q, k, v, mlp = block.project(normed, (self.model.rope_cos, self.model.rope_sin))
            x = x[:, block.text_tokens :]
        else:
            assert isinstance(block, SingleBlock)
            q, k, v, mlp = self._project(block, normed)
        both = mlp.new_empty(*mlp.shape[:2], block.hidden + block.mlp_hidden)
        gelu_quantize(mlp, out=both[..., block.hidden :])
        both[..., : block.hidden] = self._attend(q, k, v)
        branch = self._final if following is None else _next(following)[0]
        return residual_layer_norm(x, block.linear2(both), None, branch.weight, branch.bias, EPS)

    def _project(self, block: SingleBlock, normed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k, normed and rotated, v (B, heads, T, size), and the MLP's features (B, T, MLP)."""
        joint, hidden = block.linear1(normed), block.hidden  # (B, T, 3 hidden + MLP)
        scales = block.norm.query_norm.scale.float(), block.norm.key_norm.scale.float()
        q, k = qk_norm_rope(joint, *scales, self.model.rope_cos, self.model.rope_sin, block.heads, EPS)
        v = heads_first(joint[..., 2 * hidden : 3 * hidden], block.heads)
        return q, k, v, joint[..., 3 * hidden :]

    def _heads(self, attn: StreamAttention, normed: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """q and k, normed and rotated, and v of one stream: (B, heads, tokens, size)."""
        qkv = attn.qkv(normed)
        scales = attn.norm.query_norm.scale.float(), attn.norm.key_norm.scale.float()
        q, k = qk_norm_rope(qkv, *scales, self.model.rope_cos[rows], self.model.rope_sin[rows], attn.heads, EPS)
        return q, k, heads_first(qkv.chunk(3, dim=-1)[2], attn.heads)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, T, size) -> (B, T, heads * size)."""
        return attention(q, k, v, self.counts, self.strategy).transpose(1, 2).flatten(2)


def fuse_transformer(model: Transformer) -> FusedTransformer:
    """The fused form, with the attention strategy that is fastest on the model's device at its size."""
    config, like, tokens = model.config, model.img_in.bias, model.rope_cos.shape[0]
    fused = FusedTransformer(model)
    if fused.counts is not None:
        shape = (1, config.num_heads, tokens, config.head_size)
        q, k, v = (torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(3))
        fused.strategy = choose(q, k, v, fused.counts)
        log.info("attention over %d tokens with merged padding: %s", tokens, fused.strategy)
    return fused


class FusedNorm(nn.Module):
    """A group norm, with or without SiLU, in one kernel."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(norm.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, silu=False)

    def silu(self, x: Tensor) -> Tensor:
        return self._run(x, silu=True)

    def _run(self, x: Tensor, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return group_norm_silu(x, self.weight, self.bias, self.groups, self.eps, silu=silu)


class FusedLayerNorm(nn.Module):
    """The U-Net's layer norm in one kernel."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x.contiguous(), self.weight, self.bias, self.eps)


Pictures = TypeVar("Pictures", VAE, UNet)


def fuse_norms(network: Pictures) -> Pictures:
    """A copy with fused norms, in channels-last memory, that shares every other weight."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    for module in list(fused.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Norm):
                setattr(module, name, FusedNorm(child))
            elif isinstance(child, LayerNorm):
                setattr(module, name, FusedLayerNorm(child))
    return fused


def fuse(denoiser: AnyDenoiser) -> nn.Module:
    """A denoiser over the project's kernels, where its rewrites allow that."""
    if isinstance(denoiser, UNet):
        return fuse_norms(denoiser)
    assert isinstance(denoiser, Transformer)
    return fuse_transformer(denoiser) if can_fuse(denoiser) else denoiser


def _after(index: int, blocks: list[nn.Module]) -> nn.Module | None:
    """The block that follows, or None after the last one."""
    return blocks[index + 1] if index + 1 < len(blocks) else None


def _branches(modulation: nn.Module) -> tuple[FoldedBranch, ...]:
    branches: tuple[FoldedBranch, ...] = modulation(None)
    return branches


def _next(block: nn.Module) -> tuple[FoldedBranch, FoldedBranch]:
    """The norms that a block begins with: of its text and of its image tokens."""
    if isinstance(block, DoubleBlock):
        return _branches(block.txt_mod)[0], _branches(block.img_mod)[0]
    (branch,) = _branches(block.modulation)  # type: ignore[arg-type]
    return branch, branch


def _norm(x: Tensor, branch: FoldedBranch) -> Tensor:
    return layer_norm(x, branch.weight, branch.bias, EPS)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    first, _, second = mlp.children()
    return second(gelu_quantize(first(x)))
