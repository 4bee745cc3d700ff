"""Anything a caller may hold as an image -> one checked RGB `Frame`. Size is checked before pixels are decoded."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from densegeo.errors import ConfigError, ImageError, ImageFormatError, ImageTooLargeError
from densegeo.formats import IMAGES
from densegeo.size import Size

Color = Literal["rgb", "bgr"]

MIN_SIDE = 16  # pixels: one transformer token covers 16x16
MAX_PIXELS = 100_000_000
# The first frame's brands of files that Pillow reads with a library of an extra (ISO/IEC 23008-12, annex B).
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_FLOAT_SLACK = 1e-3  # rounding that float images may carry beyond [0, 1]; clipped
_PIL_LOAD = threading.Lock()  # Pillow loads lazily: two threads must not load one image object together


@dataclass(frozen=True, eq=False)
class Frame:
    """One image, upright and checked.

    pixels: (H, W, 3) RGB, uint8 in [0, 255] or float32 in [0, 1]; may alias the caller's array, never written.
    encoded: True for files, bytes and PIL images, False for arrays (the authors' preprocessing differs).
    """

    pixels: NDArray[Any]
    encoded: bool

    @property
    def size(self) -> Size:
        """Upright."""
        return Size(self.pixels.shape[1], self.pixels.shape[0])


def load_image(source: object, color: str = "rgb", max_pixels: int = MAX_PIXELS) -> Frame:
    """Read `source`: a path, encoded bytes, a PIL image, an array (numpy, DLPack, `__array__`), or a Frame as it is.

    Arrays are HxWx3, HxW or HxWx4 (alpha dropped), uint8 or float in [0, 1], in the channel order `color`
    ("rgb" or "bgr"); files and PIL images know their own order. EXIF orientation is applied.
    Raises ImageError for anything that is not such an image, ConfigError for another `color`.
    """
    check_color(color)
    if isinstance(source, Frame):  # read already
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fspath(source), max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "image bytes", max_pixels)
    if isinstance(source, Image.Image):
        return _from_pil(source, "PIL image", max_pixels)
    return _from_array(_as_array(source), color, max_pixels)


def check_color(color: str) -> None:
    """Raises ConfigError for anything but the two channel orders."""
    if color not in ("rgb", "bgr"):
        raise ConfigError(f'color must be "rgb" or "bgr", not {color!r}.')


def device_size(image: Any) -> Size:
    """Of a uint8 (h, w, 3) array that may lie on a device; only its shape and type are looked at.

    Raises ImageError.
    """
    described = getattr(image, "__cuda_array_interface__", None)
    shape: tuple[int, ...] = tuple(described["shape"] if described else getattr(image, "shape", ()))
    kind = described["typestr"] if described else str(getattr(image, "dtype", type(image).__name__))
    if kind.removeprefix("torch.") not in ("uint8", "|u1") or len(shape) != 3 or shape[2] != 3:
        raise ImageError(f"On a device an image must be uint8 of shape (height, width, 3), not {kind} {shape}.")
    if min(shape[:2]) < MIN_SIDE:
        raise ImageError(f"The image is {shape[1]}x{shape[0]}; each side must have at least {MIN_SIDE} pixels.")
    return Size(int(shape[1]), int(shape[0]))


def _from_path(path: Any, max_pixels: int) -> Frame:
    name = os.fsdecode(path)
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise ImageError(f"{name} is an empty file (0 bytes). Check that it was written or copied completely.")
            return _decode(stream, name, max_pixels)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory. Give one image file, or use `batch` on its files.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read: {error}.") from error


def _from_bytes(data: bytes, name: str, max_pixels: int) -> Frame:
    if not data:
        raise ImageError(f"{name}: there are 0 bytes, so there is no image. Check what produced them.")
    return _decode(io.BytesIO(data), name, max_pixels)


def _decode(stream: Any, name: str, max_pixels: int) -> Frame:
    image = _open(stream, name)
    with image:
        return _from_pil(image, name, max_pixels)


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
        raise ImageError(
            f'{name} is a HEIC image. Install what reads it: pip install "densegeo[{row.extra}]".'
        ) from None


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> Frame:
    _check_size(image.width, image.height, name, max_pixels)
    try:
        with _PIL_LOAD:
            image.load()
        pixels = _pil_pixels(ImageOps.exif_transpose(image), name)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged data
        raise ImageError(f"{name} is truncated or damaged: {error}. Copy or download it again.") from error
    return Frame(np.ascontiguousarray(pixels), encoded=True)


def _pil_pixels(image: Image.Image, name: str) -> NDArray[Any]:
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode == "RGBA":
        return np.asarray(image)[..., :3]
    if image.mode.startswith("I"):  # 16-bit grey; older Pillow opens such PNGs as 32-bit "I"
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"{name} holds integers outside 0..65535. Scale it to 8 bits a channel first.")
        return _three((grey / 65535.0).astype(np.float32))
    if image.mode == "F":
        return _three(_checked_float(np.asarray(image), name))
    return np.asarray(image.convert("RGB"))  # 1, L, LA, P, PA, CMYK, YCbCr, LAB, HSV


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
    hint = " For several images use `estimator.batch(images)`." if isinstance(source, (list, tuple)) else ""
    raise ImageError(
        f"An image cannot be read from {type(source).__name__}: give a path, bytes, a PIL image or an array.{hint}"
    )


def _from_array(array: NDArray[Any], color: str, max_pixels: int) -> Frame:
    shape = tuple(array.shape)
    if array.ndim == 4:
        raise ImageError(f"The array has shape {shape}, a batch. Pass one image at a time, or use `estimator.batch`.")
    if array.ndim not in (2, 3):
        raise ImageError(f"The array has shape {shape}; an image is HxWx3, HxWx4 or HxW.")
    if array.ndim == 3 and shape[2] not in (1, 3, 4):
        if shape[0] in (1, 3, 4):
            raise ImageError(f"The array has shape {shape}, channels first. Transpose it: `image.transpose(1, 2, 0)`.")
        raise ImageError(f"The array has shape {shape} with {shape[2]} channels; an image has 1, 3 or 4 (HxWx3).")
    _check_size(shape[1], shape[0], "The array", max_pixels)
    if array.dtype != np.uint8:
        array = _checked_float(array, "The array")
    if array.ndim == 2 or shape[2] == 1:
        pixels = _three(array.reshape(shape[:2]))
    else:
        pixels = array[..., 2::-1] if color == "bgr" else array[..., :3]
    return Frame(np.ascontiguousarray(pixels), encoded=False)


def _three(grey: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(grey[..., None], 3, axis=2)


def _checked_float(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    if array.dtype == np.uint16:
        raise ImageError(f"{name} is uint16. Convert it to float: `image.astype(np.float32) / 65535` (or your range).")
    if array.dtype.kind != "f":
        raise ImageError(f"{name} has dtype {array.dtype}; use uint8 in [0, 255] or float32 in [0, 1].")
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN and infinity both surface in the extremes
        raise ImageError(f"{name} contains NaN or infinite pixels. Replace them, for example with `np.nan_to_num`.")
    if low < -_FLOAT_SLACK or high > 1 + _FLOAT_SLACK:
        hint = "Divide it by 255." if low >= 0 and high <= 255.5 else "Scale it to [0, 1] first."
        raise ImageError(f"{name} is {array.dtype} with values in [{low:.4g}, {high:.4g}], outside [0, 1]. {hint}")
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
