"""Anything a caller may hold as an image -> one checked RGB `Frame`. Size is checked before pixels are decoded."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from densegeo.colors import COLORS, Color, ColorRow, color_row
from densegeo.errors import ConfigError, ImageError, ImageFormatError, ImageTooLargeError
from densegeo.extras import install_hint
from densegeo.formats import IMAGES
from densegeo.runtime.levels import Range, check_range, to_unit, warn_of_small_range
from densegeo.runtime.ycbcr import from_ycbcr
from densegeo.size import Size

MIN_SIDE = 16  # pixels: one transformer token covers 16x16
MAX_PIXELS = 100_000_000
# The first frame's brands of files that Pillow reads with a library of an extra (ISO/IEC 23008-12, annex B).
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_FLOAT_SLACK = 1e-3  # rounding that float images may carry beyond [0, 1]; clipped
_PIL_LOAD = threading.Lock()  # Pillow loads lazily: two threads must not load one image object together


@dataclass(frozen=True, eq=False)
class Frame:
    """One image, upright and checked.

    pixels: (H, W, 3) RGB, uint8 in [0, 255] or float32 in [0, 1], or a camera's YCbCr bytes as `color` says; may alias
    the caller's array, never written.
    encoded: True for files, bytes and PIL images, False for arrays (the authors' preprocessing differs).
    color: "rgb", or the layout of YCbCr bytes.
    """

    pixels: NDArray[Any]
    encoded: bool
    color: Color = "rgb"

    @property
    def size(self) -> Size:
        """Upright."""
        ycbcr = COLORS[self.color].ycbcr
        return Size(self.pixels.shape[1], self.pixels.shape[0]) if ycbcr is None else ycbcr.size(self.pixels.shape)

    @property
    def rgb(self) -> NDArray[Any]:
        """(H, W, 3) RGB: the pixels, or float32 in [0, 1] made of YCbCr."""
        ycbcr = COLORS[self.color].ycbcr
        return self.pixels if ycbcr is None else from_ycbcr(self.pixels, ycbcr)


def load_image(
    source: object,
    color: str = "rgb",
    max_pixels: int = MAX_PIXELS,
    value_range: Range | None = None,
    *,
    truncated: bool = False,
) -> Frame:
    """Read `source`: a path, encoded bytes, an open file, a PIL image, an array (numpy, DLPack, `__array__`), or a
    Frame as it is.

    Arrays are HxWx3, HxW or HxWx4 (alpha dropped), uint8 or float in [0, 1], in the channel order `color`
    ("rgb" or "bgr"), or a camera's YCbCr bytes, `color` one of `colors.COLORS`; files and PIL images know their own
    order. EXIF orientation is applied.
    value_range: the values of black and white, of any type of array and of grey files of 16 bits and more (without it
    their white is 65535): (0, 1023) for 10 bits. truncated: take JPEGs that lack their end; what is missing is grey.
    Raises ImageError for anything that is not such an image, ConfigError for another `color`.
    """
    row = color_row(color)
    check_range(value_range)
    read = _Reading(max_pixels, value_range, truncated)
    if isinstance(source, Frame):  # read already
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fspath(source), read)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "image bytes", read)
    if isinstance(source, Image.Image):
        return _from_pil(source, "PIL image", read)
    if callable(getattr(source, "read", None)):
        return _from_file(source, read)
    if row.ycbcr is not None:
        return _from_camera(_as_array(source), row, read)
    return _from_array(_as_array(source), color, read)


class _Reading(NamedTuple):
    """How an image is read, see `load_image`."""

    max_pixels: int
    value_range: Range | None
    truncated: bool


def require_several(images: object) -> None:
    """Raise ImageError for one image, whose characters, rows or lines would be taken as images."""
    is_one_image = isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(
        images, "read"
    )
    if is_one_image or getattr(images, "ndim", 4) < 4 or not isinstance(images, Iterable):
        raise ImageError(
            f"`batch` takes several images, not one {type(images).__name__}: `estimator.batch([image])`, or "
            "`estimator(image)` for one alone."
        )


def device_size(image: Any, color: Color = "rgb") -> Size:
    """Of the image in a uint8 array that may lie on a device; only its shape and type are looked at.

    Raises ImageError.
    """
    ycbcr = color_row(color).ycbcr
    described = getattr(image, "__cuda_array_interface__", None)
    shape: tuple[int, ...] = tuple(described["shape"] if described else getattr(image, "shape", ()))
    kind = described["typestr"] if described else str(getattr(image, "dtype", type(image).__name__))
    right = kind.removeprefix("torch.") in ("uint8", "|u1")
    if not right or (ycbcr is None and (len(shape) != 3 or shape[2] != 3)):
        layout = "" if ycbcr else " of shape (height, width, 3)"
        raise ImageError(f"On a device an image must be uint8{layout}, not {kind} {shape}.")
    size = Size(int(shape[1]), int(shape[0])) if ycbcr is None else ycbcr.size(shape)
    if min(size) < MIN_SIDE:
        raise ImageError(f"The image is {size}; each side must have at least {MIN_SIDE} pixels.")
    return size


def _from_path(path: Any, read: _Reading) -> Frame:
    name = os.fsdecode(path)
    _refuse_text(name)
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise ImageError(f"{name} is an empty file (0 bytes). Check that it was written or copied completely.")
            return _decode(stream, name, read)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory. Give one image file, or use `batch` on its files.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read: {error}.") from error


def _refuse_text(name: str) -> None:
    """Raise ImageError for text that people pass where a path belongs."""
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
        raise ImageError(f"{name[:80]} is an address, and images are not downloaded. Pass the bytes that you download.")
    if name.startswith("data:") or (len(name) > 500 and re.fullmatch(r"[\w+/=\s-]+", name)):
        raise ImageError(
            f"{name[:40]}... looks like an image as base64 text. Pass its bytes: `base64.b64decode(text)`, of "
            "what follows the comma."
        )
    if re.search(r"[*?]", name) and not os.path.exists(name):
        raise ImageError(f"{name} is a pattern. For several images: `estimator.batch(sorted(glob.glob({name!r})))`.")


def _from_bytes(data: bytes, name: str, read: _Reading) -> Frame:
    if not data:
        raise ImageError(f"{name}: there are 0 bytes, so there is no image. Check what produced them.")
    return _decode(io.BytesIO(data), name, read)


def _from_file(source: Any, read: _Reading) -> Frame:
    """What an open file holds from where it stands."""
    name = str(getattr(source, "name", None) or type(source).__name__)
    try:
        data = source.read()
    except Exception as error:  # closed, opened for writing, a broken connection
        raise ImageError(f"{name} cannot be read: {error}.") from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ImageError(f"{name} gives {type(data).__name__} and not bytes: open it with mode 'rb'.")
    if not data:
        raise ImageError(f"{name} has nothing left to read: it is empty, or stands at its end (`seek(0)`).")
    return _from_bytes(bytes(data), name, read)


def _decode(stream: Any, name: str, read: _Reading) -> Frame:
    if read.truncated:
        stream = _with_end(stream)
    image = _open(stream, name)
    with image:
        return _from_pil(image, name, read)


def _with_end(stream: Any) -> Any:
    """A JPEG's bytes with the end that they may lack: without one, decoders wait for the rest."""
    data = stream.read()
    return io.BytesIO(data + _JPEG_END if data.startswith(_JPEG_START) and _JPEG_END not in data[-64:] else data)


def _open(stream: Any, name: str) -> Image.Image:
    # Image.open would apply Pillow's own, process-wide pixel limit before ours can be looked at.
    Image.init()
    prefix = stream.read(16)
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
        _register_heif(name)
    for kind in (row.name for row in IMAGES):
        factory, accept = Image.OPEN.get(kind, (None, None))
        if factory is None:
            continue
        try:
            # a sentence instead of True means: the right format, but Pillow was built without its decoder
            if accept is not None and (not (verdict := accept(prefix)) or isinstance(verdict, str)):
                continue
            stream.seek(0)
            return factory(stream, "")
        except MemoryError:
            raise
        except Exception:  # a plugin that misjudged the prefix raises whatever it likes
            continue
    raise ImageFormatError(
        f"{name} is not an image that can be read: it is damaged, or none of {', '.join(row.name for row in IMAGES)}. "
        "Convert it to PNG or JPEG."
    )


def _register_heif(name: str) -> None:
    """Makes Pillow read HEIC; without the library of the extra, an ImageError that says so."""
    row = next(row for row in IMAGES if row.module)
    try:
        import_module(row.module).register_heif_opener()
    except ImportError:
        raise ImageError(f"{name} is a HEIC image. Install what reads it: {install_hint(row.extra)}.") from None


def _from_pil(image: Image.Image, name: str, read: _Reading) -> Frame:
    _check_size(image.width, image.height, name, read.max_pixels)
    cut = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))  # 16 bits, of which Pillow may keep 8
    try:
        with _PIL_LOAD:
            image.load()
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image
        pixels = _pil_pixels(upright, name, read.value_range, cut=cut)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged data
        raise ImageError(f"{name} is truncated or damaged: {error}. Copy or download it again.") from error
    return Frame(np.ascontiguousarray(pixels), encoded=True)


