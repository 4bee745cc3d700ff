"""Compute precision: what is cast, and what stays float32 in a low-precision model.

Linears, convolutions and group norms run in the chosen dtype. LayerNorm, QK norms, modulation, RoPE, the merged keys'
bias (bf16 would be off by 1 %) and the decoder's last norm and convolution stay float32 (DESIGN sections 3 and 4).
"""

from __future__ import annotations

import torch
from torch import nn

from densegeo.models.rewrites import Pipeline
from densegeo.models.vae import Decoder
from densegeo.precision import FLOATS, PRECISIONS

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, PRECISIONS[name].torch) for name in FLOATS}


def cast(pipeline: Pipeline, precision: str) -> Pipeline:
    """Cast a float32 pipeline in place to a floating-point precision; returns it."""
    cast_module(pipeline.denoiser, precision)
    cast_module(pipeline.vae, precision)
    return pipeline


def cast_module(root: nn.Module, precision: str) -> None:
    """Cast a float32 network, or a part of one, in place."""
    dtype = DTYPES[precision]
    tails = {
        part for module in root.modules() if isinstance(module, Decoder) for part in (module.norm_out, module.conv_out)
    }
    for module in root.modules():
        if module in tails:
            continue
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm):
            module.to(dtype)
        elif getattr(module, "cast_buffers", False):
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(dtype))
