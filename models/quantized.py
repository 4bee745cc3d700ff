"""Linears and convolutions in 8 bits: E4M3 (fp8) or int8 weights with a scale a row, activations with one scale,
products in float32; and attention in fp8: queries, keys, values and probabilities with one scale each.

`prepare` of a layer is what happens offline to a float32 one; `quantized_linear`, `quantized_convolution` and
`quantized_attention` are what a device computes, and what the exporter turns into Q and DQ around products.
`models.layer_plans` puts these layers into networks.

NVIDIA's ModelOpt quantizes modules of this kind too. It is not used: it works on a model that is whole in memory, while
ours are folded, quantized and written one block at a time, and it does not know which folded norms here can take up a
migrated scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densegeo.precision import PRECISIONS

# Convolutions that keep their precision, as NVIDIA's ModelOpt leaves them in U-Nets: those at the ends, shortcuts, and
# those of fewer channels than an 8-bit product takes at once.
KEPT = ("conv_in", "conv_out", "quant_conv", "post_quant_conv", "nin_shortcut", "conv_shortcut")
FEWEST_CHANNELS = 16


class Format(NamedTuple):
    """An 8-bit type, its largest finite value that is used, and that of weights."""

    dtype: torch.dtype
    qmax: float
    weight_qmax: float


FORMATS = {
    row.name: Format(getattr(torch, row.torch), row.qmax, row.qmax) for row in PRECISIONS.values() if row.calibrated
}
_ATTENTION_ROW = next(row for row in PRECISIONS.values() if row.attention)
ATTENTION = FORMATS[_ATTENTION_ROW.name]  # of its products


def with_weight_bits(kind: Format, bits: int) -> Format:
    """The same format with weights of fewer bits, if it has whole numbers: int8 in 7 ends at 63."""
    return kind if kind.dtype.is_floating_point else kind._replace(weight_qmax=float(2 ** (bits - 1) - 1))


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale, rounded to nearest even, saturated: ONNX's QuantizeLinear with zero point 0."""
    qmax = next(row.qmax for row in FORMATS.values() if row.dtype == dtype)
    steps = x.float() / scale.float()
    if not dtype.is_floating_point:
        steps = steps.round()
    return steps.clamp(-qmax, qmax).to(dtype)