def _pil_pixels(image: Image.Image, name: str, value_range: Range | None, *, cut: bool) -> NDArray[Any]:
    if image.mode == "F" or image.mode.startswith("I"):  # floats; 16-bit grey, as 32-bit "I" of older Pillow
        return _three(_grey(np.asarray(image), name, value_range))
    if image.mode == "RGBA":
        pixels = np.asarray(image)[..., :3]
    else:  # 1, L, LA, P, PA, CMYK, YCbCr, LAB, HSV
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if not cut:
        return _ranged(pixels, name, value_range)
    if value_range is not None:
        raise ImageError(
            f"{name} has 16 bits a colour, of which Pillow reads 8, so value_range cannot be kept to. Read it with "
            "another library (`cv2.imread(path, cv2.IMREAD_UNCHANGED)`) and pass the array with value_range."
        )
    warn_of_small_range(pixels.astype(np.uint16) << 8, 65535)
    return pixels


def _grey(values: NDArray[Any], name: str, value_range: Range | None) -> NDArray[np.float32]:
    """Integers or floats of one channel in [0, 1]."""
    if value_range is not None:
        return to_unit(values, value_range, name)
    if values.dtype.kind == "f":
        return _checked_float(values, name)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} holds integers outside 0..65535. Say what black and white are: value_range=(0, white)."
        )
    warn_of_small_range(values, 65535)
    return (values.astype(np.float64) / 65535.0).astype(np.float32)


