"""Image messages in every encoding against arrays and OpenCV, and messages that contradict themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rosbags")

from densegeo.errors import ConfigError, ImageError
from densegeo.ros.images import ENCODINGS, read_compressed, read_image
from densegeo.runtime.images import load_image
from tests.support.ros import T, header, image
from tests.support.ycbcr_reference import rgb64

PATTERNS = ("rggb", "bggr", "gbrg", "grbg")


def rgb_of(message: Any, ycbcr: str = "") -> np.ndarray:
    """As an estimator sees it, in [0, 1]."""
    picture = read_image(message, ycbcr)
    rgb = load_image(picture.image, picture.color).rgb
    return rgb / 255 if rgb.dtype == np.uint8 else rgb


def random(shape: tuple[int, ...], bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(f"u{bits // 8}")


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", ["rgb", "bgr", "rgba", "bgra", "mono"])
def test_packed_pixels(order: str, bits: int, padding: int, big: bool) -> None:
    channels = 1 if order == "mono" else len(order)
    array = random((17, 19, channels), bits)
    expected = np.repeat(array, 3, axis=2) if order == "mono" else array[..., [order.index(c) for c in "rgb"]]
    actual = rgb_of(image(array[..., 0] if order == "mono" else array, f"{order}{bits}", padding=padding, big=big))
    np.testing.assert_allclose(actual, expected / (2.0**bits - 1), atol=1e-6)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bayer_patterns_are_opencvs(pattern: str, bits: int, big: bool) -> None:
    cv2 = pytest.importorskip("cv2")
    mosaic = random((20, 26), bits)
    theirs = cv2.cvtColor(mosaic, getattr(cv2, f"COLOR_Bayer{pattern.upper()}2RGB"))
    ours = read_image(image(mosaic, f"bayer_{pattern}{bits}", padding=4, big=big)).image
    scale = 1 if bits == 8 else 65535
    inner = np.s_[1:-1, 1:-1]  # OpenCV repeats its second rows and columns at the edges
    np.testing.assert_allclose(ours[inner] * np.float32(scale), theirs[inner], atol=0.01)


def test_bayer_of_a_grey_scene_is_grey() -> None:
    for pattern in PATTERNS:
        assert (read_image(image(np.full((17, 19), 77, np.uint8), f"bayer_{pattern}8")).image == 77).all()


@pytest.mark.parametrize("suffix", ["", "bt709", "full", "bt709-full"])
@pytest.mark.parametrize(
    ("encoding", "color"), [("nv12", "nv12"), ("yuyv", "yuyv"), ("yuv422_yuy2", "yuyv"), ("yuv422", "uyvy")]
)
def test_ycbcr(encoding: str, color: str, suffix: str) -> None:
    array = random((27, 20), 8) if color == "nv12" else random((18, 20, 2), 8)
    name = f"{color}-{suffix}" if suffix else color
    actual = rgb_of(image(array, encoding, padding=12), suffix)
    np.testing.assert_allclose(actual, rgb64(name, array) / 255, atol=1e-6)


@pytest.mark.parametrize("encoding", ["rgb8", "bgra8", "mono8", "nv12", "yuyv", "uyvy"])
def test_nothing_is_copied(encoding: str) -> None:
    shape = {"mono8": (18, 20), "nv12": (27, 20), "rgb8": (18, 20, 3), "bgra8": (18, 20, 4)}.get(encoding, (18, 20, 2))
    message = image(random(shape, 8), encoding, padding=8)
    assert np.shares_memory(read_image(message).image, message.data)


def test_the_last_row_may_lack_its_padding() -> None:
    message = image(random((18, 20, 3), 8), "rgb8", padding=5)
    whole = read_image(message).image.copy()
    message.data = message.data[:-5]
    np.testing.assert_array_equal(read_image(message).image, whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoding": "32FC1"}, "depth image"),
        ({"encoding": "rgb9"}, r"'rgb9' is not one of rgb8"),
        ({"encoding": "nv21"}, "nv21"),
        ({"height": 0}, "20x0: it holds no pixels"),
        ({"step": 59}, "59 bytes a row; 20 pixels of rgb8 take 60"),
        ({"height": 19}, "1080 bytes; 19 rows of 60 bytes are 1140"),
        ({"encoding": "rgb16"}, "60 bytes a row; 20 pixels of rgb16 take 120"),
        ({"encoding": "nv12", "width": 19}, "even sides, and this one is 19x18"),
    ],
)
def test_messages_that_contradict_themselves(changes: dict[str, Any], says: str) -> None:
    message = image(random((18, 20, 3), 8), "rgb8")
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(ImageError, match=says):
        read_image(message)


def test_an_unknown_conversion_is_refused() -> None:
    with pytest.raises(ConfigError, match="bt709-full"):
        read_image(image(random((27, 20), 8), "nv12"), "bt2020")


@settings(max_examples=200, deadline=None)
@given(
    encoding=st.sampled_from(sorted(ENCODINGS)),
    width=st.integers(0, 12),
    height=st.integers(0, 12),
    step=st.integers(0, 100),
    size=st.integers(0, 600),
    big=st.integers(0, 1),
)
def test_any_numbers_give_an_image_or_an_error(
    encoding: str, width: int, height: int, step: int, size: int, big: int
) -> None:
    """Never memory beyond the data, never another kind of error."""
    message = T["sensor_msgs/msg/Image"](
        header=header(),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=big,
        step=step,
        data=np.zeros(size, np.uint8),
    )
    try:
        actual = read_image(message).image
    except ImageError:
        return
    assert isinstance(actual, np.ndarray)
    assert actual.shape[:2] == (height * 3 // 2 if encoding == "nv12" else height, width)
    assert actual.sum() == 0


def test_compressed_images() -> None:
    cv2 = pytest.importorskip("cv2")
    picture = random((40, 50, 3), 8)
    compressed = T["sensor_msgs/msg/CompressedImage"]
    data = cv2.imencode(".png", picture[..., ::-1])[1]
    read = read_compressed(compressed(header=header(), format="rgb8; png compressed bgr8", data=data))
    np.testing.assert_array_equal(load_image(read.image, read.color).rgb, picture)
    with pytest.raises(ImageError, match="depth image"):
        read_compressed(compressed(header=header(), format="16UC1; compressedDepth png", data=data))
    with pytest.raises(ImageError, match="0 bytes"):
        read_compressed(compressed(header=header(), format="jpeg", data=data[:0]))
