"""8-bit layers as ONNX operators: Q and DQ around products, in the forms that engine builders and OpenVINO fuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import ir, opset20

from densegeo.models import quantized  # noqa: F401  (registers the operators)

op: Any = opset20  # traced with symbolic values, which its type hints do not know


def _quantized_linear(x: Any, weight: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """An 8-bit linear in the form that TensorRT fuses: Gemm of a quantized input and a stored 8-bit weight."""
    shape = [int(size) for size in x.shape]
    flat = op.Reshape(x, op.Constant(value_ints=[-1, shape[-1]]))
    rounded = in_8_bits(flat, input_scale, weight.dtype)
    out = op.Gemm(rounded, op.DequantizeLinear(weight, weight_scale, axis=0), bias, transB=1)
    return op.Reshape(out, op.Constant(value_ints=[*shape[:-1], int(weight.shape[0])]))


def _quantized_convolution(
    x: Any,
    weight: Any,
    weight_scale: Any,
    input_scale: Any,
    input_factor: Any,
    bias: Any,
    stride: Sequence[int],
    pads: Sequence[int],
) -> Any:
    """An 8-bit convolution in the form that TensorRT and OpenVINO fuse: an activation with one scale, a weight with the
    scale 1; then a scale a row and the bias, in floating point. The factor joins what is before it.

    TensorRT has no 8-bit convolution with a scale a row: as such it would write the picture in float32, for a layer of
    its own to scale. This way its convolution writes the base's type, and what scales reads half as much.
    """
    left, right, top, bottom = pads
    operands = _operands(x, weight, weight_scale, input_scale, input_factor)
    return _by_channel(op.Conv(*operands, strides=[*stride], pads=[top, left, bottom, right]), weight_scale, bias)


def _quantized_upsampling(
    x: Any, kernel: Any, weight_scale: Any, input_scale: Any, input_factor: Any, bias: Any
) -> Any:
    """An 8-bit transposed convolution in the same form, which OpenVINO fuses too."""
    operands = _operands(x, kernel, weight_scale, input_scale, input_factor)
    return _by_channel(op.ConvTranspose(*operands, strides=[2, 2], pads=[1, 1, 1, 1]), weight_scale, bias)


def _operands(x: Any, weight: Any, weight_scale: Any, input_scale: Any, input_factor: Any) -> tuple[Any, Any]:
    """A convolution's two, 8-bit; the weight with the scale 1."""
    if input_factor is not None:
        x = op.Mul(x, input_factor)
    one = op.CastLike(op.Constant(value_float=1.0), weight_scale)
    return in_8_bits(x, input_scale, weight.dtype), op.DequantizeLinear(weight, one)


def _by_channel(product: Any, weight_scale: Any, bias: Any) -> Any:
    """product (N, O, H, W) times the rows' scales (O,), plus the bias (O,) if there is one."""
    by_channel = op.Constant(value_ints=[-1, 1, 1])
    scaled = op.Mul(product, op.Reshape(weight_scale, by_channel))
    return scaled if bias is None else op.Add(scaled, op.Reshape(bias, by_channel))


def in_8_bits(x: Any, scale: Any, dtype: ir.DataType = ir.DataType.FLOAT8E4M3FN) -> Any:
    """Quantized and back: the pair of nodes by which builders know an 8-bit operand."""
    zero = op.Constant(value=ir.tensor(np.zeros((), dtype.numpy())))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.densegeo.quantized_linear.default: _quantized_linear,
    torch.ops.densegeo.quantized_convolution.default: _quantized_convolution,
    torch.ops.densegeo.quantized_upsampling.default: _quantized_upsampling,
}