def _ranged(pixels: NDArray[Any], name: str, value_range: Range | None) -> NDArray[Any]:
    """uint8 as it is, or in its range."""
    if value_range is not None:
        return to_unit(pixels, value_range, name)
    warn_of_small_range(pixels, 255)
    return pixels


def _as_array(source: object) -> NDArray[Any]:
    if isinstance(source, np.ndarray):
        return source
    problems = []
    if hasattr(source, "__dlpack__"):
        try:
            return np.from_dlpack(source)
        except Exception as error:  # the producer's own exception types
            problems.append(str(error))
    if hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        try:
            return np.asarray(source)
        except Exception as error:
            problems.append(str(error))
    if problems:
        raise ImageError(
            f"This {type(source).__name__} could not be viewed as a numpy array ({'; '.join(problems)}). "
            "Move it to the CPU and detach it first, for example `tensor.detach().cpu()`, as uint8 or float32."
        )
    hint = ""
    if isinstance(source, (list, tuple)):
        hint = (
            " For several images use `estimator.batch(images)`; of a list of numbers make an array: `np.uint8(rows)`."
        )
    elif source is None:
        hint = " `cv2.imread` gives None for a file that is not there or that it cannot read."
    raise ImageError(
        f"An image cannot be read from {type(source).__name__}: give a path, bytes, an open file, a PIL image or an "
        f"array.{hint}"
    )


