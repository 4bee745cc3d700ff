"""Images as cameras and libraries hand them over: bits in larger types, open files, cut JPEGs, and what is no image."""

from __future__ import annotations

import base64
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densegeo.errors import ConfigError, ImageError, ImageWarning
from densegeo.runtime import Estimator
from densegeo.runtime.images import load_image
from tests.support.toy_bundle import make_toy_bundle

pytestmark = pytest.mark.unit
Y, X = np.mgrid[0:48, 0:64]
UNIT = (np.sin(X / 9) + np.cos(Y / 7)) / 4 + 0.5  # [0, 1]


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def of_bits(bits: int) -> np.ndarray:
    return np.round(UNIT * (2**bits - 1)).astype(np.uint16)


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "PNG": png,
    "TIFF": lambda array: png(array, "TIFF"),
    "I": lambda array: Image.fromarray(array.astype(np.int32)),
    "F": lambda array: Image.fromarray(array.astype(np.float32)),
    "uint16": lambda array: array,
    "colour": lambda array: np.repeat(array[..., None], 3, axis=2),
    "int32": lambda array: array.astype(np.int32),
    "float64": lambda array: array.astype(np.float64),
}


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_any_number_of_bits(form: Callable[[np.ndarray], Any], bits: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_image(form(of_bits(bits)), value_range=(0, 2**bits - 1)).pixels
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, np.repeat(UNIT[..., None], 3, axis=2), atol=2.0**-bits)


def test_a_range_that_does_not_begin_at_zero() -> None:
    video = np.round(16 + UNIT * 219).astype(np.uint8)
    pixels = load_image(video, value_range=(16, 235)).pixels
    np.testing.assert_allclose(pixels[..., 0], UNIT, atol=1 / 219)
    video[0, 0], video[0, 1] = 0, 255
    assert load_image(video, value_range=(16, 235)).pixels[0, :2, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (png(of_bits(10)), r"uses 10 of its 16 bits.*value_range=\(0, 1023\)"),
        (png(of_bits(11)), r"uses 11 of its 16 bits.*12 bits, say value_range=\(0, 4095\)"),
        (png(of_bits(14), "TIFF"), r"value_range=\(0, 16383\)"),
        (Image.fromarray(of_bits(8).astype(np.uint8)).convert("I"), r"value_range=\(0, 255\)"),
        (of_bits(4).astype(np.uint8), "has no value above 15 of 255"),
        (Image.fromarray(of_bits(1).astype(np.uint8)), "has no value above 1 of 255"),
        ((of_bits(12) / 65535).astype(np.float32), "has no value above 1/16"),
        (np.float16(of_bits(8) / 255 / 255), "has no value above 1/16"),
    ],
)
def test_a_small_part_of_the_range_is_warned_of(image: Any, said: str) -> None:
    with pytest.warns(ImageWarning, match=said):
        load_image(image)


