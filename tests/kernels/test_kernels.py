"""Every kernel against its reference: odd sizes, strided inputs, all types, outputs poisoned beforehand.

The bounds are in `support/kernels.py`.
"""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.support.interpreter import operation  # noqa: E402
from tests.support.kernels import BOUND, FLOATS, LOW, assert_as_good, error, noise, spread  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

SPLIT = (0.3611, 0.1159, -1.0, 1.0)
OPENCV = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
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


@pytest.mark.parametrize("clamp_first", [True, False])
@pytest.mark.parametrize(("box", "size"), BOXES)
@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (2, 1)])
def test_log_dequantize(device: str, batch: int, channels: int, box: Any, size: Any, clamp_first: bool) -> None:
    kernel, reference = operation("log_dequantize")
    decoded = spread(noise(batch, channels, 29, 37, device=device))
    arguments = (decoded, box, size, 3.4, -0.2, clamp_first, (1.0, 20.0), True)
    depth, valid, prediction = kernel.log_dequantize(*arguments)
    depth64, valid64, prediction64 = reference.log_dequantize(*arguments)
    torch.testing.assert_close(prediction, prediction64, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(depth, depth64, rtol=BOUND, atol=0)
    assert valid.dtype == torch.bool
    assert torch.equal(valid.view(torch.uint8), valid64.view(torch.uint8))
    assert depth.min() >= 1
    assert depth.max() <= 20


def test_log_dequantize_keeps_nan_apart(device: str) -> None:
    kernel, reference = operation("log_dequantize")
    decoded = noise(1, 3, 9, 11, device=device)
    decoded[0, 1, 4, 5] = torch.nan
    decoded[0, 2, 0, 0] = torch.inf
    for box, size, invalid in (((0, 0, 11, 9), (11, 9), 1), ((2, 1, 8, 7), (24, 21), 25)):  # 25: less than 3 away
        depth, valid, prediction = kernel.log_dequantize(decoded, box, size, 2.0, 0.5, True, (0.0, inf), False)
        expected, valid64, _ = reference.log_dequantize(decoded, box, size, 2.0, 0.5, True, (0.0, inf), False)
        assert prediction is None
        torch.testing.assert_close(depth, expected, rtol=BOUND, atol=0, equal_nan=True)
        assert torch.equal(valid.view(torch.uint8), valid64.view(torch.uint8))
        assert torch.equal(valid, ~depth.isnan())
        assert int((~valid).sum()) == invalid


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's numpy
def test_log_dequantize_depth_beyond_float32_is_invalid(device: str) -> None:
    kernel, _ = operation("log_dequantize")
    decoded = noise(1, 3, 5, 6, device=device)
    depth, valid, _ = kernel.log_dequantize(decoded, (0, 0, 6, 5), (6, 5), 0.0, 200.0, True, (0.0, inf), False)
    assert depth.isnan().all()
    assert not valid.any()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("clamp_first", [True, False])
def test_log_dequantize_low_precision(device: str, dtype: Any, clamp_first: bool) -> None:
    kernel, reference = operation("log_dequantize")
    decoded = noise(2, 3, 29, 37, device=device, dtype=dtype)
    arguments = (decoded, (0, 0, 37, 29), (90, 21), 3.4, -0.2, clamp_first, (0.0, inf), True)
    depth, _, prediction = kernel.log_dequantize(*arguments)
    exact, _, exact_prediction = reference.log_dequantize(*arguments)
    mean = decoded.clamp(-1, 1).mean(1, True) if clamp_first else decoded.mean(1, True).clamp(-1, 1)
    plain = torch.nn.functional.interpolate(mean / 2 + 0.5, (21, 90), mode="bilinear", align_corners=False)[:, 0]
    assert_as_good(prediction, plain, exact_prediction)
    assert_as_good(depth, torch.exp(3.4 * plain - 0.2), exact)


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
    rgb = kernel.preprocess(picture, size, box, bgr, torch.float32)
    assert rgb.shape == (1, 3, size[1], size[0])
    expected = reference.preprocess(picture, size, box, bgr, torch.float64)
    torch.testing.assert_close(rgb.double(), expected, rtol=BOUND, atol=BOUND)


def test_preprocess_repeats_edges_around_a_box_and_skips_a_fourth_channel(device: str) -> None:
    kernel, reference = operation("preprocess")
    rgba = torch.cat([frame(20, 40, device), torch.full((20, 40, 1), 9, dtype=torch.uint8, device=device)], dim=2)
    arguments = (rgba[..., :3], (37, 9), (4, 3, 32, 5), False)
    ours = kernel.preprocess(*arguments, torch.float32)
    torch.testing.assert_close(ours, reference.preprocess(*arguments, torch.float32), rtol=BOUND, atol=BOUND)
    assert torch.equal(ours[:, :, 0], ours[:, :, 3])
    assert torch.equal(ours[..., 36], ours[..., 35])


@pytest.mark.parametrize("dtype", LOW)
def test_preprocess_low_precision(device: str, dtype: Any) -> None:
    kernel, reference = operation("preprocess")
    picture = frame(41, 67, device)
    rgb = kernel.preprocess(picture, (32, 8), (0, 0, 32, 8), False, dtype)
    assert rgb.dtype == dtype
    exact = reference.preprocess(picture, (32, 8), (0, 0, 32, 8), False, torch.float64)
    rows, columns = (reference.antialiased_weights(*sides).to(device, dtype) for sides in ((41, 8), (67, 32)))
    plain = (rows @ (picture.permute(2, 0, 1).to(dtype) / 255) @ columns.mT) * 2 - 1
    assert_as_good(rgb, plain[None], exact)


@pytest.mark.parametrize("size", [(13, 29), (1, 300), (7, 1)])
def test_unproject(device: str, size: tuple[int, int]) -> None:
    kernel, reference = operation("unproject")
    intrinsics = (211.3, 198.7, size[1] / 2 - 0.3, size[0] / 2 + 0.2)
    depth = (noise(size[0], size[1] + 4, device=device).abs() + 0.1)[:, 1:-3]
    depth[size[0] // 2, 0] = torch.nan
    normals = noise(size[0] + 2, *size[1:], 3, device=device)[1:-1]
    for given in (None, normals):
        cloud = kernel.unproject(depth, intrinsics, given)
        expected = reference.unproject(depth, intrinsics, given)
        torch.testing.assert_close(cloud, expected, rtol=BOUND, atol=1e-7, equal_nan=True)
        assert cloud[size[0] // 2, 0, :3].isnan().all()


def test_public_functions_pick_by_device(device: str) -> None:
    from densegeo.kernels.log_dequantize import log_dequantize
    from densegeo.kernels.normals import normals
    from densegeo.kernels.preprocess import preprocess
    from densegeo.kernels.split import split
    from densegeo.kernels.unproject import unproject

    side = 0 if device == "cuda" else 1  # of (kernel, reference)
    velocity, decoded = noise(1, 12, 64, device=device), noise(1, 3, 8, 9, device=device)
    depth, picture = noise(5, 6, device=device), frame(8, 9, device)
    box, size = (0, 0, 9, 8), (7, 5)
    pairs = [
        (split(velocity, 32, 48), operation("split")[side].split(velocity, 32, 48, *SPLIT, torch.float32)),
        (
            log_dequantize(decoded, box, size, scale=1.0, shift=0.5)[0],
            operation("log_dequantize")[side].log_dequantize(decoded, box, size, 1.0, 0.5, True, (0.0, inf), False)[0],
        ),
        (normals(decoded, box, size), operation("normals")[side].normals(decoded, box, size, OPENCV)),
        (
            preprocess(picture, size, color="bgr"),
            operation("preprocess")[side].preprocess(picture, size, (0, 0, 7, 5), True, torch.float32),
        ),
        (
            unproject(depth, (5.0, 6.0, 2.0, 3.0)),
            operation("unproject")[side].unproject(depth, (5.0, 6.0, 2.0, 3.0), None),
        ),
    ]
    for public, direct in pairs:
        assert torch.equal(public, direct)


def test_wrappers_refuse_wrong_layouts(device: str) -> None:
    split, log_dequantize, normals, preprocess, unproject = (
        getattr(operation(name)[0], name) for name in ("split", "log_dequantize", "normals", "preprocess", "unproject")
    )
    picture = noise(1, 3, 8, 8, device=device)
    wrong = [
        lambda: split(noise(1, 12, 128, device=device)[..., ::2], 32, 48, *SPLIT, torch.float32),
        lambda: split(noise(1, 13, 64, device=device), 32, 48, *SPLIT, torch.float32),
        lambda: log_dequantize(picture, (1, 0, 8, 8), (8, 8), 1.0, 0.0, True, (0.0, inf), False),
        lambda: normals(picture[:, :2], (0, 0, 8, 8), (8, 8), OPENCV),
        lambda: preprocess(picture[0], (8, 8), (0, 0, 8, 8), False, torch.float32),
        lambda: unproject(picture[0, 0].mT, (1.0, 1.0, 0.0, 0.0), None),
    ]
    for call in wrong:
        with pytest.raises(AssertionError):
            call()
