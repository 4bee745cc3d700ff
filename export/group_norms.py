"""Group norms in graphs that CPUs run: aten.group_norm as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import ir, opset20

from densegeo.backends import Norms

op: Any = opset20  # traced with symbolic values, which its type hints do not know


def in_rows(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Sums of rows first and of their results then: ONNX Runtime's InstanceNormalization sums millions of pixels one by
    one, and at 512x512 that alone is off by 1e-5.
    """
    batch, channels, height, width = (int(size) for size in x.shape)
    each = channels // groups
    last, rows = (op.Constant(value_ints=[axis]) for axis in (3, 2))
    split = op.Reshape(x, op.Constant(value_ints=[batch, groups, each * height, width]))
    centred = op.Sub(split, op.ReduceMean(op.ReduceMean(split, last), rows))
    variance = op.Div(
        op.ReduceSum(op.ReduceSumSquare(centred, last), rows), op.Constant(value_float=float(each * height * width))
    )
    deviation = op.Sqrt(op.Add(variance, op.Constant(value_float=eps)))  # (batch, groups, 1, 1)
    affine = op.Constant(value_ints=[1, groups, each, 1])
    scale = op.Div(op.Reshape(weight, affine), deviation)
    pixels = op.Reshape(centred, op.Constant(value_ints=[batch, groups, each, height * width]))
    normed = op.Add(op.Mul(pixels, scale), op.Reshape(bias, affine))
    return op.Reshape(normed, op.Constant(value_ints=[batch, channels, height, width]))


def by_channel(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Sums of rows, of channels, of their groups: the picture keeps its shape, as another one would have its layout
    turned around, there and back, where a pixel's channels are adjacent. In float32, whatever x is in.
    """
    shape = [int(size) for size in x.shape]
    wide, scale, shift = (op.Cast(value, to=ir.DataType.FLOAT) for value in (x, weight, bias))
    return op.CastLike(_normed_by_channel(shape, groups, wide, scale, shift, eps), x)


def _normed_by_channel(shape: list[int], groups: int, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    batch, channels, height, width = shape
    each = channels // groups
    last, rows = (op.Constant(value_ints=[axis]) for axis in (3, 2))
    grouped, single = ([batch, groups, each, 1], [batch, channels, 1, 1])

    def of_groups(reduce: Callable[[Any, Any], Any], of_channels: Any) -> Any:
        """(batch, channels, 1, 1) -> the same, where each channel has what its group has."""
        of_group = reduce(op.Reshape(of_channels, op.Constant(value_ints=grouped)), rows)
        return op.Reshape(op.Expand(of_group, op.Constant(value_ints=grouped)), op.Constant(value_ints=single))

    centred = op.Sub(x, of_groups(op.ReduceMean, op.ReduceMean(op.ReduceMean(x, last), rows)))
    squares = of_groups(op.ReduceSum, op.ReduceSum(op.ReduceSumSquare(centred, last), rows))
    variance = op.Div(squares, op.Constant(value_float=float(each * height * width)))
    deviation = op.Sqrt(op.Add(variance, op.Constant(value_float=eps)))
    affine = op.Constant(value_ints=[1, channels, 1, 1])
    return op.Add(op.Mul(centred, op.Div(op.Reshape(weight, affine), deviation)), op.Reshape(bias, affine))


def translation(*, exact: bool, norms: Norms) -> Callable[..., Any] | None:
    """How aten.group_norm is written; None: as the one operator that engine builders know.

    exact: float32 is to lose nothing on a CPU. norms: by "channels" for convolutions that have a pixel's channels
    adjacent.
    """
    if norms == "channels":
        return by_channel
    return in_rows if exact else None
