"""The references against things written without them: the runtime's numpy and Pillow code, and torch's own resizing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from densegeo.outputs import Decode, Output
from densegeo.runtime import decode
from densegeo.runtime.host_chain import assemble
from densegeo.runtime.images import load_image
from densegeo.runtime.metric import SPACES, Calibration, metric_depth
from densegeo.runtime.resample import Placement, place, prepare, restore
from densegeo.size import Size

torch = pytest.importorskip("torch")

from densegeo.benchmarks.setups import FULL  # noqa: E402
from densegeo.kernels.normals import normals  # noqa: E402
from densegeo.kernels.preprocess import preprocess  # noqa: E402
from densegeo.kernels.resize_depth import Metres, resize_depth  # noqa: E402
from densegeo.kernels.sampling.reference import plain  # noqa: E402
from densegeo.kernels.split import split  # noqa: E402
from densegeo.models.families import FE2E  # noqa: E402

BOUND = 1e-5
PLACEMENTS = [
    Placement((0, 0, 40, 32), (40, 32)),
    Placement((3, 0, 33, 32), (81, 77)),
    Placement((0, 4, 40, 24), (17, 9)),
]
NORMALS = Decode(packing="latent", outputs=(Output(kind="normals", clamp="before_mean", frame="dsine"),))


def noise(*shape: int) -> Any:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


def test_split_equals_the_runtime() -> None:
    settings = FE2E.decode(FULL.vae)
    velocity = noise(2, 2 * 3 * 5, 64)
    latents = split(torch.from_numpy(velocity), 48, 80).numpy()
    assert latents.shape == (4, 16, 6, 10)
    for picture in range(2):
        expected = decode.latents_of(velocity[picture : picture + 1], Size(80, 48), settings)
        np.testing.assert_allclose(latents[[picture, 2 + picture]], expected, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (200, 150), (97, 71), (1, 1)])
def test_plain_equals_torch(size: tuple[int, int]) -> None:
    pictures = torch.from_numpy(noise(2, 3, 71, 97)).double()
    expected = torch.nn.functional.interpolate(pictures, size[::-1], mode="bilinear", align_corners=False)
    torch.testing.assert_close(plain(pictures, (0, 0, 97, 71), size), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_resize_depth_equals_the_runtime(placement: Placement) -> None:
    decoded = noise(2, 3, 32, 40)
    prediction = resize_depth(torch.from_numpy(decoded), placement.box, placement.source)
    for picture in range(2):
        expected = restore(decode.depth_prediction(decoded[picture], "before_mean"), placement)
        np.testing.assert_allclose(prediction[picture], expected, atol=BOUND)


@pytest.mark.parametrize("space", list(SPACES))
def test_metres_equal_the_runtime(space: Any) -> None:
    """The line crosses zero, so that some of its depth is none."""
    decoded = torch.from_numpy(noise(2, 3, 32, 40))
    box, size = PLACEMENTS[1].box, PLACEMENTS[1].source
    prediction = resize_depth(decoded, box, size).numpy()
    expected = metric_depth(prediction, Calibration(space, 3.4, -1.2))
    depth = resize_depth(decoded, box, size, metres=Metres(space, 3.4, -1.2)).numpy()
    straight = SPACES[space].to  # errors are relative to the line's, which is near zero somewhere
    np.testing.assert_allclose(straight(depth), straight(expected), rtol=BOUND, atol=BOUND)
    assert np.isnan(depth).any() == (space != "log_affine")
    clipped = resize_depth(decoded, box, size, metres=Metres(space, 3.4, -1.2, 0.5, 2.0))
    np.testing.assert_allclose(clipped, np.clip(depth, 0.5, 2.0), rtol=1e-6)


def test_resize_depth_averages_before_clamping_when_asked() -> None:
    decoded = torch.tensor([3.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    before = resize_depth(decoded, (0, 0, 1, 1), (1, 1))
    after = resize_depth(decoded, (0, 0, 1, 1), (1, 1), clamp="after_mean")
    assert before.item() == pytest.approx(1 / 3)  # mean of 1, -1, -1
    assert after.item() == pytest.approx(2 / 3)  # mean of 3, -1, -1


def test_metres_are_clipped_and_nan_where_there_are_none() -> None:
    decoded = torch.tensor([[-1.0, 0.0, 1.0, torch.nan]]).expand(1, 3, 1, 4)
    depth = resize_depth(decoded, (0, 0, 4, 1), (4, 1), metres=Metres("log_affine", 4.0, 0.0, 2.0, 20.0))
    np.testing.assert_allclose(depth.flatten(), [2.0, np.exp(2.0), 20.0, np.nan], rtol=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_normals_equal_the_runtime(placement: Placement) -> None:
    decoded = noise(2, 3, 32, 40)
    ours = normals(torch.from_numpy(decoded), placement.box, placement.source).numpy()
    for picture in range(2):
        expected = assemble(decoded[picture][None], placement, NORMALS).normals
        np.testing.assert_allclose(ours[picture], expected, atol=2 * BOUND)  # the resized ones are float32, and short


@pytest.mark.parametrize("size", [(64, 48), (32, 16), (200, 160), (16, 112)])
def test_preprocess_equals_torch(size: tuple[int, int], picture: Any) -> None:
    floats = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255
    expected = torch.nn.functional.interpolate(floats, size[::-1], mode="bilinear", align_corners=False, antialias=True)
    ours = preprocess(torch.from_numpy(picture), size, dtype=torch.float64)
    torch.testing.assert_close(ours, 2 * expected - 1, rtol=0, atol=1e-12)
    bgr = preprocess(torch.from_numpy(picture[..., ::-1].copy()), size, color="bgr", dtype=torch.float64)
    torch.testing.assert_close(bgr, ours, rtol=0, atol=0)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_preprocess_equals_the_runtime(fit: str, picture: Any) -> None:
    bucket = Size(64, 80)
    frame = load_image(picture)
    placement = place(bucket, frame.size, fit)
    expected = prepare(frame, bucket, placement)
    ours = preprocess(torch.from_numpy(picture), (64, 80), box=placement.box)
    np.testing.assert_allclose(ours, expected, atol=BOUND)
