"""FiffDepth's exact rewrites (DESIGN section 4.8): t = 0 and the empty prompt are constants, and depth is a mean."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from densegeo.models.rewrites import UPSAMPLE, Pipeline, Rewrite, Scope
from densegeo.models.unet import ConstantCrossAttention, CrossAttention, GatedCrossAttention, ResBlock, TokenBlock, UNet


def _unet(pipeline: Pipeline) -> UNet:
    assert isinstance(pipeline.denoiser, UNet)
    return pipeline.denoiser


def fold_time(pipeline: Pipeline) -> None:
    """The time embedding's projections are constants: they join the biases of the first convolutions."""
    unet = _unet(pipeline)
    time = unet.time()
    for block in unet.modules():
        if isinstance(block, ResBlock) and block.time_emb_proj is not None:
            assert time is not None
            assert block.conv1.bias is not None
            block.conv1.bias = nn.Parameter(block.conv1.bias + block.time_emb_proj(time)[0], requires_grad=False)
            block.time_emb_proj = None
    unet.time_embedding = None


def _token_blocks(pipeline: Pipeline) -> Iterator[TokenBlock]:
    for module in list(_unet(pipeline).modules()):
        if isinstance(module, TokenBlock):
            yield module


def fold_prompt(pipeline: Pipeline) -> None:
    """Cross-attention's keys and values are constants: `to_k`, `to_v` and the text encoder are gone."""
    for block in _token_blocks(pipeline):
        assert isinstance(block.attn2, CrossAttention)
        block.attn2 = ConstantCrossAttention(block.attn2, _unet(pipeline).prompt_embeds)


def gate_cross_attention(pipeline: Pipeline) -> None:
    """Attention to two constant tokens is a gate a head: `to_q` and `to_out` shrink to one column a head."""
    if len(pipeline.prompt.mask) == 2:  # what the empty prompt has: begin and end
        for block in _token_blocks(pipeline):
            assert isinstance(block.attn2, ConstantCrossAttention)
            block.attn2 = GatedCrossAttention(block.attn2)


def _fewer_outputs(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    smaller = nn.Conv2d(conv.in_channels, weight.shape[0], conv.kernel_size, padding=conv.padding, device="meta")  # type: ignore[arg-type]
    smaller.weight, smaller.bias = (nn.Parameter(t.clone(), requires_grad=False) for t in (weight, bias))
    return smaller


def fold_channel_mean(pipeline: Pipeline) -> None:
    """Where the mean over a picture's channels comes before the clamp, the last convolution makes it: one channel."""
    if any(output.clamp != "after_mean" for output in pipeline.decode.outputs):
        return
    decoder = pipeline.vae.decoder
    conv = decoder.conv_out
    assert conv.bias is not None
    decoder.conv_out = _fewer_outputs(conv, conv.weight.mean(0, keepdim=True), conv.bias.mean(0, keepdim=True))


def fold_latent_mean(pipeline: Pipeline) -> None:
    """Only the Gaussian's mean is used: the last convolution, times the 1x1 one after it, makes that alone."""
    encoder = pipeline.vae.encoder
    conv, quant = encoder.conv_out, encoder.quant_conv
    if quant is None:
        return
    assert conv.bias is not None
    assert quant.bias is not None
    mix = quant.weight[: encoder.z_channels, :, 0, 0]  # (z, 2z)
    weight, bias = torch.einsum("zm,mchw->zchw", mix, conv.weight), mix @ conv.bias + quant.bias[: encoder.z_channels]
    encoder.conv_out, encoder.quant_conv = _fewer_outputs(conv, weight, bias), None


REWRITES = (
    Rewrite("time", fold_time, summary="time embedding joins the convolutions' biases"),
    Rewrite("prompt", fold_prompt, summary="cross-attention's keys and values become constants"),
    Rewrite("gates", gate_cross_attention, ("prompt",), "attention to two constant tokens becomes a gate a head"),
    Rewrite("channel-mean", fold_channel_mean, summary="the decoder makes one channel", scope=Scope("decoder")),
    Rewrite(
        "latent-mean", fold_latent_mean, summary="the encoder makes the Gaussian's mean alone", scope=Scope("encoder")
    ),
    UPSAMPLE,
)
NAMES = tuple(rewrite.name for rewrite in REWRITES)
