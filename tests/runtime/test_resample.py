"""Resampling against torch, bucket choice, padding, and the authors' sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from densegeo.errors import BundleError
from densegeo.runtime.bundle import Bucket, Graph
from densegeo.runtime.images import Frame, load_image
from densegeo.runtime.resample import (
    Placement,
    authors_bucket,
    authors_size,
    choose_bucket,
    place,
    prepare,
    prepare_authors,
    resize_antialiased,
    resize_plain,
    restore,
)
from densegeo.size import Size

BOUND = 1e-5
SIZES = [(64, 48), (33, 17), (200, 150), (640, 7), (97, 71), (1, 1)]


def buckets(*sizes: tuple[int, int]) -> list[Bucket]:
    none = Graph(file="", inputs=[], outputs=[], nodes=0, parameters=0, flops=0)
    return [Bucket(width=w, height=h, encoder=none, denoiser=none, decoder=none) for w, h in sizes]


def torch_resize(plane: np.ndarray, width: int, height: int, antialias: bool) -> np.ndarray:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(plane)[None, None]
    resized = torch.nn.functional.interpolate(
        tensor, (height, width), mode="bilinear", align_corners=False, antialias=antialias
    )
    return resized[0, 0].numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("antialias", [True, False])
def test_resize_equals_torch(size: tuple[int, int], antialias: bool) -> None:
    plane = np.random.default_rng(1).random((71, 97), dtype=np.float32)
    ours = (resize_antialiased if antialias else resize_plain)(plane, *size)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, torch_resize(plane, *size, antialias), atol=BOUND, rtol=0)


def test_large_plain_resize_equals_torch() -> None:
    plane = np.random.default_rng(2).random((768, 1024), dtype=np.float32)
    expected = torch_resize(plane.astype(np.float64), 1920, 1080, antialias=False)
    np.testing.assert_allclose(resize_plain(plane, 1920, 1080), expected, atol=BOUND, rtol=0)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize(("source", "bucket"), [((640, 853), (64, 96)), ((49, 30), (48, 80)), ((333, 64), (32, 64))])
def test_tall_images_are_shrunk_as_torch_does(kind: type, source: tuple[int, int], bucket: tuple[int, int]) -> None:
    """Rows by products, columns by Pillow; sources and buckets are (height, width)."""
    pixels = np.random.default_rng(3).random((*source, 3), dtype=np.float32)
    pixels = np.round(255 * pixels).astype(np.uint8) if kind is np.uint8 else pixels
    size = Size(bucket[1], bucket[0])
    frame = Frame(pixels, encoded=False)
    rgb = prepare(frame, size, place(size, frame.size, "stretch"))
    unit = pixels.astype(np.float64) / (255 if kind is np.uint8 else 1)
    for channel in range(3):
        plane = np.ascontiguousarray(unit[..., channel])
        expected = 2 * torch_resize(plane, size.width, size.height, antialias=True) - 1
        np.testing.assert_allclose(rgb[0, channel], expected, atol=BOUND, rtol=0)


def test_nearest_aspect_ratio() -> None:
    choices = buckets((1024, 768), (768, 1024), (1216, 352))
    assert choose_bucket(choices, Size(800, 600)).width == 1024
    assert choose_bucket(choices, Size(600, 800)).width == 768
    assert choose_bucket(choices, Size(1242, 375)).width == 1216


def test_ties_take_the_largest_bucket_that_does_not_upscale() -> None:
    choices = buckets((1024, 768), (256, 192), (512, 384))
    assert choose_bucket(choices, Size(4000, 3000)).width == 1024
    assert choose_bucket(choices, Size(700, 525)).width == 512
    assert choose_bucket(choices, Size(100, 75)).width == 256


@settings(max_examples=100, deadline=None)
@given(st.integers(16, 5000), st.integers(16, 5000))
def test_choice_is_never_beaten(width: int, height: int) -> None:
    choices = buckets((512, 384), (384, 512), (1216, 352), (640, 640))
    ratio = np.log(width / height)
    chosen = choose_bucket(choices, Size(width, height))
    best = min(abs(np.log(b.width / b.height) - ratio) for b in choices)
    assert abs(np.log(chosen.width / chosen.height) - ratio) <= best + 1e-9


def fitted(frame: Frame, fit: str) -> tuple[np.ndarray, Placement]:
    """A frame in a bucket of 64x48."""
    (bucket,) = buckets((64, 48))
    placement = place(bucket.size, frame.size, fit)
    return prepare(frame, bucket.size, placement), placement


def test_stretch_fills_the_bucket(picture: np.ndarray) -> None:
    rgb, placement = fitted(load_image(picture), "stretch")
    assert rgb.shape == (1, 3, 48, 64)
    assert rgb.dtype == np.float32
    assert placement == Placement((0, 0, 64, 48), (96, 72))
    for channel in range(3):
        expected = torch_resize(picture[..., channel].astype(np.float32) / 255, 64, 48, antialias=True)
        np.testing.assert_allclose(rgb[0, channel], 2 * expected - 1, atol=BOUND)


@pytest.mark.parametrize(("width", "height", "box"), [(96, 48, (0, 8, 64, 32)), (48, 96, (20, 0, 24, 48))])
def test_pad_keeps_aspect_and_repeats_edges(width: int, height: int, box: tuple[int, int, int, int]) -> None:
    pixels = np.random.default_rng(0).random((height, width, 3), dtype=np.float32)
    rgb, placement = fitted(load_image(pixels), "pad")
    assert rgb.shape == (1, 3, 48, 64)
    assert placement.box == box
    left, top, inner_width, inner_height = box
    inner = rgb[0, :, top : top + inner_height, left : left + inner_width]
    padded = np.pad(inner, ((0, 0), (top, 48 - top - inner_height), (left, 64 - left - inner_width)), mode="edge")
    np.testing.assert_array_equal(rgb[0], padded)
    back = restore(rgb[0, 1], placement)
    assert back.shape == (height, width)
    np.testing.assert_allclose(back, resize_plain(inner[1], width, height))


@settings(max_examples=60, deadline=None)
@given(st.integers(16, 300), st.integers(16, 300), st.sampled_from(["stretch", "pad"]))
def test_prepare_and_restore_shapes(width: int, height: int, fit: str) -> None:
    frame = load_image(np.full((height, width, 3), 0.25, np.float32))
    rgb, placement = fitted(frame, fit)
    assert rgb.shape == (1, 3, 48, 64)
    np.testing.assert_allclose(rgb, -0.5, atol=1e-6)  # a constant image stays constant, padding included
    assert restore(rgb[0, 0], placement).shape == (height, width)


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((1024, 768), (1024, 768)),
        ((20, 30), (1024, 768)),
        ((1025, 768), (1216, 352)),
        ((1242, 375), (1216, 352)),
        ((768, 1024), (864, 576)),
        ((6048, 4032), (864, 576)),
        ((6049, 4032), (6049, 4032)),
    ],
)
def test_authors_sizes(source: tuple[int, int], size: tuple[int, int]) -> None:
    assert authors_size(Size(*source)) == size


def test_authors_size_that_is_no_bucket() -> None:
    assert authors_bucket(buckets((64, 48), (1024, 768)), Size(640, 480)).width == 1024
    with pytest.raises(BundleError, match="--size 1216x352"):
        authors_bucket(buckets((1024, 768)), Size(1242, 375))
    with pytest.raises(BundleError, match="Downscale"):
        authors_bucket(buckets((1024, 768)), Size(7001, 5000))


def test_authors_arrays_are_plain_bilinear(picture: np.ndarray) -> None:
    rgb = prepare_authors(load_image(picture), Size(64, 48))
    expected = torch_resize(picture[..., 2].astype(np.float32) / 255, 64, 48, antialias=False)
    np.testing.assert_allclose(rgb[0, 2], 2 * expected - 1, atol=BOUND)


def test_authors_files_are_pillow_bicubic(picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    rgb = prepare_authors(load_image(image), Size(64, 48))
    expected = np.asarray(image.resize((64, 48))).astype(np.float32) / 255  # Pillow's default filter
    np.testing.assert_allclose(rgb[0].transpose(1, 2, 0), 2 * expected - 1, atol=1e-6)


def test_authors_float_files_stay_in_range() -> None:
    grey = np.tile(np.array([0, 65535], np.uint16).repeat(8), (64, 6))
    rgb = prepare_authors(load_image(Image.fromarray(grey)), Size(64, 48))
    assert rgb.min() >= -1  # bicubic overshoots at the steps
    assert rgb.max() <= 1
