"""sensor_msgs/Image and CompressedImage -> what an estimator takes, without a copy where the layout allows it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL.ExifTags import Base

from densegeo.colors import COLORS, Color, color_row
from densegeo.errors import ConfigError, ImageError
from densegeo.ros.bayer import demosaic
from densegeo.size import Size

# sensor_msgs/image_encodings.hpp, and "nv12" as Isaac ROS' nodes call it


@dataclass(frozen=True)
class Encoding:
    """channels: samples of a pixel in a row. bits: of a sample. color: as estimators call the layout. bayer: colours of
    the first 2x2 pixels, or "".
    """

    channels: int
    bits: int = 8
    color: Color = "rgb"
    bayer: str = ""


def _encodings() -> dict[str, Encoding]:
    encodings: dict[str, Encoding] = {}
    for bits in (8, 16):
        encodings |= {
            f"rgb{bits}": Encoding(3, bits),
            f"bgr{bits}": Encoding(3, bits, "bgr"),
            f"rgba{bits}": Encoding(4, bits),
            f"bgra{bits}": Encoding(4, bits, "bgr"),
            f"mono{bits}": Encoding(1, bits),
        }
        encodings |= {f"bayer_{p}{bits}": Encoding(1, bits, bayer=p) for p in ("rggb", "bggr", "gbrg", "grbg")}
    yuyv, uyvy = Encoding(2, color="yuyv"), Encoding(2, color="uyvy")
    # as cv_bridge reads them
    encodings |= {"8UC1": encodings["mono8"], "8UC3": encodings["bgr8"], "16UC1": encodings["mono16"]}
    return encodings | {
        "nv12": Encoding(1, color="nv12"),
        "yuyv": yuyv,
        "yuv422_yuy2": yuyv,
        "uyvy": uyvy,
        "yuv422": uyvy,
    }


ENCODINGS: Mapping[str, Encoding] = _encodings()


class Picture(NamedTuple):
    """What `Estimator.stream(...).put` takes, and the `color` it takes it with."""

    image: NDArray[Any] | bytes
    color: Color

    @property
    def size(self) -> Size | None:
        """Of the upright picture; None where its bytes do not tell."""
        if not isinstance(self.image, bytes):
            ycbcr = color_row(self.color).ycbcr
            return Size(*self.image.shape[1::-1]) if ycbcr is None else ycbcr.size(self.image.shape)
        try:
            with Pillow.open(io.BytesIO(self.image)) as opened:
                sideways = opened.getexif().get(Base.Orientation, 1) > 4
                return Size(*(opened.size[::-1] if sideways else opened.size))
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError):
            return None


# Of YCbCr: what follows the layout in the names of `densegeo.colors`.
CONVERSIONS = tuple(name.removeprefix("nv12").removeprefix("-") for name in COLORS if name.startswith("nv12"))


def check_conversion(ycbcr: str) -> None:
    """Raises ConfigError for what `read_image` does not take."""
    if ycbcr not in CONVERSIONS:
        raise ConfigError(f'ycbcr must be "", "bt709", "full" or "bt709-full", not {ycbcr!r}.')


def read_image(message: Any, ycbcr: str = "") -> Picture:
    """A sensor_msgs/Image: a view of its bytes, which must then not be overwritten; a copy for bayer patterns and for
    16 bits, which become RGB uint8 and float32 in [0, 1].

    ycbcr: how YCbCr becomes RGB: "" (BT.601, video range), "bt709", "full" or "bt709-full"; a message does not say.
    Raises ImageError for an encoding that is no picture and for data that does not fit the message's own numbers.
    """
    name = str(message.encoding)
    encoding = _encoding(name)
    pixels = _rows(message, encoding, name)
    if encoding.color.startswith(("nv12", "yuyv", "uyvy")):
        check_conversion(ycbcr)
        color = f"{encoding.color}-{ycbcr}" if ycbcr else encoding.color
        return Picture(pixels, color)  # type: ignore[arg-type]
    if encoding.bayer:
        pixels = demosaic(pixels, encoding.bayer)
    if encoding.bits == 16:
        pixels = pixels.astype(np.float32) / np.float32(65535)
    return Picture(pixels, encoding.color)


def check_format(message: Any) -> None:
    """Raises ImageError for an Image or a CompressedImage that holds no picture; depth cameras publish such."""
    if not hasattr(message, "format"):
        _encoding(str(message.encoding))
    elif "compressedDepth" in message.format:
        raise ImageError(f"The format {message.format!r} is a depth image's, not a picture's.")


def _encoding(name: str) -> Encoding:
    if name in ENCODINGS:
        return ENCODINGS[name]
    hint = " It is a depth image, not a picture." if name.endswith(("UC1", "FC1", "SC1")) else ""
    raise ImageError(f"The encoding {name!r} is not one of {', '.join(ENCODINGS)}.{hint}")


def read_compressed(message: Any) -> Picture:
    """A sensor_msgs/CompressedImage: its encoded bytes, which the estimator decodes (JPEG, PNG, and what Pillow reads).

    Raises ImageError for a depth image and for an empty message.
    """
    if "compressedDepth" in str(message.format):
        raise ImageError(f"The format {message.format!r} is a depth image, not a picture.")
    data = memoryview(message.data).tobytes()
    if not data:
        raise ImageError("The compressed image is empty (0 bytes).")
    return Picture(data, "rgb")


def _rows(message: Any, encoding: Encoding, name: str) -> NDArray[Any]:
    """A view (height, width) or (height, width, channels) of the data; nv12: (3 * height / 2, width)."""
    width, height, step = int(message.width), int(message.height), int(message.step)
    item = encoding.bits // 8
    used = width * encoding.channels * item
    if width == 0 or height == 0:
        raise ImageError(f"The image message is {width}x{height}: it holds no pixels.")
    if step < used or step % item:
        raise ImageError(f"The image message says {step} bytes a row; {width} pixels of {name} take {used}.")
    rows = height * 3 // 2 if encoding.color == "nv12" else height
    if encoding.color == "nv12" and (width % 2 or height % 2):
        raise ImageError(f"An nv12 image has even sides, and this one is {width}x{height}.")
    data = np.frombuffer(message.data, np.uint8)
    if data.size < step * (rows - 1) + used:  # the last row may lack its padding
        raise ImageError(f"The image message has {data.size} bytes; {rows} rows of {step} bytes are {rows * step}.")
    kind = np.dtype(f"{'>' if message.is_bigendian else '<'}u{item}")
    shape, strides = [rows, width], [step, encoding.channels * item]
    if encoding.channels > 1:
        shape, strides = [*shape, encoding.channels], [*strides, item]
    view: NDArray[Any] = np.ndarray(shape, kind, data, strides=strides)
    return view
