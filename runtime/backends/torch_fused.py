"""The networks over the project's kernels: the same weights and the same function, fewer passes over memory.

Linears, convolutions and attention stay the libraries', but for fp8 attention. What a quantized layer takes is written
in 8 bits by the kernel before it, rounded once. On a CPU the kernels' references run, which is for tests.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from densegeo.kernels.attention import attention, attention_fp8, choose, fastest
from densegeo.kernels.gelu_quantize import gelu_quantize
from densegeo.kernels.group_norm_silu import group_norm_silu
from densegeo.kernels.layer_norm import layer_norm
from densegeo.kernels.qk_norm_rope import qk_norm_rope
from densegeo.kernels.quantize import quantize
from densegeo.kernels.residual_layer_norm import residual_layer_norm
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.layers import EPS, FoldedBranch, FoldedModulation, QKNorm, heads_first, rotate
from densegeo.models.quantized import ATTENTION, QuantizedAttention, QuantizedLinear, has_fp8
from densegeo.models.transformer import (
    ConstantInputBlock,
    DoubleBlock,
    SingleBlock,
    Transformer,
    TrimmedSingleBlock,
)
from densegeo.models.unet import LayerNorm, UNet
from densegeo.models.vae import VAE, Norm

log = logging.getLogger("densegeo")


def can_fuse(model: Transformer) -> bool:
    """Whether the rewrites that the fused form builds on were applied: guidance and modulation."""
    return model.guidance is None and isinstance(model.final_layer.adaLN_modulation, FoldedModulation)


class Taken(NamedTuple):
    """How a linear wants its input: an 8-bit type and 1 / scale, or as it is."""

    dtype: torch.dtype | None = None
    inverse_scale: float = 1.0


class Following(NamedTuple):
    """A norm, and the linear that alone takes its result; None where several do."""

    branch: FoldedBranch
    linear: nn.Module | None


class FusedAttention(nn.Module):
    """An attention whose products are fp8, on hardware that has them; q, k and v may be in 8 bits already."""

    DTYPE = ATTENTION.dtype

    def __init__(self, attention: QuantizedAttention, counts: list[int] | None = None) -> None:
        super().__init__()
        self.scales = float(attention.q_scale), float(attention.k_scale), float(attention.v_scale)
        self.dtype, self.counts = attention.q_scale.dtype, counts

    def rounded(self, x: Tensor, part: int) -> Tensor:
        """x (B, heads, T, size) of q, k or v (part 0, 1, 2) in 8 bits."""
        if x.dtype == self.DTYPE:
            return x
        if x.is_contiguous():
            return quantize(x.flatten(1, 2), self.DTYPE, 1 / self.scales[part]).view(x.shape)
        return heads_first(quantize(x.transpose(1, 2).flatten(2), self.DTYPE, 1 / self.scales[part]), x.shape[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """(B, heads, T, size) -> (B, T, heads * size). key_bias: not looked at; the counts tell it."""
        q, k, v = (self.rounded(x, part) for part, x in enumerate((q, k, v)))
        return attention_fp8(q, k, v, self.scales, self.dtype, self.counts).transpose(1, 2).flatten(2)


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
        self._taken = {  # by id: scales as numbers, which a recording cannot read from the device
            id(module): Taken(module.weight.dtype, 1 / float(module.input_scale))
            for module in model.modules()
            if isinstance(module, QuantizedLinear)
        }
        self.plainly = False  # attend in floating point where fp8 is planned, too
        self.in_fp8 = {  # by id, too
            id(module): FusedAttention(module, self.counts)
            for module in model.modules()
            if isinstance(module, QuantizedAttention) and has_fp8(module.q_scale.device)
        }

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
            of_text, of_image = _next(singles[0])
            normed = self._norm(text, of_text), self._norm(image, of_image)
        x, ready = torch.cat([text, image], dim=1), torch.cat(normed, dim=1)
        for index, single in enumerate(singles):
            x, ready = self._single(single, x, ready, _after(index, singles))
        ready = ready[:, ready.shape[1] - model.image_tokens :]
        return model.final_layer.linear(ready).float()

    @property
    def _final(self) -> Following:
        return Following(_branches(self.model.final_layer.adaLN_modulation)[0], None)

    def _takes(self, linear: nn.Module | None) -> Taken:
        return self._taken.get(id(linear), Taken())

    def _norm(self, x: Tensor, following: Following) -> Tensor:
        branch, linear = following
        return layer_norm(x, branch.weight, branch.bias, EPS, *self._takes(linear))

    def _add_norm(self, x: Tensor, update: Tensor, following: Following) -> tuple[Tensor, Tensor]:
        """x + update, and its norm as what follows takes it."""
        branch, linear = following
        return residual_layer_norm(x, update, branch.weight, branch.bias, EPS, *self._takes(linear))

    def _given(self, linear: nn.Module, x: Tensor) -> Tensor:
        """x (B, T, K), as a linear takes it, through that linear."""
        taken = self._takes(linear)
        result: Tensor = linear(x if taken.dtype is None else quantize(x, taken.dtype, taken.inverse_scale))
        return result

    def _mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        first, _, second = mlp.children()
        result: Tensor = second(gelu_quantize(first(x), *self._takes(second)))
        return result

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
                of_text, of_image = _next(block)
                normed = self._norm(text, of_text), self._norm(image, of_image)
            parts = [
                self._heads(attn.qkv(rows), attn.norm, places, attn.heads, block.attention)
                for attn, rows, places in (
                    (block.txt_attn, normed[0], slice(0, tokens)),
                    (block.img_attn, normed[1], slice(tokens, None)),
                )
            ]
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        mixed = self._attend(block.attention, q, k, v)
        update = self._given(block.img_attn.proj, mixed[:, tokens:])
        image, wide = self._add_norm(image, update, Following(image_mlp, block.img_mlp[0]))
        image_update = self._mlp(block.img_mlp, wide)
        update = self._given(block.txt_attn.proj, mixed[:, :tokens])
        text, wide = self._add_norm(text, update, Following(text_mlp, block.txt_mlp[0]))
        text_update = self._mlp(block.txt_mlp, wide)
        text_next, image_next = (self._final, self._final) if following is None else _next(following)
        image, image_normed = self._add_norm(image, image_update, image_next)
        text, text_normed = self._add_norm(text, text_update, text_next)
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
            joint = block.linear1(normed)  # (B, T, 3 hidden + MLP)
            q, k, v = self._heads(joint, block.norm, slice(None), block.heads, block.attention)
            mlp = joint[..., 3 * block.hidden :]
        dtype, inverse_scale = self._takes(block.linear2)
        both = mlp.new_empty(*mlp.shape[:2], block.hidden + block.mlp_hidden, dtype=dtype)
        gelu_quantize(mlp, dtype, inverse_scale, out=both[..., block.hidden :])
        if dtype is None:
            both[..., : block.hidden] = self._attend(block.attention, q, k, v)
        else:
            quantize(self._attend(block.attention, q, k, v), dtype, inverse_scale, out=both[..., : block.hidden])
        return self._add_norm(x, block.linear2(both), self._final if following is None else _next(following)[0])

    def _heads(
        self, qkv: Tensor, norm: QKNorm, rows: slice, heads: int, attention: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B, T, at least 3 hidden) -> q and k, normed and rotated, and v, (B, heads, T, size), as attention wants.

        rows: the tokens' places in the joint sequence.
        """
        scales = norm.query_norm.scale.float(), norm.key_norm.scale.float()
        tables = self.model.rope_cos[rows], self.model.rope_sin[rows]
        hidden = heads * len(scales[0])
        v = heads_first(qkv[..., 2 * hidden : 3 * hidden], heads)
        eight = self.in_fp8.get(id(attention))
        if eight is None:
            return *qk_norm_rope(qkv, *scales, *tables, heads, EPS), v
        inverse = 1 / eight.scales[0], 1 / eight.scales[1]
        return *qk_norm_rope(qkv, *scales, *tables, heads, EPS, eight.DTYPE, inverse), eight.rounded(v, 2)

    def _attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, T, size) -> (B, T, heads * size)."""
        if isinstance(module, QuantizedAttention) and not self.plainly:
            mixed: Tensor = self.in_fp8.get(id(module), module)(q, k, v, self.model.key_bias)
            return mixed
        return attention(q, k, v, self.counts, self.strategy).transpose(1, 2).flatten(2)


def fuse_transformer(model: Transformer) -> FusedTransformer:
    """The fused form, with the ways to attend that are the fastest on the model's device at its size.

    Where fp8 attention is planned and turns out slower than the plain one, the latter runs: it is the more exact one.
    """
    config, like, tokens = model.config, model.img_in.bias, model.rope_cos.shape[0]
    fused = FusedTransformer(model)
    if fused.counts is None and not fused.in_fp8:
        return fused
    shape = (1, config.num_heads, tokens, config.head_size)
    q, k, v = (torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(3))
    if fused.counts is not None:
        fused.strategy = choose(q, k, v, fused.counts)
        log.info("attention over %d tokens with merged padding: %s", tokens, fused.strategy)
    if fused.in_fp8:
        eight = next(iter(fused.in_fp8.values()))
        eight_q, eight_k = eight.rounded(q, 0), eight.rounded(k, 1)  # in a network the kernel before writes them
        ways = {
            "fp8": lambda: eight(eight_q, eight_k, v),
            "plain": lambda: attention(q, k, v, fused.counts, fused.strategy),
        }
        if fastest(ways, q.device) == "plain":
            fused.in_fp8, fused.plainly = {}, True
        log.info("planned fp8 attention over %d tokens: %s", tokens, "plain is faster" if fused.plainly else "fp8")
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
    """A copy with fused norms and fp8 attention, in channels-last memory, that shares every other weight."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    for module in list(fused.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Norm):
                setattr(module, name, FusedNorm(child))
            elif isinstance(child, LayerNorm):
                setattr(module, name, FusedLayerNorm(child))
            elif isinstance(child, QuantizedAttention) and has_fp8(child.q_scale.device):
                setattr(module, name, FusedAttention(child))
    return fused


def fuse(denoiser: AnyDenoiser) -> Any:
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


def _next(block: nn.Module) -> tuple[Following, Following]:
    """The norms that a block begins with: of its text and of its image tokens."""
    if isinstance(block, DoubleBlock):
        text, image = _branches(block.txt_mod)[0], _branches(block.img_mod)[0]
        return Following(text, block.txt_attn.qkv), Following(image, block.img_attn.qkv)
    (branch,) = _branches(block.modulation)  # type: ignore[arg-type]
    following = Following(branch, getattr(block, "linear1", None))  # a trimmed block has two linears in its place
    return following, following
