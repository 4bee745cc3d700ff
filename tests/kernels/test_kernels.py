"""Every kernel against its reference: odd sizes, strided inputs, all types, outputs poisoned beforehand.

The bounds are in `support/kernels.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from densegeo.colors import COLORS  # noqa: E402
from densegeo.kernels.resize_depth import Metres  # noqa: E402
from tests.support.interpreter import operation  # noqa: E402
from tests.support.kernels import BOUND, FLOATS, LOW, assert_as_good, error, noise, spread  # noqa: E402

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.integration]

SPLIT = (0.3611, 0.1159, -1.0, 1.0)
OPENCV = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
CLAMPS = ["before_mean", "after_mean"]
METRES = [  # the line of the last two crosses zero
    Metres("log_affine", 3.4, -0.2, 1.0, 20.0),
    Metres("affine", 3.0, -1.0, 0.1, 1.5),
    Metres("disparity_affine", 3.0, -1.0, 0.7, 30.0),
]
BOXES = [  # box in a 37x29 picture, output size
    ((0, 0, 37, 29), (37, 29)),  # identity
    ((3, 2, 31, 22), (131, 25)),  # enlarging, more than a block
    ((1, 0, 35, 27), (13, 7)),  # shrinking
    ((0, 5, 36, 1), (5, 14)),  # one row
]


@pytest.mark.parametrize(
    ("batch", "height", "width", "features"), [(1, 48, 80, 64), (2, 16, 560, 64), (2, 32, 16, 8), (1, 16, 48, 12)]
)
def test_split(device: str, batch: int, height: int, width: int, features: int) -> None:
    kernel, reference = operation("split")
    velocity = noise(batch, height * width // 128, features, device=device)
    latents = kernel.split(velocity, height, width, *SPLIT, torch.float32)
    assert latents.is_contiguous()
    expected = reference.split(velocity, height, width, *SPLIT, torch.float64)
    torch.testing.assert_close(latents.double(), expected, rtol=BOUND, atol=BOUND)


def test_split_of_tokens_with_gaps(device: str) -> None:
    kernel, reference = operation("split")
    velocity = noise(2, 15, 96, device=device)[:, 2:14, 16:80]
    assert not velocity.is_contiguous()
    latents = kernel.split(velocity, 32, 48, 0.7, -0.3, 1.0, -2.0, torch.float32)
    expected = reference.split(velocity, 32, 48, 0.7, -0.3, 1.0, -2.0, torch.float64)
    torch.testing.assert_close(latents.double(), expected, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_split_types(device: str, source: Any, target: Any) -> None:
    kernel, reference = operation("split")
    velocity = noise(1, 12, 64, device=device, dtype=source)
    latents = kernel.split(velocity, 32, 48, *SPLIT, target)
    assert latents.dtype == target
    exact = reference.split(velocity, 32, 48, *SPLIT, torch.float64)
    if target == torch.float32:
        assert error(latents, exact) <= BOUND
        return
    signed = torch.cat([-velocity[:, :6], velocity[:, 6:]]).to(target)
    plain = (signed / 0.3611 + 0.1159).reshape(2, 2, 3, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 16, 4, 6)
    assert_as_good(latents, plain, exact)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize(("box", "size"), BOXES)
@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (2, 1)])
def test_resize_depth(device: str, batch: int, channels: int, box: Any, size: Any, clamp: Any) -> None:
    kernel, reference = operation("resize_depth")
    arguments = (spread(noise(batch, channels, 29, 37, device=device)), box, size, clamp)
    resized = kernel.resize_depth(*arguments)
    assert resized.shape == (batch, *size[::-1])
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, reference.resize_depth(*arguments), rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("metres", METRES)
@pytest.mark.parametrize(("box", "size"), BOXES[1:3])
def test_resize_depth_in_metres(device: str, box: Any, size: Any, metres: Metres) -> None:
    kernel, reference = operation("resize_depth")
    arguments = (spread(noise(2, 3, 29, 37, device=device)), box, size, "before_mean", metres)
    depth = kernel.resize_depth(*arguments)
    torch.testing.assert_close(depth, reference.resize_depth(*arguments), rtol=2 * BOUND, atol=0, equal_nan=True)
    seen = depth[~depth.isnan()]
    assert seen.min() >= metres.near
    assert seen.max() <= metres.far
    assert depth.isnan().any() == (metres.space != "log_affine")


@pytest.mark.parametrize("metres", [None, *METRES])
def test_resize_depth_keeps_nan_apart(device: str, metres: Metres | None) -> None:
    kernel, reference = operation("resize_depth")
    decoded = noise(1, 3, 9, 11, device=device) / 4
    decoded[0, 1, 4, 5] = torch.nan
    decoded[0, 2, 0, 0] = torch.inf
    positive = metres and replace(metres, shift=0.5)
    for box, size, invalid in (((0, 0, 11, 9), (11, 9), 1), ((2, 1, 8, 7), (24, 21), 25)):  # 25: less than 3 away
        resized = kernel.resize_depth(decoded, box, size, "before_mean", positive)
        expected = reference.resize_depth(decoded, box, size, "before_mean", positive)
        torch.testing.assert_close(resized, expected, rtol=BOUND, atol=BOUND, equal_nan=True)
        assert int(resized.isnan().sum()) == invalid


@pytest.mark.filterwarnings("ignore:overflow", "ignore:divide by zero")  # the interpreter's numpy
@pytest.mark.parametrize(("space", "line"), [("log_affine", 200.0), ("affine", -1.0), ("disparity_affine", 0.0)])
def test_depth_that_no_float32_holds_is_invalid(device: str, space: Any, line: float) -> None:
    """Neither beyond its range nor at or behind the camera is anything clipped to the nearest or farthest."""
    decoded, metres = noise(1, 3, 5, 6, device=device), Metres(space, 0.0, line, 0.5, 20.0)
    for module in operation("resize_depth"):
        assert module.resize_depth(decoded, (0, 0, 6, 5), (6, 5), "before_mean", metres).isnan().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("clamp", CLAMPS)
def test_resize_depth_low_precision(device: str, dtype: Any, clamp: Any) -> None:
    kernel, reference = operation("resize_depth")
    arguments = (noise(2, 3, 29, 37, device=device, dtype=dtype), (0, 0, 37, 29), (90, 21), clamp)
    decoded, metres = arguments[0], Metres("log_affine", 3.4, -0.2)
    mean = decoded.clamp(-1, 1).mean(1, True) if clamp == "before_mean" else decoded.mean(1, True).clamp(-1, 1)
    plain = torch.nn.functional.interpolate(mean / 2 + 0.5, (21, 90), mode="bilinear", align_corners=False)[:, 0]
    assert_as_good(kernel.resize_depth(*arguments), plain, reference.resize_depth(*arguments))
    exact = reference.resize_depth(*arguments, metres)
    assert_as_good(kernel.resize_depth(*arguments, metres), torch.exp(3.4 * plain - 0.2), exact)


@pytest.mark.parametrize(("box", "size"), BOXES)
@pytest.mark.parametrize("batch", [1, 2])
def test_normals(device: str, batch: int, box: Any, size: Any) -> None:
    kernel, reference = operation("normals")
    decoded = spread(noise(batch, 3, 29, 37, device=device))
    matrix = ((0.0, 0.0, 1.0), (-1.0, 0.0, 0.0), (0.6, -0.8, 0.0))
    ours = kernel.normals(decoded, box, size, matrix)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, reference.normals(decoded, box, size, matrix), rtol=BOUND, atol=BOUND)


def test_normals_zero_and_nan(device: str) -> None:
    kernel, reference = operation("normals")
    decoded = noise(1, 3, 6, 8, device=device).to(memory_format=torch.channels_last)
    decoded[0, :, 2, 3] = 0
    decoded[0, 1, 4, 4] = torch.nan
    ours = kernel.normals(decoded, (0, 0, 8, 6), (8, 6), OPENCV)
    assert ours[0, 2, 3].tolist() == [0, 0, 0]
    assert torch.equal(ours.isnan().all(-1).nonzero().cpu(), torch.tensor([[0, 4, 4]]))
    expected = reference.normals(decoded, (0, 0, 8, 6), (8, 6), OPENCV)
    torch.testing.assert_close(ours, expected, rtol=BOUND, atol=BOUND, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW)
def test_normals_low_precision(device: str, dtype: Any) -> None:
    kernel, reference = operation("normals")
    decoded = noise(1, 3, 29, 37, device=device, dtype=dtype)
    box, size = (0, 0, 37, 29), (90, 21)
    plain = torch.nn.functional.interpolate(decoded.clamp(-1, 1), (21, 90), mode="bilinear", align_corners=False)
    plain = -(plain / plain.norm(dim=1, keepdim=True)).permute(0, 2, 3, 1)
    assert_as_good(kernel.normals(decoded, box, size, OPENCV), plain, reference.normals(decoded, box, size, OPENCV))


def frame(height: int, width: int, device: str, padding: int = 0) -> Any:
    """(height, width, 3) uint8 whose rows lie `padding` pixels further apart than they need."""
    generator = torch.Generator().manual_seed(height)
    wide = torch.randint(0, 256, (height, width + padding, 3), dtype=torch.uint8, generator=generator)
    return wide.to(device)[:, :width]


@pytest.mark.parametrize(
    ("source", "size"),
    [((53, 71), (30, 7)), ((7, 23), (150, 9)), ((97, 31), (48, 5)), ((16, 32), (32, 16)), ((1, 1), (5, 3))],
)
@pytest.mark.parametrize("bgr", [False, True])
def test_preprocess(device: str, source: tuple[int, int], size: tuple[int, int], bgr: bool) -> None:
    kernel, reference = operation("preprocess")
    picture = frame(*source, device, padding=5)
    box = (0, 0, *size)
    color = COLORS["bgr" if bgr else "rgb"]
    rgb = kernel.preprocess(picture, size, box, color, torch.float32)
    assert rgb.shape == (1, 3, size[1], size[0])
    expected = reference.preprocess(picture, size, box, color, torch.float64)
    torch.testing.assert_close(rgb.double(), expected, rtol=BOUND, atol=BOUND)


def test_preprocess_repeats_edges_around_a_box_and_skips_a_fourth_channel(device: str) -> None:
    kernel, reference = operation("preprocess")
    rgba = torch.cat([frame(20, 40, device), torch.full((20, 40, 1), 9, dtype=torch.uint8, device=device)], dim=2)
    arguments = (rgba[..., :3], (37, 9), (4, 3, 32, 5), COLORS["rgb"])
    ours = kernel.preprocess(*arguments, torch.float32)
    torch.testing.assert_close(ours, reference.preprocess(*arguments, torch.float32), rtol=BOUND, atol=BOUND)
    assert torch.equal(ours[:, :, 0], ours[:, :, 3])
    assert torch.equal(ours[..., 36], ours[..., 35])


@pytest.mark.parametrize(
    ("color", "source", "size", "box"),
    [
        ("nv12", (54, 70), (30, 7), (0, 0, 30, 7)),
        ("nv12-bt709-full", (6, 22), (150, 9), (3, 2, 131, 6)),
        ("yuyv", (31, 46), (48, 5), (0, 0, 48, 5)),
        ("yuyv-full", (1, 2), (5, 3), (0, 0, 5, 3)),
        ("uyvy-bt709", (16, 32), (32, 16), (0, 0, 32, 16)),
    ],
)
def test_preprocess_ycbcr(device: str, color: str, source: tuple[int, int], size: tuple[int, int], box: Any) -> None:
    """Of rows that lie apart, too."""
    kernel, reference = operation("preprocess")
    picture = camera(color, *source, device=device, padding=6)
    rgb = kernel.preprocess(picture, size, box, COLORS[color], torch.float32)
    assert rgb.shape == (1, 3, size[1], size[0])
    expected = reference.preprocess(picture, size, box, COLORS[color], torch.float64)
    torch.testing.assert_close(rgb.double(), expected, rtol=BOUND, atol=BOUND)


def camera(color: str, height: int, width: int, device: str, padding: int) -> Any:
    """Random bytes of a YCbCr image, every row longer than it need be."""
    generator = torch.Generator().manual_seed(height)
    shape = (height * 3 // 2, width + padding) if color.startswith("nv12") else (height, width + padding, 2)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)[:, :width]


@pytest.mark.parametrize("dtype", LOW)
def test_preprocess_low_precision(device: str, dtype: Any) -> None:
    kernel, reference = operation("preprocess")
    picture = frame(41, 67, device)
    rgb = kernel.preprocess(picture, (32, 8), (0, 0, 32, 8), COLORS["rgb"], dtype)
    assert rgb.dtype == dtype
    exact = reference.preprocess(picture, (32, 8), (0, 0, 32, 8), COLORS["rgb"], torch.float64)
    rows, columns = (reference.antialiased_weights(*sides).to(device, dtype) for sides in ((41, 8), (67, 32)))
    plain = (rows @ (picture.permute(2, 0, 1).to(dtype) / 255) @ columns.mT) * 2 - 1
    assert_as_good(rgb, plain[None], exact)


def test_public_functions_pick_by_device(device: str) -> None:
    from densegeo.kernels.normals import normals
    from densegeo.kernels.preprocess import preprocess
    from densegeo.kernels.resize_depth import resize_depth
    from densegeo.kernels.split import split

    side = 0 if device == "cuda" else 1  # of (kernel, reference)
    velocity, decoded = noise(1, 12, 64, device=device), noise(1, 3, 8, 9, device=device)
    picture, metres = frame(8, 9, device), Metres("affine", 2.0, 0.5)
    box, size = (0, 0, 9, 8), (7, 5)
    pairs = [
        (split(velocity, 32, 48), operation("split")[side].split(velocity, 32, 48, *SPLIT, torch.float32)),
        (
            resize_depth(decoded, box, size),
            operation("resize_depth")[side].resize_depth(decoded, box, size, "before_mean"),
        ),
        (
            resize_depth(decoded, box, size, clamp="after_mean", metres=metres),
            operation("resize_depth")[side].resize_depth(decoded, box, size, "after_mean", metres),
        ),
        (normals(decoded, box, size), operation("normals")[side].normals(decoded, box, size, OPENCV)),
        (
            preprocess(picture, size, color="bgr"),
            operation("preprocess")[side].preprocess(picture, size, (0, 0, 7, 5), COLORS["bgr"], torch.float32),
        ),
    ]
    for public, direct in pairs:
        torch.testing.assert_close(public, direct, rtol=0, atol=0, equal_nan=True)


def test_wrappers_refuse_wrong_layouts(device: str) -> None:
    split, resize_depth, normals, preprocess = (
        getattr(operation(name)[0], name) for name in ("split", "resize_depth", "normals", "preprocess")
    )
    picture = noise(1, 3, 8, 8, device=device)
    wrong = [
        lambda: split(noise(1, 12, 128, device=device)[..., ::2], 32, 48, *SPLIT, torch.float32),
        lambda: split(noise(1, 13, 64, device=device), 32, 48, *SPLIT, torch.float32),
        lambda: resize_depth(picture, (1, 0, 8, 8), (8, 8), "before_mean"),
        lambda: normals(picture[:, :2], (0, 0, 8, 8), (8, 8), OPENCV),
        lambda: preprocess(picture[0], (8, 8), (0, 0, 8, 8), COLORS["rgb"], torch.float32),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()