@pytest.mark.parametrize(
    "image",
    [
        png(of_bits(16)),
        png(np.uint16([[40000]]).repeat(20, 0).repeat(20, 1)),
        np.round(UNIT * 40).astype(np.uint8),  # dark
        np.zeros((20, 20, 3), np.uint8),  # a covered lens
        np.pad(np.zeros((30, 30), np.uint8), ((1, 0), (1, 0)), constant_values=255),
        np.pad(np.uint8([[200]]), ((3, 25), (5, 40))),  # one lamp at night, between what is looked at
        (UNIT / 4).astype(np.float32),
    ],
)  # fmt: skip
def test_what_is_merely_dark_is_not(image: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(image)


@pytest.mark.parametrize("wrong", [(1, 0), (0,), 255, "8 bit", (0, float("nan")), (0, float("inf")), (3, 3)])
def test_a_range_that_is_none(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="value_range must be the values of black and of white"):
        load_image(np.zeros((20, 20), np.uint8), value_range=wrong)


def test_what_a_range_cannot_help() -> None:
    with pytest.raises(ImageError, match="contains NaN"):
        load_image(np.full((20, 20), np.nan), value_range=(0, 1))
    with pytest.raises(ImageError, match="no number that has a range"):
        load_image(np.zeros((20, 20), bool), value_range=(0, 1))
    with pytest.raises(ImageError, match=r"uint16\. Say what its white is: value_range=\(0, 65535\)"):
        load_image(of_bits(12))


def test_an_estimator_hands_the_range_on(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 4096, (60, 70), dtype=np.uint16)
    same = (np.minimum(image / 4095.0, 1)).astype(np.float32)
    with Estimator(make_toy_bundle(tmp_path / "toy"), "onnxruntime") as estimator:
        expected = estimator(same).prediction
        of_12 = {"value_range": (0, 4095)}
        actual = [
            estimator(image, **of_12),
            estimator.submit(image, **of_12).result(),
            *estimator.batch([image], **of_12),
        ]
        with estimator.stream(**of_12) as stream:
            stream.put(image)
            actual.append(next(stream).geometry)
        for geometry in actual:
            np.testing.assert_allclose(geometry.prediction, expected, atol=1e-6)


def test_open_files(tmp_path: Path) -> None:
    array = np.round(UNIT * 255).astype(np.uint8)
    data, expected = png(array), load_image(array).pixels
    (tmp_path / "image.png").write_bytes(data)
    with open(tmp_path / "image.png", "rb") as file:
        assert np.array_equal(load_image(file).pixels, expected)
        with pytest.raises(ImageError, match=r"image\.png has nothing left to read.*seek\(0\)"):
            load_image(file)
    with pytest.raises(ImageError, match=r"image\.png cannot be read: .*closed"):
        load_image(file)
    with open(tmp_path / "image.png", encoding="latin-1") as text, pytest.raises(ImageError, match="mode 'rb'"):
        load_image(text)
    with tempfile.SpooledTemporaryFile() as spooled:  # as web frameworks hold uploads
        spooled.write(data)
        spooled.seek(0)
        assert np.array_equal(load_image(spooled).pixels, expected)
    assert np.array_equal(load_image(memoryview(data)).pixels, expected)


@pytest.mark.parametrize("cut", [2, 1, 40, 400])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_without_their_end(cut: int, progressive: bool, tmp_path: Path) -> None:
    array = np.repeat(np.round(UNIT * 255).astype(np.uint8)[..., None], 3, axis=2)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "JPEG", quality=95, progressive=progressive)
    data = stream.getvalue()
    whole = load_image(data).pixels
    (tmp_path / "cut.jpg").write_bytes(data[:-cut])
    if cut > 2:  # what lacks its mark alone is read by Pillow as it is, or not, by its version
        with pytest.raises(ImageError, match="truncated"):
            load_image(tmp_path / "cut.jpg")
    for source in (tmp_path / "cut.jpg", data[:-cut], io.BytesIO(data[:-cut])):
        pixels = load_image(source, truncated=True).pixels
        assert pixels.shape == whole.shape
        if not progressive:
            assert np.array_equal(pixels[:16], whole[:16])
        if cut <= 2:
            assert np.array_equal(pixels, whole)
    assert np.array_equal(load_image(data, truncated=True).pixels, whole)
    assert np.array_equal(load_image(png(array), truncated=True).pixels, array)
    with pytest.raises(ImageError):
        load_image(data[:100], truncated=True)  # no picture has begun


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.com/a.jpg", "is an address, and images are not downloaded"),
        ("s3://bucket/a.jpg", "is an address"),
        ("data:image/png;base64,iVBORw0KGgo=", "looks like an image as base64 text"),
        (base64.b64encode(bytes(600)).decode(), "looks like an image as base64 text"),
        ("frames/*.png", r"is a pattern. For several images: `estimator\.batch\(sorted\(glob"),
        (["a.png", "b.png"], r"cannot be read from list.*`estimator\.batch\(images\)`"),
        ([[0, 1], [2, 3]], r"of a list of numbers make an array"),
        (None, "cv2.imread"),
    ],
)
def test_what_is_no_image_is_told_apart(source: object, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        load_image(source)


def test_a_batch_is_several(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    array = np.round(UNIT * 255).astype(np.uint8)
    path.write_bytes(png(array))
    with Estimator(make_toy_bundle(tmp_path / "toy"), "onnxruntime") as estimator:
        for one in (str(path), path, path.read_bytes(), array, Image.open(path), io.BytesIO(path.read_bytes()), 3):
            with pytest.raises(ImageError, match=r"`batch` takes several images, not one"):
                estimator.batch(one)  # type: ignore[arg-type]
        assert len(estimator.batch([path, array])) == 2
        assert len(estimator.batch(np.stack([array[..., None].repeat(3, 2)] * 3))) == 3
        assert len(estimator.batch(iter([path]))) == 1
