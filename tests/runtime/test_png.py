"""PNG files as they are written here, read by Pillow and OpenCV."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densegeo.runtime.png import write_png


def written(picture: np.ndarray, text: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    write_png(stream, picture, text)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 7, 3), "uint8"), ((1, 1, 3), "uint8"), ((3, 1), "uint8"), ((6, 5), "uint16"), ((1, 9), "uint16")],
)
def test_others_read_what_was_written(shape: tuple[int, ...], dtype: Any) -> None:
    picture = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    data = written(picture[::-1], {"densegeo.a": "b", "weit": "größer als 日本"})
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.text == {"densegeo.a": "b", "weit": "größer als 日本"}  # type: ignore[attr-defined]
        np.testing.assert_array_equal(np.asarray(image), picture[::-1])
    cv2 = pytest.importorskip("cv2")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(pixels[..., ::-1] if picture.ndim == 3 else pixels, picture[::-1])


def test_smooth_maps_are_about_as_small_as_pillows() -> None:
    """Which tries five filters a row."""
    y, x = np.mgrid[0:200, 0:300]
    for picture in (((x + 2 * y) % 256).astype(np.uint8), (20 * x + 30 * y).astype(np.uint16)):
        pillow = io.BytesIO()
        Image.fromarray(picture).save(pillow, "PNG", compress_level=1)
        assert len(written(picture, {})) < 1.1 * pillow.tell()
