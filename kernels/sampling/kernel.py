"""Device functions of bilinear sampling. Coordinates are exact: integers over a common denominator, no rounding."""

import triton
import triton.language as tl

MAX_PRODUCT = 2**30 - 1  # of a source side and a target side, for the integers to fit 32 bits


@triton.jit
def taps(position, source, target):
    """Output indices -> first tap, second tap, weight of the second, of a plain bilinear resize.

    The coordinate (position + 1/2) * source / target - 1/2 is (2 position + 1) * source - target over 2 target.
    """
    numerator = tl.maximum((2 * position + 1) * source - target, 0)
    first = numerator // (2 * target)
    weight = (numerator - first * 2 * target) / (2 * target)
    first = tl.minimum(first, source - 1)
    second = tl.minimum(first + (weight > 0).to(tl.int32), source - 1)
    return first, second, weight


@triton.jit
def corners(x, y, left, top, box_width, box_height, width, height, row_stride, column_stride):
    """Output columns and rows -> offsets of the four pixels that `mix` takes, above before below, and its weights.

    The box (left, top, box_width, box_height) is resized to width x height, plain bilinear.
    """
    x0, x1, right = taps(x, box_width, width)
    y0, y1, down = taps(y, box_height, height)
    column0 = (left + x0)[None, :] * column_stride
    column1 = (left + x1)[None, :] * column_stride
    row0 = (top + y0)[:, None] * row_stride
    row1 = (top + y1)[:, None] * row_stride
    return row0 + column0, row0 + column1, row1 + column0, row1 + column1, right[None, :], down[:, None]


@triton.jit
def mix(above0, above1, below0, below1, right, down):
    """Four neighbours -> what lies between them."""
    above = above0 * (1 - right)
    above += above1 * right
    below = below0 * (1 - right)
    below += below1 * right
    return above * (1 - down) + below * down


@triton.jit
def first_tap(position, source, target):
    """Output indices -> first source index whose antialiasing weight may be positive."""
    numerator = (2 * position + 1) * source - 2 * tl.maximum(source, target) + target
    return tl.maximum(numerator, 0) // (2 * target)


@triton.jit
def tap_weight(tap, position, source, target):
    """Triangle weight of source index `tap` for output index `position`: a whole number, float32, not normalised.

    In units of 1 / (2 target): the triangle's half-width less the distance of the centres. 0 outside the source.
    """
    distance = tl.abs((2 * tap + 1) * target - (2 * position + 1) * source)
    weight = tl.maximum(2 * tl.maximum(source, target) - distance, 0)
    return tl.where(tap < source, weight, 0).to(tl.float32)


@triton.jit
def clamp_unit(value):
    """Clamp to [-1, 1]; NaN stays NaN."""
    return tl.where(value > 1.0, 1.0, tl.where(value < -1.0, -1.0, value))
