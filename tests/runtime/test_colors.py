"""YCbCr from cameras: the standards' equations, other libraries' conversions, every way through an estimator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densegeo.colors import COLORS
from densegeo.errors import ImageError
from densegeo.runtime import Estimator
from densegeo.runtime.images import MIN_SIDE, device_size, load_image
from densegeo.runtime.ycbcr import from_ycbcr
from tests.support.ycbcr_reference import YCBCR, camera_bytes, rgb64


@pytest.mark.parametrize("color", YCBCR)
@settings(max_examples=10)
@given(blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 2**32 - 1))
def test_conversions_are_the_standards(color: str, blocks: tuple[int, int], seed: int) -> None:
    width, height = 2 * blocks[0], 2 * blocks[1]
    pixels = camera_bytes(color, width, height, seed)
    ycbcr = COLORS[color].ycbcr
    assert ycbcr is not None
    assert ycbcr.size(pixels.shape) == (width, height)
    np.testing.assert_allclose(from_ycbcr(pixels, ycbcr), rgb64(color, pixels) / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("color", "code"),
    [("nv12", "COLOR_YUV2RGB_NV12"), ("yuyv", "COLOR_YUV2RGB_YUY2"), ("uyvy", "COLOR_YUV2RGB_UYVY")],
)
def test_opencv_agrees(color: str, code: str) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = np.maximum(camera_bytes(color, 64, 48, seed=3), 16)  # it takes blacker than black for black
    theirs = cv2.cvtColor(pixels, getattr(cv2, code))
    ours = from_ycbcr(pixels, COLORS[color].ycbcr) * 255  # type: ignore[arg-type]
    assert np.abs(ours - theirs).max() <= 1.0  # theirs is rounded, with coefficients of 20 bits


@pytest.mark.parametrize("color", YCBCR)
def test_ffmpeg_agrees(color: str) -> None:
    """On a smooth picture, within two levels, where another matrix or range is twice as far off: swscale interpolates
    chroma, and rounds down on the way.
    """
    av = pytest.importorskip("av")
    from av.video.reformatter import ColorRange, Colorspace

    layout, suffix = color.partition("-")[0], color.partition("-")[2]
    y, x = np.mgrid[0:48, 0:64]
    picture = np.stack([60 + 2 * x, 200 - 2 * y, 80 + x + y], axis=-1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    made = frame.reformat(
        format="nv12" if layout == "nv12" else "yuyv422",
        dst_colorspace=Colorspace.ITU709 if "bt709" in suffix else Colorspace.ITU601,
        dst_color_range=ColorRange.JPEG if "full" in suffix else ColorRange.MPEG,
        interpolation="ACCURATE_RND",
    )
    rows = 72 if layout == "nv12" else 48
    pixels = made.to_ndarray().reshape(rows, 64, *([] if layout == "nv12" else [2]))
    if layout == "uyvy":  # which PyAV makes no array of
        pixels = pixels[..., ::-1]
    names = [name for name in YCBCR if name.startswith(layout)]
    errors = {name: np.abs(from_ycbcr(pixels, COLORS[name].ycbcr) * 255 - picture).mean() for name in names}  # type: ignore[arg-type]
    assert errors.pop(color) <= min(2, min(errors.values()) / 2)


def test_every_way_of_an_estimator_takes_them(bundle: Path) -> None:
    for color in YCBCR:
        pixels = camera_bytes(color, 70, 50, seed=5)
        rgb = from_ycbcr(pixels, COLORS[color].ycbcr)  # type: ignore[arg-type]
        with Estimator(bundle, device="cpu", fit="pad") as estimator:
            expected = estimator(rgb)
            assert expected.source_size == (70, 50)
            future = estimator.submit(pixels, color)  # type: ignore[arg-type]
            with estimator.stream(color=color) as stream:  # type: ignore[arg-type]
                stream.put(pixels)
                stream.close()
                (streamed,) = stream
            called = estimator(pixels, color)  # type: ignore[arg-type]
            (listed,) = estimator.batch([pixels], color)  # type: ignore[arg-type]
            for actual in (called, listed, future.result(), streamed.geometry):
                assert actual.source_size == (70, 50)
                np.testing.assert_allclose(actual.prediction, expected.prediction, atol=1e-5)
        with Estimator(bundle, device="cpu", preprocessing="authors", check_digests=False) as estimator:
            small = camera_bytes(color, 70, 50, seed=5)
            with pytest.raises(Exception, match="1024x768"):  # the size of theirs that this bundle lacks
                estimator(small, color)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("color", "shape", "dtype", "says"),
    [
        ("nv12", (71, 64), np.uint8, r"3 \* height / 2, width.*not \(71, 64\)"),
        ("nv12", (72, 63), np.uint8, "both sides of the image even"),
        ("nv12-full", (48, 64, 3), np.uint8, "both sides of the image even"),
        ("yuyv", (48, 63, 2), np.uint8, r"even width, not \(48, 63, 2\)"),
        ("uyvy", (48, 128), np.uint8, r"\(height, width, 2\)"),
        ("yuyv", (48, 64, 2), np.float32, "yuyv is uint8, and the array is float32"),
        ("nv12", (15, 64), np.uint8, f"64x10; both sides must be at least {MIN_SIDE}"),
    ],
)
def test_what_is_no_such_image_is_refused(color: str, shape: tuple[int, ...], dtype: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(np.zeros(shape, dtype), color)


def test_sizes_on_a_device_are_the_images() -> None:
    assert device_size(np.zeros((72, 64), np.uint8), "nv12") == (64, 48)
    assert device_size(np.zeros((48, 64, 2), np.uint8), "yuyv-full") == (64, 48)
    with pytest.raises(ImageError, match="uint8, not float32"):
        device_size(np.zeros((72, 64), np.float32), "nv12")
    with pytest.raises(ImageError, match="even width"):
        device_size(np.zeros((48, 63, 2), np.uint8), "yuyv")


def test_rows_may_lie_apart() -> None:
    wide = camera_bytes("nv12", 96, 48, seed=1)
    np.testing.assert_array_equal(load_image(wide[:, :64], "nv12").rgb, load_image(wide[:, :64].copy(), "nv12").rgb)