@torch.library.custom_op("densegeo::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) -> (..., N) of x's dtype, or of the bias' if x is 8-bit already, divided by input_scale and rounded.

    weight (N, K) 8 bits; weight_scale (N,) and input_scale () floats; bias (N,). Where the hardware has no such product
    the 8-bit numbers are multiplied as that dtype, bf16 or float32, which hold them exactly.
    """
    rows, dtype = x.flatten(0, -2), _result(x, weight, bias)
    operand = rows if x.dtype == weight.dtype else quantize(rows, input_scale, weight.dtype)
    if _has_product(operand, weight):
        out = _fp8_product(operand, weight, weight_scale.float(), input_scale.float(), bias, dtype)
    else:
        product = F.linear(operand.to(dtype), weight.to(dtype)).float()
        out = (product * (weight_scale.float() * input_scale.float()) + bias.float()).to(dtype)
    return out.unflatten(0, x.shape[:-1])


def _fp8_product(
    operand: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """operand (M, K) and weight (N, K) E4M3 -> (M, N), scaled and biased in the product where torch can.

    On most architectures its product with a scale a row gives bf16 alone, and with a float32 result none takes a bias
    (ATen/native/cuda/ScaledBlas.cpp): both are done afterwards then.
    """
    if dtype == torch.bfloat16:
        scales = input_scale.expand(len(operand), 1).contiguous(), weight_scale[None].contiguous()
        return torch._scaled_mm(operand, weight.t(), *scales, bias=bias.to(dtype), out_dtype=dtype)
    unit_scale = torch.ones((), device=operand.device)
    product = torch._scaled_mm(operand, weight.t(), unit_scale, unit_scale, out_dtype=torch.float32)
    return (product * (weight_scale * input_scale) + bias.float()).to(dtype)


@quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=_result(x, weight, bias))


def _result(x: Tensor, weight: Tensor, bias: Tensor) -> torch.dtype:
    return bias.dtype if x.dtype == weight.dtype else x.dtype


def _has_product(operand: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these on their device: E4M3 from compute capability 8.9 on."""
    if not operand.is_cuda or weight.dtype != ATTENTION.dtype or any(size % 16 for size in weight.shape):
        return False
    return has_fp8(operand.device)


def has_fp8(device: torch.device) -> bool:
    """Whether kernels multiply E4M3 there: from compute capability 8.9 on, and on a CPU, where references stand in."""
    if device.type == "cpu":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= _ATTENTION_ROW.first_architecture


class QuantizedLayer(nn.Module):
    """What a layer with weights becomes. weight (N, ...) 8 bits, weight_scale (N,), input_scale (), bias (N,)."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor

    def __init__(self, shape: Sequence[int], kind: Format, dtype: torch.dtype, device: str | torch.device) -> None:
        """shape: of the weight. dtype: of scales and bias."""
        super().__init__()
        self.register_buffer("weight", torch.empty(*shape, dtype=kind.dtype, device=device))
        self.register_buffer("weight_scale", torch.empty(shape[0], dtype=dtype, device=device))
        self.register_buffer("input_scale", torch.empty((), dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(shape[0], dtype=dtype, device=device))

    def take(self, weight: Tensor, bias: Tensor | None, input_amax: float, kind: Format, phases: int = 1) -> None:
        """Round a layer's float32 values; on the meta device there are none.

        input_amax: the largest magnitude of the input that is kept. phases: how many parts of equal length the rows
        have, of which those at the same place share a scale.
        """
        if weight.is_meta:
            return
        weight = weight.detach().float()
        amax = weight.flatten(1).abs().amax(dim=1).reshape(phases, -1).amax(dim=0).repeat(phases)
        amax = torch.where(amax > 0, amax, kind.weight_qmax)  # a row of zeros: any scale
        self.weight_scale.copy_(amax / kind.weight_qmax)
        self.weight.copy_(quantize(weight, self.weight_scale.reshape(-1, *[1] * (weight.dim() - 1)), kind.dtype))
        self.input_scale.fill_(input_amax / kind.qmax)
        if bias is None:
            self.bias.zero_()
        else:
            self.bias.copy_(bias.detach())


class QuantizedLinear(QuantizedLayer):
    """What a linear becomes. weight (N, K)."""

    @classmethod
    def prepare(cls, linear: nn.Linear, input_amax: float, kind: Format, dtype: torch.dtype) -> QuantizedLinear:
        """input_amax: the largest magnitude of the input that is kept. dtype: of scales and bias."""
        quantized = cls(linear.weight.shape, kind, dtype, linear.weight.device)
        quantized.take(linear.weight, linear.bias, input_amax, kind)
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.weight_scale, self.input_scale, self.bias)


def _rounded_picture(x: Tensor, scale: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (N, C, H, W), times factor (C, 1, 1) if there is one, in 8 bits of this type."""
    return quantize(x if factor is None else x.float() * factor.float(), scale, dtype)


def _scaled_picture(product: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """product (N, O, h, w) of 8-bit numbers -> what it stands for, with the bias (O,), of product's dtype."""
    out = product.float() * (weight_scale.float() * input_scale.float())[:, None, None]
    return (out if bias is None else out + bias.float()[:, None, None]).to(product.dtype)


@torch.library.custom_op("densegeo::quantized_convolution", mutates_args=())
def quantized_convolution(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    input_factor: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
) -> Tensor:
    """x (N, C, H, W) -> (N, O, h, w) of x's dtype; pads: zeros left, right, above and below.

    weight (O, C, kh, kw) 8 bits; weight_scale (O,) and input_scale () floats; input_factor: (C, 1, 1), what x is
    multiplied by first, or None; bias (O,) or None. torch has no such product on its own: the 8-bit numbers are
    multiplied as x's dtype, bf16 or float32, which hold them exactly.
    """
    operand = F.pad(_rounded_picture(x, input_scale, input_factor, weight.dtype), list(pads)).to(x.dtype)
    product = F.conv2d(operand, weight.to(x.dtype), stride=list(stride))
    return _scaled_picture(product, weight_scale, input_scale, bias)


@quantized_convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    input_factor: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
) -> Tensor:
    sides = (
        (x.shape[axis] + sum(around) - weight.shape[axis]) // step + 1
        for axis, step, around in ((2, stride[0], pads[2:]), (3, stride[1], pads[:2]))
    )
    return x.new_empty(x.shape[0], weight.shape[0], *sides)


@torch.library.custom_op("densegeo::quantized_upsampling", mutates_args=())
def quantized_upsampling(
    x: Tensor,
    kernel: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    input_factor: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x (N, C, H, W) -> (N, O, 2 H, 2 W) of x's dtype: a transposed convolution of stride 2.

    kernel (C, O, 4, 4) int8; the others are as `quantized_convolution` has them.
    """
    operand = _rounded_picture(x, input_scale, input_factor, kernel.dtype).to(x.dtype)
    product = F.conv_transpose2d(operand, kernel.to(x.dtype), stride=2, padding=1)
    return _scaled_picture(product, weight_scale, input_scale, bias)


@quantized_upsampling.register_fake
def _(
    x: Tensor,
    kernel: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    input_factor: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], kernel.shape[1], 2 * x.shape[2], 2 * x.shape[3])


class QuantizedConvolution(QuantizedLayer):
    """What a convolution becomes. weight (O, C, kh, kw).

    input_factor: (C, 1, 1), what its input is multiplied by so that its channels are alike, or None: a norm cannot take
    it up, for SiLU lies between. rest_scale: (), of a second product with what rounding left of the input, or None. The
    first one's scale is a power of two then, by which bf16 too divides and multiplies exactly.
    """

    input_factor: Tensor | None
    rest_scale: Tensor | None
    stride: tuple[int, ...]
    pads: tuple[int, ...]  # left, right, top, bottom

    @classmethod
    def prepare(
        cls,
        layer: nn.Conv2d,
        input_amax: float,
        kind: Format,
        dtype: torch.dtype,
        smooth: Tensor | None = None,
        *,
        twice: bool = False,
        phases: int = 1,
    ) -> QuantizedConvolution:
        """input_amax: the largest magnitude of the input that is kept. dtype: of scales and bias.

        smooth: (C,), what the input is divided by, before that range, and the weight's columns are multiplied by.
        twice: in two products, of the rounded input and of the rest; then smooth is None and the format whole numbers.
        phases: 4 of those of an upsampling, which its transposed form makes one kernel with one scale a feature.
        """
        assert not twice or (smooth is None and not kind.dtype.is_floating_point)
        assert (layer.groups, layer.dilation) == (1, (1, 1))
        assert not isinstance(layer.padding, str)
        quantized = cls(layer.weight.shape, kind, dtype, layer.weight.device)
        quantized.register_buffer(
            "input_factor", None if smooth is None else quantized.bias.new_empty(layer.in_channels, 1, 1)
        )
        if smooth is not None and not layer.weight.is_meta:
            assert quantized.input_factor is not None
            quantized.input_factor.copy_(1 / smooth[:, None, None])
            quantized.take(layer.weight / quantized.input_factor.float(), layer.bias, input_amax, kind, phases)
        else:
            quantized.take(layer.weight, layer.bias, input_amax, kind, phases)
        quantized.register_buffer("rest_scale", torch.empty_like(quantized.input_scale) if twice else None)
        if quantized.rest_scale is not None and not layer.weight.is_meta:
            quantized.input_scale.fill_(2.0 ** math.ceil(math.log2(input_amax / kind.qmax)))
            quantized.rest_scale.copy_(quantized.input_scale / (2 * kind.qmax))
        (rows, columns), quantized.stride = layer.padding, layer.stride
        quantized.pads = (int(columns), int(columns), int(rows), int(rows))
        return quantized

    def forward(self, x: Tensor) -> Tensor:
        return summed(x, self.input_scale, self.rest_scale, self.bias, self._product)

    def _product(self, x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight, self.weight_scale
        return quantized_convolution(x, *weight, scale, self.input_factor, bias, self.stride, self.pads)

    def upsampled(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The transposed form of an upsampling's phases: x (N, C, H, W) -> (N, O, 2 H, 2 W).

        kernel (C, O, 4, 4): this one's weight in another order.
        """
        weight_scale, bias = self.weight_scale[: kernel.shape[1]], self.bias[: kernel.shape[1]]

        def product(operand: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
            return quantized_upsampling(operand, kernel, weight_scale, scale, self.input_factor, bias)

        return summed(x, self.input_scale, self.rest_scale, bias, product)


def summed(
    x: Tensor,
    scale: Tensor,
    rest_scale: Tensor | None,
    bias: Tensor,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """A convolution of x by its product, or by two where the rest of the rounding has a scale too.

    product: of an input (N, C, H, W), the input's scale () and the bias, or None -> (N, O, h, w).
    """
    first = product(x, scale, bias)
    if rest_scale is None:
        return first
    return first + product(x - (x / scale).round() * scale, rest_scale, None)


def convolution_fits(name: str, layer: nn.Conv2d) -> bool:
    """Whether a convolution of this name may become 8-bit; see `KEPT`."""
    return name.rpartition(".")[2] not in KEPT and min(layer.in_channels, layer.out_channels) >= FEWEST_CHANNELS


@torch.library.custom_op("densegeo::quantized_attention", mutates_args=())
def quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor
) -> Tensor:
    """`layers.attention` with 8-bit operands: (B, heads, Tq, size), (B, heads, Tk, size) twice -> q's shape and dtype.

    Scales () are of q, k and v; probabilities, which end at 1, have 1 / 448. The 8-bit numbers are multiplied as
    float32 one head at a time, so that not all logits are in memory.
    """
    wide = [_in_8_bits(x, scale) for x, scale in ((q, q_scale), (k, k_scale), (v, v_scale))]
    unit = torch.tensor(1 / ATTENTION.qmax, device=q.device)
    heads = []
    for query, key, value in zip(*(x.unbind(1) for x in wide), strict=True):
        logits = (query * query.shape[-1] ** -0.5) @ key.mT
        if key_bias is not None:
            logits += key_bias[:, 0]
        heads.append(_in_8_bits(logits.softmax(-1), unit) @ value)
    return torch.stack(heads, dim=1).to(q.dtype)


@quantized_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _in_8_bits(x: Tensor, scale: Tensor) -> Tensor:
    """x as fp8 gives it back, in float32."""
    return quantize(x, scale, ATTENTION.dtype).float() * scale.float()


class AttentionPlan(NamedTuple):
    """The largest magnitudes that are kept of an attention's queries, keys and values."""

    q: float
    k: float
    v: float


class QuantizedAttention(nn.Module):
    """What an attention becomes in fp8. q_scale, k_scale, v_scale ()."""

    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor

    def __init__(self, plan: AttentionPlan, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for part, amax in plan._asdict().items():
            scale = torch.full((), amax / ATTENTION.qmax, dtype=dtype, device=device)
            self.register_buffer(f"{part}_scale", scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        out = quantized_attention(q, k, v, key_bias, self.q_scale, self.k_scale, self.v_scale)
        return out.transpose(1, 2).flatten(2)
