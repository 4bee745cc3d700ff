"""int8 layers on a CPU through oneDNN's products, which torch brings and uses for its own quantized modules.

`models.quantized` has their plain form, the emulation, whose 8-bit numbers these multiply in 8 bits. What a product
writes is scaled and biased already, in the base's type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.models.quantized import QuantizedConvolution, QuantizedLayer, QuantizedLinear, summed
from densegeo.models.vae import PhaseUpsample
from densegeo.processor import is_x86, saturates_int8

ZERO = 128  # what stands for 0 in activations: oneDNN's are unsigned
PART = 1 << 19  # numbers that are rounded at a time, in float32: they stay in a processor's cache
_onednn: Any = torch.ops.onednn


class Int8Layer(nn.Module):
    """What both have. It keeps no 8-bit weight beside the one that oneDNN has laid out anew.

    packed: what oneDNN made of the weight.
    """

    weight_scale: Tensor
    weight_zeros: Tensor
    input_scale: Tensor
    bias: Tensor

    def __init__(self, layer: QuantizedLayer, packed: Tensor) -> None:
        super().__init__()
        self._packed = packed
        self.register_buffer("weight_scale", layer.weight_scale.float())
        self.register_buffer("weight_zeros", torch.zeros(len(layer.weight), dtype=torch.int32))
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("bias", layer.bias.float())

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Layer:
        """Itself: networks for other image sizes share all weights."""
        return self


class Int8Linear(Int8Layer):
    """x (..., K) -> (..., N) of x's type."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__(linear, _onednn.qlinear_prepack(linear.weight, None))

    def forward(self, x: Tensor) -> Tensor:
        scale = float(self.input_scale)
        rows = rounded(x.flatten(0, -2), torch.full((x.shape[-1],), 1 / scale))
        weight = self._packed, self.weight_scale, self.weight_zeros
        out = _onednn.qlinear_pointwise(rows, scale, ZERO, *weight, self.bias, 1.0, 0, x.dtype, "none", [], "")
        return out.unflatten(0, x.shape[:-1])


class Int8Convolution(Int8Layer):
    """x (N, C, H, W) -> (N, O, h, w) of x's type, a pixel's channels adjacent."""

    input_factor: Tensor | None
    rest_scale: Tensor | None

    def __init__(self, layer: QuantizedConvolution) -> None:
        left, right, top, bottom = layer.pads
        alike = (left, top) == (right, bottom)  # which oneDNN's padding is
        self.stride, self.padding = [*layer.stride], [top, left] if alike else [0, 0]
        self._outside = () if alike else layer.pads
        super().__init__(
            layer, _onednn.qconv_prepack(layer.weight, layer.weight_scale.float(), 1.0, ZERO, *self._shape)
        )
        self.register_buffer("input_factor", layer.input_factor)
        self.register_buffer("rest_scale", layer.rest_scale)

    @property
    def _shape(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation, groups."""
        return self.stride, self.padding, [1, 1], 1

    def forward(self, x: Tensor) -> Tensor:
        return summed(x, self.input_scale, self.rest_scale, self.bias, self._product)

    def _product(self, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        factor = torch.ones(x.shape[1]) if self.input_factor is None else self.input_factor.float().flatten()
        rows = rounded(pixels.flatten(0, -2), factor / scale.float())
        picture = rows.view(pixels.shape).permute(0, 3, 1, 2)
        if self._outside:
            picture = F.pad(picture, self._outside, value=ZERO)
        weight = self._packed, self.weight_scale, self.weight_zeros
        return _onednn.qconv2d_pointwise(
            picture, float(scale), ZERO, *weight, bias, *self._shape, 1.0, 0, x.dtype, "none", [], ""
        )


class Int8Upsample(PhaseUpsample):
    """Phases that are written into one picture, whose pixels keep their channels adjacent."""

    def __init__(self, upsample: PhaseUpsample) -> None:
        nn.Module.__init__(self)
        self.conv = upsample.conv

    @staticmethod
    def interleaved(phases: Tensor) -> Tensor:
        """(N, 4 C, H + 1, W + 1) -> (N, C, 2 H, 2 W)."""
        count, channels, height, width = phases.shape
        shape = count, channels // PhaseUpsample.PHASES, 2 * (height - 1), 2 * (width - 1)
        picture = torch.empty(shape, dtype=phases.dtype, memory_format=torch.channels_last)
        for index, phase in enumerate(phases.chunk(PhaseUpsample.PHASES, dim=1)):
            row, column = divmod(index, 2)
            picture[:, :, row::2, column::2] = phase[:, :, row : row + height - 1, column : column + width - 1]
        return picture


def rounded(rows: Tensor, factor: Tensor) -> Tensor:
    """rows (M, K) floating, times factor (K,) float32 -> the nearest whole numbers up to +-127, unsigned: 128 is 0.

    In parts, because a float32 copy of a large picture takes longer to write and read than its product does.
    """
    out = torch.empty(rows.shape, dtype=torch.int8)  # to which torch casts faster than to unsigned ones
    count = max(1, PART // rows.shape[1])
    wide = torch.empty(min(count, len(rows)), rows.shape[1])
    for start in range(0, len(rows), count):
        part, target = rows[start : start + count], out[start : start + count]
        target.copy_(torch.mul(part, factor, out=wide[: len(part)]).round_().clamp_(-127, 127))
        target.view(torch.uint8).bitwise_xor_(ZERO)  # adds it
    return out.view(torch.uint8)


def use_int8_products(network: nn.Module) -> int:
    """Put these in the place of a network's quantized layers, where the processor has them; returns how many they are.

    network: on the CPU, with values.
    """
    made: dict[int, nn.Module] = {}
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLayer) and can_multiply(child):
                kind: Any = Int8Linear if isinstance(child, QuantizedLinear) else Int8Convolution
                if id(child) not in made:
                    made[id(child)] = kind(child)
                setattr(module, name, made[id(child)])
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PhaseUpsample) and isinstance(child.conv, Int8Convolution):
                setattr(module, name, Int8Upsample(child))
    return len(made)


def can_multiply(layer: QuantizedLayer) -> bool:
    """Whether oneDNN multiplies this layer's 8-bit numbers exactly here: not where sums would be cut off, see
    `processor.saturates_int8`, unless the weights have 7 bits.
    """
    if layer.weight.dtype != torch.int8 or not is_x86() or not torch.backends.mkldnn.is_available():
        return False
    return not saturates_int8() or int(layer.weight.abs().max()) <= 63
