"""Autoencoder and U-Net over the project's kernels, with a pixel's channels adjacent from end to end."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.kernels.group_norm_silu import group_norm_silu
from densegeo.kernels.interleave import interleave
from densegeo.kernels.layer_norm import layer_norm
from densegeo.models.quantized import QuantizedAttention, has_fp8
from densegeo.models.unet import LayerNorm, UNet
from densegeo.models.vae import VAE, AttnBlock, Norm, PhaseUpsample, TransposedUpsample
from densegeo.runtime.backends.torch_attention import FusedAttention
from densegeo.runtime.backends.torch_choice import decide
from densegeo.runtime.backends.torch_linear import fuse_linears

PART = 1024  # queries whose logits are in memory at a time: about as much as a GPU's cache holds


class FusedNorm(nn.Module):
    """A group norm, with or without SiLU, in one kernel."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(norm.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, silu=False)

    def silu(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See `models.vae.Norm.silu`."""
        return self._run(x, silu=True, dtype=dtype)

    def _run(self, x: Tensor, silu: bool, dtype: torch.dtype | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.groups, self.eps, silu=silu, dtype=dtype)


class FusedLayerNorm(nn.Module):
    """The U-Net's layer norm in one kernel."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x.contiguous(), self.weight, self.bias, self.eps)


class FusedUpsample(nn.Module):
    """Its convolution's phases interleaved in one pass that keeps a pixel's channels adjacent."""

    def __init__(self, upsample: PhaseUpsample) -> None:
        super().__init__()
        self.conv = upsample.conv

    def forward(self, x: Tensor) -> Tensor:
        return interleave(self.conv(x))


class FusedAttnBlock(nn.Module):
    """The autoencoder's attention, whose one head is wider than the libraries' fast kernels take.

    chosen: a name in `WIDE` by the queries' shape; what is not there is decided when it is first run.
    """

    def __init__(self, block: AttnBlock) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.proj_out = (
            FusedNorm(block.norm),
            block.q,
            block.k,
            block.v,
            block.proj_out,
        )
        self.chosen: dict[torch.Size, str] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        if q.shape not in self.chosen:
            self.chosen[q.shape] = choose_wide(q, k, v) if q.is_cuda else "library"
        out = WIDE[self.chosen[q.shape]](q, k, v)[:, 0]
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention: its memory-efficient kernel, for so many features."""
    return F.scaled_dot_product_attention(q, k, v)


def products(q: Tensor, k: Tensor, v: Tensor, part: int = PART) -> Tensor:
    """q, k, v (N, 1, T, S) -> the same attention by two products, over a part of the queries at a time.

    Logits are float32, weights of v's type.
    """
    keys, values, scale = k[:, 0].mT, v[:, 0], q.shape[-1] ** -0.5
    output = torch.empty_like(q)
    for start in range(0, q.shape[2], part):
        queries = q[:, 0, start : start + part]
        if q.is_cuda and q.dtype != torch.float32:
            none = torch.empty((), dtype=torch.float32, device=q.device)
            logits = torch.baddbmm(none, queries, keys, out_dtype=torch.float32, beta=0, alpha=scale)
        else:
            logits = (queries.float() * scale) @ keys.float()
        output[:, 0, start : start + part] = logits.softmax(-1).to(v.dtype) @ values
    return output


WIDE = {"library": library, "products": products}


def choose_wide(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The name in `WIDE` that is the fastest for these on their device."""
    few = q[:1, :, :64].double()
    work = f"attention with {q.shape[-1]} features over {q.shape[2]} pixels, {len(q)} pictures in {q.dtype}"
    return decide(
        work,
        {name: lambda way=way: way(q, k, v)[:1, :, :64] for name, way in WIDE.items()},  # type: ignore[misc]
        lambda: F.scaled_dot_product_attention(few, k[:1].double(), v[:1].double()),
        q.device,
    )


TRANSPOSED = "transposed"


@torch.no_grad()
def faster_transposed(phases: PhaseUpsample) -> bool:
    """Whether upsampling is faster as a transposed convolution on this CPU; timed once, then remembered.

    On two x86 machines it was a tenth of the autoencoder's time (benchmarks/autoencoder_layers.py). int8 is not timed:
    transposed, it is one kernel.
    """
    if not isinstance(phases.conv, nn.Conv2d):
        return True
    weight, rows = phases.conv.weight, 4

    @cache  # neither is made where the choice is remembered
    def picture() -> Tensor:
        values = torch.randn(1, weight.shape[1], 64, 64, generator=torch.Generator().manual_seed(0))
        return values.to(weight.dtype, memory_format=torch.channels_last)

    @cache
    def transposed() -> TransposedUpsample:
        layer = TransposedUpsample(phases)
        layer.make_ready()
        return layer

    def exact() -> Tensor:
        strip = picture()[:, :, : rows + 1].double()  # what the first rows come from
        return copy.deepcopy(phases).double()(strip)[:, :, : 2 * rows]

    work = f"upsampling of {weight.shape[1]} features in {weight.dtype} with {torch.get_num_threads()} threads"
    ways = {
        "phases": lambda: phases(picture())[:, :, : 2 * rows],
        TRANSPOSED: lambda: transposed()(picture())[:, :, : 2 * rows],
    }
    return decide(work, ways, exact, weight.device) == TRANSPOSED


Pictures = TypeVar("Pictures", VAE, UNet)


def fuse_pictures(network: Pictures) -> Pictures:
    """A copy over the kernels, in channels-last memory, that shares every other weight."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    fuse_linears(fused)
    for module in list(fused.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedAttention) and not has_fp8(child.q_scale.device):
                continue
            for plain, kind in FUSED:
                if isinstance(child, plain):
                    setattr(module, name, kind(child))
    for entry in (fused.encoder, fused.decoder) if isinstance(fused, VAE) else (fused,):
        entry.register_forward_pre_hook(_channels_last)
    return fused


FUSED: tuple[tuple[type[nn.Module], Any], ...] = (
    (Norm, FusedNorm),
    (LayerNorm, FusedLayerNorm),
    (PhaseUpsample, FusedUpsample),
    (AttnBlock, FusedAttnBlock),
    (QuantizedAttention, FusedAttention),
)


def _channels_last(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """What enters: a latent of a few channels, or a picture that lies so already."""
    return (inputs[0].contiguous(memory_format=torch.channels_last),)
