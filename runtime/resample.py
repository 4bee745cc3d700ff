"""Source image -> network input, and network output -> source resolution, with the resampling each step defines.

Two bilinear filters, both with half-pixel centres: `resize_antialiased` (support grows when shrinking; equals
torch's `interpolate(antialias=True)`) for our input, `resize_plain` (2x2 taps always; equals torch's default)
for outputs and for the authors' array inputs. Large images are worked on a few rows at a time, which stay in the
processor's cache: no array of an image's size is made but the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densegeo.errors import BundleError
from densegeo.runtime.bundle import Bucket
from densegeo.runtime.images import Frame
from densegeo.size import Size

Float = NDArray[np.float32]

_CACHED = 1 << 17  # floats that are worked on at a time
_ROWS = 8  # of a shrunk image that are made at a time
# Multiplications of a product that OpenBLAS, numpy's own, leaves to the calling thread (interface/gemm.c): more would
# go to threads that wait for each other busily, and take ten times as long beside other work.
_ALONE = 1 << 18

# largest source -> what it is stretched to: the released evaluation's fixed sizes
AUTHORS_SIZES = (
    (Size(1024, 768), Size(1024, 768)),
    (Size(1280, 960), Size(1216, 352)),
    (Size(6048, 4032), Size(864, 576)),
)


@dataclass(frozen=True)
class Placement:
    """Where the source lies in a bucket: the box (left, top, width, height) in bucket pixels, and the source's size."""

    box: tuple[int, int, int, int]
    source: Size

    def unscaled(self) -> Placement:
        """The same box, of a source as large as it."""
        return Placement(self.box, Size(*self.box[2:]))


def resize_antialiased(plane: Float, width: int, height: int) -> Float:
    """Antialiased bilinear resize of one (H, W) float32 plane."""
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))


def resize_plain(plane: Float, width: int, height: int) -> Float:
    """Bilinear resize of one (H, W) float32 plane without antialiasing, edges clamped."""
    if plane.shape == (height, width):
        return plane
    resized = np.empty((height, width), dtype=np.float32)
    for rows, strip in plain_strips(plane[None], width, height):
        resized[rows] = strip[0]
    return resized


