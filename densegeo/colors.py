"""How the bytes of an image lie, one row each: RGB, BGR, and the YCbCr layouts that cameras give.

Imports neither numpy nor torch: the runtime, the kernels and the command line ask these rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from densegeo.errors import ConfigError, ImageError
from densegeo.size import Size

# Without a suffix BT.601 in video range, which V4L2 cameras give unless they say otherwise.
Color = Literal[
    "rgb", "bgr",
    "nv12", "nv12-full", "nv12-bt709", "nv12-bt709-full",
    "yuyv", "yuyv-full", "yuyv-bt709", "yuyv-bt709-full",
    "uyvy", "uyvy-full", "uyvy-bt709", "uyvy-bt709-full",
]  # fmt: skip
Layout = Literal["nv12", "yuyv", "uyvy"]


@dataclass(frozen=True)
class Conversion:
    """YCbCr -> RGB, all in [0, 255]: with y = gain * (Y - black), u = Cb - 128 and v = Cr - 128,
    R = y + red_v * v, G = y + green_u * u + green_v * v, B = y + blue_u * u, each clipped (ITU-R BT.601 and BT.709).
    """

    black: float
    gain: float
    red_v: float
    green_u: float
    green_v: float
    blue_u: float


@dataclass(frozen=True)
class Ycbcr:
    """One of the layouts, uint8. Neighbours share a chroma sample, which is repeated and not interpolated.

    nv12: (3 h / 2, w), h rows of luma, then h / 2 rows of Cb, Cr pairs, each for 2x2 pixels.
    yuyv, uyvy: (h, w, 2), of two neighbours the bytes Y Cb Y Cr or Cb Y Cr Y.
    """

    layout: Layout
    conversion: Conversion

    @property
    def rows_shared(self) -> int:
        """How many rows of pixels a row of chroma is for."""
        return 2 if self.layout == "nv12" else 1

    @property
    def luma(self) -> int:
        """The first luma byte's place."""
        return 1 if self.layout == "uyvy" else 0

    def chroma(self, rows: int, row_stride: int) -> int:
        """The place of the first Cb, for the image's height in pixels; Cr is one pixel stride after it."""
        return {"nv12": rows * row_stride, "yuyv": 1, "uyvy": 0}[self.layout]

    def size(self, shape: Sequence[int]) -> Size:
        """Of the image in an array of this shape. Raises ImageError for a shape that is none."""
        if self.layout == "nv12":
            if len(shape) != 2 or shape[0] % 3 or shape[1] % 2:
                raise ImageError(
                    f"nv12 is an array of shape (3 * height / 2, width), both sides of the image even, not {(*shape,)}."
                    " Where a camera puts the planes apart, stack them; pad or crop odd sizes."
                )
            return Size(shape[1], shape[0] // 3 * 2)
        if len(shape) != 3 or shape[2] != 2 or shape[1] % 2:
            raise ImageError(
                f"{self.layout} is an array of shape (height, width, 2) with an even width, not {(*shape,)}. "
                "Reshape flat bytes; crop an odd width."
            )
        return Size(shape[1], shape[0])


@dataclass(frozen=True)
class ColorRow:
    """name: as callers give it. red: of packed pixels the byte of the red channel. ycbcr: None for packed pixels."""

    name: Color
    red: int = 0
    ycbcr: Ycbcr | None = None


def _conversion(red: float, blue: float, full: bool) -> Conversion:
    """red, blue: what they count for in luma."""
    green, chroma = 1 - red - blue, 1.0 if full else 255 / 224
    return Conversion(
        black=0.0 if full else 16.0,
        gain=1.0 if full else 255 / 219,
        red_v=2 * (1 - red) * chroma,
        green_u=-2 * (1 - blue) * blue / green * chroma,
        green_v=-2 * (1 - red) * red / green * chroma,
        blue_u=2 * (1 - blue) * chroma,
    )


_LAYOUTS: tuple[Layout, ...] = ("nv12", "yuyv", "uyvy")
_WEIGHTS = {"": (0.299, 0.114), "-bt709": (0.2126, 0.0722)}  # of red and blue in luma; BT.601 has no suffix
_ROWS = [
    ColorRow("rgb"),
    ColorRow("bgr", red=2),
    *(
        ColorRow(
            cast(Color, f"{layout}{matrix}{'-full' if full else ''}"), ycbcr=Ycbcr(layout, _conversion(*weights, full))
        )
        for layout in _LAYOUTS
        for matrix, weights in _WEIGHTS.items()
        for full in (False, True)
    ),
]
COLORS: Mapping[str, ColorRow] = {row.name: row for row in _ROWS}


def color_row(color: Any) -> ColorRow:
    """Raises ConfigError for a name that is not in the table."""
    row = COLORS.get(color) if isinstance(color, str) else None
    if row is None:
        raise ConfigError(f"color must be one of {', '.join(COLORS)}, not {color!r}.")
    return row
