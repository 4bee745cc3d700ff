"""Decoding against the numbers of the authors' code, and its edge cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from densegeo.outputs import Decode, Output, into_opencv
from densegeo.runtime.decode import clamped_normals, depth_prediction, latents_of, make_unit, turned, unpack
from densegeo.size import Size

BOUND = 1e-5  # relative L2, float32
FE2E = Decode(
    packing="tokens",
    outputs=(
        Output(kind="depth", clamp="before_mean", factor=-1, space="log_affine"),
        Output(kind="normals", clamp="before_mean", frame="dsine"),
    ),
    latent_scale=0.3611,
    latent_shift=0.1159,
)


def unit(normals: np.ndarray) -> np.ndarray:
    """(H, W, 3) through `make_unit`."""
    made = np.empty_like(normals)
    make_unit(np.ascontiguousarray(normals.transpose(2, 0, 1)), made)
    return made


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def numbers(each_golden: Path) -> dict[str, np.ndarray]:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    return dict(load_file(each_golden / "fe2e_small" / "expected.safetensors"))


@pytest.mark.parametrize("run", ["base", "lora"])
def test_golden_latents(numbers: dict[str, np.ndarray], run: str) -> None:
    height, width = numbers[f"{run}.depth_decoded"].shape[-2:]
    latents = latents_of(numbers[f"{run}.velocity"], Size(width, height), FE2E)
    for row, name in enumerate(("depth", "normal")):
        golden = numbers[f"{run}.{name}_latent"][0]  # stored before scale and shift are undone
        assert error(latents[row], golden / np.float32(0.3611) + np.float32(0.1159)) <= BOUND


@pytest.mark.parametrize("run", ["base", "lora"])
def test_golden_pictures(numbers: dict[str, np.ndarray], run: str) -> None:
    decoded = numbers[f"{run}.depth_decoded"][0]
    assert np.abs(decoded).max() > 1  # the clamp must matter
    assert error(depth_prediction(decoded, "before_mean"), numbers[f"{run}.depth01"][0]) <= BOUND
    clamped = clamped_normals(numbers[f"{run}.normal_decoded"][0])
    assert error(clamped, numbers[f"{run}.normal_clamped"][0].transpose(1, 2, 0)) <= BOUND
    assert error(unit(clamped), numbers[f"{run}.normal_unit"][0].transpose(1, 2, 0)) <= BOUND


def test_unpack_places_tokens_row_by_row() -> None:
    tokens = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)  # 2 rows, 3 columns, 2 channels
    latents = unpack(np.stack([tokens, -tokens]), Size(48, 32))
    assert latents.shape == (2, 2, 4, 6)
    np.testing.assert_array_equal(latents[1], -latents[0])
    latent = latents[0]
    for row in range(2):
        for column in range(3):
            block = latent[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(block.ravel(), tokens[3 * row + column])


def test_clamp_comes_before_the_mean() -> None:
    decoded = np.array([3.0, -1.0, -1.0], np.float32).reshape(3, 1, 1)
    np.testing.assert_allclose(depth_prediction(decoded, "before_mean"), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(depth_prediction(decoded, "after_mean"), 2 / 3, rtol=1e-6)


def test_unit_normals_survive_zero_and_tiny_vectors() -> None:
    normals = np.array([[[0, 0, 0], [0, 3, 4], [1e-12, 0, 0]]], np.float32)
    np.testing.assert_allclose(unit(normals)[0], [[0, 0, 0], [0, 0.6, 0.8], [1e-3, 0, 0]], rtol=1e-5)


def test_a_wall_that_faces_the_camera() -> None:
    wall = np.array([[[0, 0, 1]]], np.float32)
    np.testing.assert_array_equal(turned(wall, into_opencv("dsine")), [[[0, 0, -1]]])