def plain_strips(planes: Float, width: int, height: int) -> Iterator[tuple[slice, Float]]:
    """`resize_plain` of planes (C, H, W), some rows at a time: (rows of the result, (C, rows, width)). A strip may be
    overwritten by its taker.
    """
    left, right, across = _taps(planes.shape[2], width)
    wide = planes[:, :, left]
    wide += (planes[:, :, right] - wide) * across
    top, bottom, down = _taps(planes.shape[1], height)
    step = max(1, _CACHED // (len(planes) * width))
    for first in range(0, height, step):
        rows = slice(first, min(first + step, height))
        strip, below = wide[:, top[rows]], wide[:, bottom[rows]]
        below -= strip
        below *= down[rows, None]
        strip += below
        yield rows, strip


def _taps(size: int, target_size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Float]:
    """Of each pixel of the result the two that it lies between, and how far it is from the first."""
    place = np.clip((np.arange(target_size) + 0.5) * (size / target_size) - 0.5, 0, size - 1)
    first = np.minimum(place.astype(np.intp), max(0, size - 2))
    return first, np.minimum(first + 1, size - 1), (place - first).astype(np.float32)


def shrink_rows(pixels: NDArray[Any], height: int) -> Float:
    """(H, W, 3) in [0, 255] or [0, 1] -> (height, W, 3) float32 in [0, 1], antialiased bilinear as Pillow's, for a
    height below H: products with the few rows that each row of the result is made of.
    """
    size, width, channels = pixels.shape
    scale = size / height
    unit = np.float32(255.0 if pixels.dtype == np.uint8 else 1.0)
    shrunk = np.empty((height, width * channels), dtype=np.float32)
    source = pixels.reshape(size, -1)
    for first in range(0, height, _ROWS):
        centres = (np.arange(first, min(first + _ROWS, height)) + 0.5) * scale
        low, high = max(0, int(centres[0] - scale + 0.5)), min(size, int(centres[-1] + scale + 0.5))
        weights = np.maximum(0, 1 - np.abs(np.arange(low, high) + 0.5 - centres[:, None]) / scale)
        weights /= weights.sum(axis=1, keepdims=True) * unit
        taps, rows = weights.astype(np.float32), shrunk[first : first + _ROWS]
        step = max(64, _ALONE // taps.size)
        for column in range(0, width * channels, step):
            columns = slice(column, column + step)
            np.matmul(taps, source[low:high, columns].astype(np.float32), out=rows[:, columns])
    return shrunk.reshape(height, width, channels)


def resize_rgb(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8, antialiased bilinear; the same array where the size is right already."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def whole(size: Size, source: Size | None = None) -> Placement:
    """A source, by default of the bucket's own size, that fills the bucket."""
    return Placement((0, 0, *size), source or size)


def choose_bucket(buckets: Sequence[Bucket], image: Size) -> Bucket:
    """The bucket for one image, see `nearest`."""
    by_size = {bucket.size: bucket for bucket in single(buckets)}
    return by_size[nearest([*by_size], image)]


def single(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Those for one image: one of every size."""
    return [bucket for bucket in buckets if bucket.batch == 1]


def nearest(sizes: Sequence[Size], image: Size) -> Size:
    """The one of the nearest aspect ratio to an image's, by |ln ratio|.

    Of equal ones the largest that does not upscale the source (neither side exceeds it), else the smallest.
    """

    def distance(size: Size) -> float:
        return abs(math.log(size.width / size.height) - math.log(image.width / image.height))

    least = min(map(distance, sizes))
    ties = sorted((size for size in sizes if distance(size) <= least + 1e-9), key=lambda size: size.pixels)
    fitting = [size for size in ties if size.width <= image.width and size.height <= image.height]
    return fitting[-1] if fitting else ties[0]


def in_batches(buckets: Sequence[Bucket], bucket: Bucket, count: int) -> Iterator[tuple[Bucket, slice]]:
    """How `count` images of a bucket's size are run: each time the largest batch that those left fill, and which."""
    same = [other for other in buckets if other.size == bucket.size]
    start = 0
    while start < count:
        largest = max((b for b in same if b.batch <= count - start), key=lambda b: b.batch)
        yield largest, slice(start, start + largest.batch)
        start += largest.batch


def authors_bucket(buckets: Sequence[Bucket], image: Size) -> Bucket:
    """The bucket of exactly the authors' size for this source; BundleError when the bundle lacks it."""
    target = authors_size(image)
    for bucket in single(buckets):
        if bucket.size == target:
            return bucket
    have = ", ".join(str(bucket.size) for bucket in single(buckets))
    wrong = [side for side in target if side % 16]
    hint = "Downscale the image first" if wrong else f"Build the bundle with `--size {target}`"
    raise BundleError(
        f"The authors' preprocessing runs a {image} image at {target}, and this bundle has only {have}. "
        f'{hint}, or use preprocessing="densegeo".'
    )


def authors_size(image: Size) -> Size:
    """What the released evaluation stretches an image to; beyond its table the size is kept."""
    for limits, size in AUTHORS_SIZES:
        if image.width <= limits.width and image.height <= limits.height:
            return size
    return image


def place(bucket: Size, image: Size, fit: str) -> Placement:
    """Where an image goes: fit "stretch" fills the bucket; "pad" keeps the aspect ratio and centres."""
    inner = bucket
    if fit == "pad":
        scale = min(bucket.width / image.width, bucket.height / image.height)
        sides = (min(limit, max(1, round(side * scale))) for limit, side in zip(bucket, image, strict=True))
        inner = Size(*sides)
    left, top = (bucket.width - inner.width) // 2, (bucket.height - inner.height) // 2
    return Placement((left, top, *inner), image)


def prepare(frame: Frame, bucket: Size, placement: Placement) -> Float:
    """Our preprocessing: antialiased bilinear into the placement's box -> rgb (1, 3, H, W) float32 in [-1, 1].

    Outside the box the edge pixels repeat.
    """
    left, top, width, height = placement.box
    source = frame.rgb
    pixels = shrink_rows(source, height) if len(source) > height else _unit_float(source)
    rgb = _planes(pixels, lambda plane: resize_antialiased(plane, width, height))
    if (width, height) != bucket:
        right, bottom = bucket.width - width - left, bucket.height - height - top
        rgb = np.pad(rgb, ((0, 0), (top, bottom), (left, right)), mode="edge")
    return _network_range(rgb)


def prepare_authors(frame: Frame, bucket: Size) -> Float:
    """The released evaluation's preprocessing -> rgb (1, 3, H, W) float32 in [-1, 1], always stretched.

    Files and PIL images: Pillow's bicubic on uint8. Arrays: bilinear without antialiasing, clamped to [0, 1].
    """
    width, height = bucket
    if frame.encoded and frame.pixels.dtype == np.uint8:
        resized = Image.fromarray(frame.pixels).resize(bucket, Image.Resampling.BICUBIC)
        rgb = _planes(_unit_float(np.asarray(resized)), lambda plane: plane)
    elif frame.encoded:  # 16-bit and float files
        rgb = _planes(frame.pixels, lambda plane: _bicubic(plane, width, height))
    else:
        rgb = _planes(_unit_float(frame.rgb), lambda plane: resize_plain(plane, width, height))
    return _network_range(np.clip(rgb, 0.0, 1.0))


def restore(plane: Float, placement: Placement) -> Float:
    """One (H, W) output plane of a bucket -> the source's (height, width): crop the box, plain bilinear."""
    return resize_plain(cropped(plane, placement), *placement.source)


def cropped(picture: Float, placement: Placement) -> Float:
    """Of a picture (..., H, W) of a bucket, what lies in the placement's box."""
    left, top, width, height = placement.box
    return picture[..., top : top + height, left : left + width]


def inside(box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """A box cut to a picture, which is smaller than its bucket where that is no multiple of 8."""
    left, top, box_width, box_height = box
    return left, top, min(box_width, width - left), min(box_height, height - top)


def _bicubic(plane: Float, width: int, height: int) -> Float:
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC))


def _unit_float(pixels: NDArray[Any]) -> Float:
    return pixels.astype(np.float32) / np.float32(255.0) if pixels.dtype == np.uint8 else pixels


def _planes(pixels: Float, change: Callable[[Float], Float]) -> Float:
    # (H, W, 3) -> (3, H', W')
    return np.stack([change(np.ascontiguousarray(pixels[..., channel])) for channel in range(3)])


def _network_range(rgb: Float) -> Float:
    rgb *= np.float32(2.0)
    rgb -= np.float32(1.0)
    return rgb[None]
