"""The networks over the project's kernels: the same weights and the same function, fewer passes over memory.

Linears, convolutions and attention stay the libraries', but for fp8 attention. What a quantized layer takes is written
in 8 bits by the kernel before it, rounded once. On a CPU the kernels' references run, which is for tests.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.kernels.attention import attention
from densegeo.kernels.attention.strategies import STRATEGIES
from densegeo.kernels.gelu_quantize import gelu_quantize
from densegeo.kernels.layer_norm import layer_norm
from densegeo.kernels.qk_norm_rope import qk_norm_rope
from densegeo.kernels.quantize import quantize
from densegeo.kernels.residual_layer_norm import residual_layer_norm
from densegeo.models.denoiser import AnyDenoiser
from densegeo.models.layers import EPS, FoldedBranch, FoldedModulation, QKNorm, heads_first, rotate
from densegeo.models.quantized import FORMATS, QuantizedAttention, QuantizedLinear, has_fp8
from densegeo.models.transformer import (
    ConstantInputBlock,
    DoubleBlock,
    SingleBlock,
    Transformer,
    TrimmedSingleBlock,
)
from densegeo.models.unet import UNet
from densegeo.runtime.backends.torch_attention import FusedAttention
from densegeo.runtime.backends.torch_choice import decide
from densegeo.runtime.backends.torch_linear import FusedLinear, fuse_linears, multiply_into
from densegeo.runtime.backends.torch_pictures import fuse_pictures

log = logging.getLogger("densegeo")


def can_fuse(model: Transformer) -> bool:
    """Whether the rewrites that the fused form builds on were applied: guidance and modulation."""
    return model.guidance is None and isinstance(model.final_layer.adaLN_modulation, FoldedModulation)


class OperandFormat(NamedTuple):
    """How a linear wants its input: an 8-bit type and 1 / scale, or as it is."""

    dtype: torch.dtype | None = None
    inverse_scale: float = 1.0


class Following(NamedTuple):
    """A norm, and the linear that alone takes its result; None where several do."""

    branch: FoldedBranch
    linear: nn.Module | None


class FusedTransformer(nn.Module):
    """A rewritten transformer's forward: latent (B, C, h, w) -> velocity (B, 2L, 4C) float32.

    strategy: of `kernels.attention`, for the merged padding tokens.
    """

    def __init__(self, model: Transformer, strategy: str = "auto") -> None:
        super().__init__()
        assert can_fuse(model)
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):  # a copy that shares all tensors
            shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, shared)
        self.linears = fuse_linears(model)
        self.model, self.strategy = model, strategy
        text = model.text_tokens
        bias = model.key_bias
        self.counts = None if bias is None else [round(count) for count in bias[0, 0, 0, :text].exp().tolist()]
        self._formats = {  # by id: scales as numbers, which a recording cannot read from the device
            id(linear): OperandFormat(linear.weight.dtype, 1 / linear.input_scale) for linear in self.linears
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

    def _format_of(self, linear: nn.Module | None) -> OperandFormat:
        return self._formats.get(id(linear), OperandFormat())

    def _norm(self, x: Tensor, following: Following) -> Tensor:
        branch, linear = following
        return layer_norm(x, branch.weight, branch.bias, EPS, *self._format_of(linear))

    def _add_norm(self, x: Tensor, update: Tensor, following: Following) -> tuple[Tensor, Tensor]:
        """x + update, and its norm as what follows takes it."""
        branch, linear = following
        return residual_layer_norm(x, update, branch.weight, branch.bias, EPS, *self._format_of(linear))

    def _through(self, linear: nn.Module, x: Tensor) -> Tensor:
        """x (B, T, K), as a linear takes it, through that linear."""
        operand = self._format_of(linear)
        result: Tensor = linear(x if operand.dtype is None else quantize(x, operand.dtype, operand.inverse_scale))
        return result

    def _mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        first, _, second = mlp.children()
        result: Tensor = second(gelu_quantize(first(x), *self._format_of(second)))
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
            q, k, v = self._joint(block, *normed)
        mixed = self._attend(block.attention, q, k, v)
        update = self._through(block.img_attn.proj, mixed[:, tokens:])
        image, wide = self._add_norm(image, update, Following(image_mlp, block.img_mlp[0]))
        image_update = self._mlp(block.img_mlp, wide)
        update = self._through(block.txt_attn.proj, mixed[:, :tokens])
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
            q, k = self._heads(joint, block.norm, slice(None), block.heads, block.attention)
            v, eight = (
                heads_first(joint[..., 2 * block.hidden : 3 * block.hidden], block.heads),
                self.in_fp8.get(id(block.attention)),
            )
            if eight is not None:
                v = eight.rounded(v, 2)
            mlp = joint[..., 3 * block.hidden :]
        dtype, inverse_scale = self._format_of(block.linear2)
        both = mlp.new_empty(*mlp.shape[:2], block.hidden + block.mlp_hidden, dtype=dtype)
        gelu_quantize(mlp, dtype, inverse_scale, out=both[..., block.hidden :])
        if dtype is None:
            self._attend(block.attention, q, k, v, both[..., : block.hidden])
        else:
            quantize(self._attend(block.attention, q, k, v), dtype, inverse_scale, out=both[..., : block.hidden])
        return self._add_norm(x, block.linear2(both), self._final if following is None else _next(following)[0])

    def _joint(self, block: DoubleBlock, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both streams' normed tokens -> q, k and v of the joint sequence, each written where it is read."""
        tokens, (heads, size) = text.shape[1], (block.img_attn.heads, len(block.img_attn.norm.query_norm.scale))
        batch, both, hidden = len(text), tokens + image.shape[1], heads * size
        joint = text.new_empty(batch, both, 3 * hidden, dtype=block.img_attn.qkv.bias.dtype)
        eight = self.in_fp8.get(id(block.attention))
        q = joint.new_empty(batch, heads, both, size, dtype=joint.dtype if eight is None else eight.DTYPE)
        k = torch.empty_like(q)
        for attn, rows, places in (
            (block.txt_attn, text, slice(0, tokens)),
            (block.img_attn, image, slice(tokens, None)),
        ):
            multiply_into(attn.qkv, rows, joint[:, places])
            self._heads(joint[:, places], attn.norm, places, heads, block.attention, (q[:, :, places], k[:, :, places]))
        v = heads_first(joint[..., 2 * hidden :], heads)
        return q, k, v if eight is None else eight.rounded(v, 2)

    def _heads(
        self,
        qkv: Tensor,
        norm: QKNorm,
        rows: slice,
        heads: int,
        attention: nn.Module,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """qkv (B, T, at least 3 hidden) -> q and k, normed and rotated, (B, heads, T, size), as attention wants them.

        rows: the tokens' places in the joint sequence.
        """
        scales = norm.query_norm.scale.float(), norm.key_norm.scale.float()
        tables = self.model.rope_cos[rows], self.model.rope_sin[rows]
        eight = self.in_fp8.get(id(attention))
        if eight is None:
            return qk_norm_rope(qkv, *scales, *tables, heads, EPS, out=out)
        inverse = 1 / eight.scales[0], 1 / eight.scales[1]
        return qk_norm_rope(qkv, *scales, *tables, heads, EPS, eight.DTYPE, inverse, out)

    def _attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, heads, T, size) -> (B, T, heads * size), in `out` if there is one, whose features are adjacent."""
        if isinstance(module, QuantizedAttention) and not self.plainly:
            mixed: Tensor = self.in_fp8.get(id(module), module)(q, k, v, self.model.key_bias)
            return mixed if out is None else out.copy_(mixed)
        output = attention(q, k, v, self.counts, self.strategy, out)
        return output.transpose(1, 2).flatten(2) if out is None else out


def fuse_transformer(model: Transformer) -> FusedTransformer:
    """The fused form, with the ways that are the fastest on the model's device at its size.

    Where fp8 attention is planned and turns out slower than the plain one, the latter runs: it is the more exact one.
    """
    config, like, tokens = model.config, model.img_in.bias, model.rope_cos.shape[0]
    fused = FusedTransformer(model)
    if like.is_cuda:
        choose_accumulation(fused.linears, tokens)
    if fused.counts is None and not fused.in_fp8:
        return fused
    shape = (1, config.num_heads, tokens, config.head_size)
    q, k, v = (torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(3))
    work = f"over {tokens} tokens, {config.num_heads} heads of {config.head_size} in {like.dtype}"
    if fused.counts is not None:
        fused.strategy = choose_strategy(f"attention with merged padding {fused.counts} {work}", q, k, v, fused.counts)
    if fused.in_fp8:
        eight = next(iter(fused.in_fp8.values()))
        eight_q, eight_k = eight.rounded(q, 0), eight.rounded(k, 1)  # in a network the kernel before writes them
        ways = {
            "fp8": lambda: eight(eight_q, eight_k, v),
            "plain": lambda: attention(q, k, v, fused.counts, fused.strategy).transpose(1, 2).flatten(2),
        }
        if decide(f"planned fp8 attention {work}", ways, ways["fp8"], like.device) == "plain":
            fused.in_fp8, fused.plainly = {}, True
    return fused


def choose_strategy(work: str, q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> str:
    """The name in `kernels.attention.strategies.STRATEGIES` that is the fastest for these on their device."""
    repeated = torch.tensor([*counts, *[1] * (k.shape[2] - len(counts))], device=q.device).double().log()
    few = q[:, :1, :64].double(), k[:, :1].double(), v[:, :1].double()
    ways = {
        name: lambda name=name: attention(q, k, v, counts, name).transpose(0, 1)[:1, :, :64]
        for name in sorted(STRATEGIES, key=lambda name: name != "bias")  # the plain way first
    }
    return decide(
        work, ways, lambda: F.scaled_dot_product_attention(*few, attn_mask=repeated[None]).transpose(0, 1), q.device
    )


def choose_accumulation(linears: list[FusedLinear], rows: int) -> None:
    """Whether fp8 products add in fewer bits, for all of them alike: where that is faster, and no further off than
    twice what they are themselves, in the largest of them.
    """
    able = [linear for linear in linears if linear.weight.dtype == torch.float8_e4m3fn]
    if not able:
        return
    largest = max(able, key=lambda linear: (linear.weight.shape[1], linear.weight.shape[0]))
    columns, size = largest.weight.shape
    wide = torch.randn(rows, size, device=largest.weight.device)
    weight = torch.randn(columns, size, device=largest.weight.device)
    fused = FusedLinear(_random(weight, float(wide.abs().max()), largest.bias.dtype))
    quantized_rows = quantize(wide[None], fused.weight.dtype, 1 / fused.input_scale)[0]

    def multiplied(fast: bool) -> Tensor:
        fused.fast = fast
        result: Tensor = fused(quantized_rows)
        return result

    work = f"fp8 products {rows} x {size} x {columns} into {largest.bias.dtype}"
    exact = lambda: wide[:64].double() @ weight.double().t()  # noqa: E731
    ways = {"exact sums": lambda: multiplied(fast=False), "fast sums": lambda: multiplied(fast=True)}
    fast = decide(work, ways, exact, wide.device, slice(0, 64)) == "fast sums"
    for linear in able:
        linear.fast = fast


def _random(weight: Tensor, largest: float, dtype: torch.dtype) -> QuantizedLinear:
    """A quantized linear without a bias."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return QuantizedLinear.prepare(plain, largest, FORMATS["fp8"], dtype)


def fuse(denoiser: AnyDenoiser) -> Any:
    """A denoiser over the project's kernels, where its rewrites allow that."""
    if isinstance(denoiser, UNet):
        return fuse_pictures(denoiser)
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
