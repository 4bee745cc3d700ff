"""Image input: what is accepted means the same however it comes, what is not is refused with a typed error."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from densegeo.errors import ConfigError, ImageError
from densegeo.runtime.images import load_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size it has no pixels for."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


class ArrayOnly:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.array


class DlpackOnly:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_every_source_gives_the_same_pixels(picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    sources = [
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        Image.open(path),
        picture,
        ArrayOnly(picture),
        DlpackOnly(picture),
        np.dstack([picture, picture[..., :1]]),
    ]
    for source in sources:
        frame = load_image(source)
        assert frame.pixels.dtype == np.uint8
        assert frame.size == (96, 72)
        np.testing.assert_array_equal(frame.pixels, picture)


def test_torch_tensors(picture: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(load_image(torch.from_numpy(picture)).pixels, picture)
    with pytest.raises(ImageError, match="detach"):
        load_image(torch.zeros(32, 32, 3, requires_grad=True))


def test_bgr_reverses_arrays_only(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(load_image(picture[..., ::-1], "bgr").pixels, picture)
    bgra = np.dstack([picture[..., ::-1], np.zeros((72, 96), np.uint8)])
    np.testing.assert_array_equal(load_image(bgra, "bgr").pixels, picture)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(picture)), "bgr").pixels, picture)
    with pytest.raises(ConfigError, match="color"):
        load_image(picture, "gbr")


def test_grey_is_replicated(picture: np.ndarray) -> None:
    grey = picture[..., 0]
    for source in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(load_image(source).pixels, np.dstack([grey] * 3))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_become_float32(picture: np.ndarray, dtype: object) -> None:
    frame = load_image((picture / 255).astype(dtype))
    assert frame.pixels.dtype == np.float32
    assert frame.pixels.dtype.isnative
    np.testing.assert_allclose(frame.pixels, picture / 255, atol=1e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, picture: np.ndarray) -> None:
    # the stored array that, viewed with this orientation, is `picture` (EXIF 2.3, tag 0x0112)
    undo = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, 1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(undo[orientation])), exif=exif)
    np.testing.assert_array_equal(load_image(data).pixels, picture)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pillow_modes(mode: str, picture: np.ndarray) -> None:
    image = Image.fromarray(picture).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(load_image(image).pixels, expected)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    grey = np.linspace(0, 65535, 32 * 40).astype(np.uint16).reshape(32, 40)
    frame = load_image(encoded(Image.fromarray(grey)))
    assert frame.pixels.dtype == np.float32
    np.testing.assert_allclose(frame.pixels[..., 1], grey / 65535, atol=1e-6)


def test_missing_and_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a\0b.png")


def test_empty_file_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match="empty"):
        load_image(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match="0 bytes"):
        load_image(b"")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files(kind: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * share)])
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError):
            load_image(source)


def test_text_is_no_image() -> None:
    with pytest.raises(ImageError, match="not an image"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n")


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (12000, 12000)])
def test_decompression_bombs_are_refused_from_the_header(width: int, height: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own bomb warning must not come first
        with pytest.raises(ImageError, match="million pixels"):
            load_image(png_header(width, height))


def test_max_pixels_is_the_callers_choice(picture: np.ndarray) -> None:
    with pytest.raises(ImageError, match="million pixels"):
        load_image(picture, max_pixels=96 * 72 - 1)
    assert load_image(picture, max_pixels=96 * 72).size == (96, 72)
    with pytest.raises(ImageError, match="truncated"):  # a larger limit than Pillow's gets as far as decoding
        load_image(png_header(14000, 14000), max_pixels=200_000_000)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5000), (5000, 3), (15, 64)])
def test_too_small(shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    for source in (pixels, encoded(Image.fromarray(pixels))):
        with pytest.raises(ImageError, match="at least 16"):
            load_image(source)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels(bad: float) -> None:
    pixels = np.full((32, 32, 3), 0.5, np.float32)
    pixels[3, 5, 1] = bad
    with pytest.raises(ImageError, match="NaN or infinite"):
        load_image(pixels)


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.zeros((3, 32, 48), np.uint8), "transpose"),
        (np.zeros((32, 48, 2), np.uint8), "2 channels"),
        (np.zeros((32, 48, 7), np.uint8), "7 channels"),
        (np.zeros((1, 32, 48, 3), np.uint8), "batch"),
        (np.zeros(32, np.uint8), "HxWx3"),
        (np.zeros((0, 48, 3), np.uint8), "at least 16"),
        (np.zeros((32, 48, 3), np.uint16), "65535"),
        (np.zeros((32, 48, 3), np.int32), "uint8"),
        (np.zeros((32, 48, 3), bool), "uint8"),
        (np.zeros((32, 48, 3), np.complex64), "uint8"),
        (np.zeros((32, 48, 3), object), "uint8"),
        (np.full((32, 48, 3), 200.0, np.float32), "Divide it by 255"),
        (np.full((32, 48, 3), -0.5, np.float32), "Scale it"),
    ],
)
def test_unusable_arrays(array: np.ndarray, hint: str) -> None:
    with pytest.raises(ImageError, match=hint):
        load_image(array)


@pytest.mark.parametrize("source", [None, 3.5, [np.zeros((32, 32, 3), np.uint8)], object()])
def test_things_that_are_no_image(source: object) -> None:
    with pytest.raises(ImageError, match="cannot be read from"):
        load_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged headers
@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_give_only_image_errors(data: bytes) -> None:
    for prefix in (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"BM", b"GIF89a"):
        with pytest.raises(ImageError):
            load_image(prefix + data)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        dtype=st.sampled_from([np.uint8, np.uint16, np.float32, np.int8, np.bool_]),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=24),
        fill=st.just(0),
    )
)
def test_arrays_give_a_frame_or_an_image_error(array: np.ndarray) -> None:
    try:
        frame = load_image(array)
    except ImageError:
        return
    assert frame.pixels.shape == (*array.shape[:2], 3)
    assert min(frame.size) >= 16
    assert frame.pixels.dtype in (np.uint8, np.float32)