def _from_array(array: NDArray[Any], color: str, read: _Reading) -> Frame:
    shape = tuple(array.shape)
    if array.ndim == 4:
        raise ImageError(f"The array has shape {shape}, a batch. Pass one image at a time, or use `estimator.batch`.")
    if array.ndim not in (2, 3):
        raise ImageError(f"The array has shape {shape}; an image is HxWx3, HxWx4 or HxW.")
    if array.ndim == 3 and shape[2] not in (1, 3, 4):
        if shape[0] in (1, 3, 4):
            raise ImageError(f"The array has shape {shape}, channels first. Transpose it: `image.transpose(1, 2, 0)`.")
        raise ImageError(f"The array has shape {shape} with {shape[2]} channels; an image has 1, 3 or 4 (HxWx3).")
    _check_size(shape[1], shape[0], "The array", read.max_pixels)
    if array.dtype == np.uint8:
        array = _ranged(array, "The array", read.value_range)
    elif read.value_range is not None:
        array = to_unit(array, read.value_range, "The array")
    else:
        array = _checked_float(array, "The array")
    if array.ndim == 2 or shape[2] == 1:
        pixels = _three(array.reshape(shape[:2]))
    else:
        pixels = array[..., 2::-1] if color == "bgr" else array[..., :3]
    return Frame(np.ascontiguousarray(pixels), encoded=False)


def _from_camera(array: NDArray[Any], row: ColorRow, read: _Reading) -> Frame:
    """YCbCr as it lies; whoever needs RGB converts it."""
    assert row.ycbcr is not None
    if read.value_range is not None:
        raise ConfigError(f"{row.name} says itself what black and white are: give no value_range with it.")
    if array.dtype != np.uint8:
        raise ImageError(f"{row.name} is uint8, and the array is {array.dtype}. Give the camera's bytes as they are.")
    _check_size(*row.ycbcr.size(array.shape), "The array", read.max_pixels)
    return Frame(np.ascontiguousarray(array), encoded=False, color=row.name)


def _three(grey: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(grey[..., None], 3, axis=2)


def _checked_float(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    if array.dtype == np.uint16:
        raise ImageError(
            f"{name} is uint16. Say what its white is: value_range=(0, 65535), or (0, 4095) for an image of 12 bits."
        )
    if array.dtype.kind != "f":
        raise ImageError(f"{name} has dtype {array.dtype}; use uint8 in [0, 255] or float32 in [0, 1].")
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN and infinity both surface in the extremes
        raise ImageError(f"{name} contains NaN or infinite pixels. Replace them, for example with `np.nan_to_num`.")
    if low < -_FLOAT_SLACK or high > 1 + _FLOAT_SLACK:
        hint = "Divide it by 255." if low >= 0 and high <= 255.5 else "Scale it to [0, 1] first."
        raise ImageError(f"{name} is {array.dtype} with values in [{low:.4g}, {high:.4g}], outside [0, 1]. {hint}")
    warn_of_small_range(array, 1.0)
    clipped: NDArray[np.float32] = np.clip(array, 0.0, 1.0).astype(np.float32, copy=False)
    return clipped


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name} is {width}x{height} = {width * height / 1e6:.0f} million pixels, more than the limit of "
            f"{max_pixels / 1e6:g} million. Downscale it, or raise max_pixels if you trust it."
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{name} is {width}x{height}; both sides must be at least {MIN_SIDE} pixels (one token covers 16x16)."
        )
