"""Plans of what becomes 8-bit, and float32 blocks whose layers are replaced by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densegeo.models.layers import Attention, FoldedBranch, FoldedModulation
from densegeo.models.quantized import (
    AttentionPlan,
    Format,
    QuantizedAttention,
    QuantizedConvolution,
    QuantizedLinear,
)
from densegeo.models.transformer import DoubleBlock, SingleBlock, TrimmedSingleBlock
from densegeo.models.vae import Downsample, PhaseUpsample


class LayerPlan(NamedTuple):
    """How one linear or convolution is quantized.

    smooth: (K,) what its input is divided by and its columns multiplied by, or None. twice: of a convolution, see
    `QuantizedConvolution`.
    """

    input_amax: float
    smooth: Tensor | None = None
    twice: bool = False


Plans = Mapping[str, LayerPlan | AttentionPlan]  # by a module's name in `Pipeline.parts`


def smoothable(block: nn.Module) -> Iterator[tuple[FoldedBranch, tuple[str, ...]]]:
    """A block's folded norms, each with the names of the linears that alone take its result."""
    if isinstance(block, DoubleBlock):
        for stream in ("img", "txt"):
            modulation = getattr(block, f"{stream}_mod")
            if isinstance(modulation, FoldedModulation):
                attention, mlp = modulation(None)
                if hasattr(getattr(block, f"{stream}_attn"), "qkv"):
                    yield attention, (f"{stream}_attn.qkv",)
                yield mlp, (f"{stream}_mlp.0",)
    elif isinstance(block, SingleBlock | TrimmedSingleBlock) and isinstance(block.modulation, FoldedModulation):
        (branch,) = block.modulation(None)
        yield branch, ("linear1",) if isinstance(block, SingleBlock) else ("key_value", "query_mlp")


def quantize_block(block: nn.Module, prefix: str, plans: Plans, kind: Format, dtype: torch.dtype) -> None:
    """Replace the layers of a float32 block that have a plan, in place; smoothing comes first.

    block, prefix: of `Pipeline.parts`. plans: by full name, `prefix` included ("double_blocks.0.img_attn.qkv"). kind:
    of linears and convolutions; attention is fp8. Smoothing goes into the block's norms.
    """
    start = f"{prefix}." if prefix else ""
    for norm, names in smoothable(block):
        layer_plans = [plans.get(start + name) for name in names]
        factors = [plan.smooth for plan in layer_plans if isinstance(plan, LayerPlan)]
        if factors and factors[0] is not None and not norm.weight.is_meta:
            _smooth(norm, [block.get_submodule(name) for name in names], factors[0])
    for name, module in list(block.named_modules()):
        plan = plans.get(start + name)
        before, _, child = name.rpartition(".")
        parent = block.get_submodule(before)
        replacement: nn.Module | None = None
        if isinstance(plan, LayerPlan) and isinstance(module, nn.Linear):
            replacement = QuantizedLinear.prepare(module, plan.input_amax, kind, dtype)
        elif isinstance(plan, LayerPlan) and isinstance(module, nn.Conv2d):
            phases = PhaseUpsample.PHASES if isinstance(parent, PhaseUpsample) else 1
            replacement = QuantizedConvolution.prepare(
                module, plan.input_amax, kind, dtype, plan.smooth, twice=plan.twice, phases=phases
            )
        elif isinstance(plan, AttentionPlan) and isinstance(module, Attention):
            replacement = QuantizedAttention(plan, dtype, next(block.parameters()).device)
        if replacement is not None:
            if isinstance(parent, Downsample) and isinstance(replacement, QuantizedConvolution):
                # Quantized before it is padded: engine builders take the zeros into the product.
                parent.pads, replacement.pads = False, parent.PADS
            setattr(parent, child, replacement)


@torch.no_grad()
def _smooth(norm: FoldedBranch, linears: list[nn.Module], factors: Tensor) -> None:
    """Divide a norm's result by `factors` and multiply the linears' columns by them: the same function.

    SmoothQuant (arXiv 2211.10438): hard-to-quantize channels of an activation move into the weights.
    """
    norm.weight.data = norm.weight / factors
    norm.bias.data = norm.bias / factors
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        linear.weight.data = linear.weight * factors
