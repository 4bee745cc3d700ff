"""docs/bundle.md is enough to write a consumer: this one has nothing of densegeo and gives the stored results."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.project import ROOT

onnxruntime = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors.numpy")

PAGE = ROOT / "docs" / "bundle.md"
pytestmark = [pytest.mark.integration, pytest.mark.thorough]


def run(folder: Path, graph: dict[str, Any], array: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / graph["file"], providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {graph["inputs"][0]["name"]: array})
    return np.asarray(result)


def resized(planes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear without antialiasing, half-pixel centres, edges clamped: (C, H, W) -> (C, height, width)."""

    def taps(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
        first = np.floor(place).astype(int)
        return first, np.minimum(first + 1, size - 1), place - first

    left, right, across = taps(planes.shape[2], width)
    top, bottom, down = taps(planes.shape[1], height)
    wide = planes[:, :, left] * (1 - across) + planes[:, :, right] * across
    return np.asarray(wide[:, top] * (1 - down[:, None]) + wide[:, bottom] * down[:, None])


def consume(folder: Path, image: np.ndarray) -> dict[str, np.ndarray]:
    """Steps 1 to 7."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert f"**Schema version {manifest['schema_version']}.**" in PAGE.read_text()
    height, width = image.shape[:2]
    singles = [bucket for bucket in manifest["buckets"] if bucket["batch"] == 1]
    bucket = min(singles, key=lambda one: abs(np.log(width / height) - np.log(one["width"] / one["height"])))
    size = bucket["width"], bucket["height"]
    planes = [
        Image.fromarray(image[..., channel].astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        for channel in range(3)
    ]
    rgb = (2 * np.stack([np.asarray(plane) for plane in planes]) / 255 - 1).astype(np.float32)[None]

    output = run(folder, bucket["denoiser"], run(folder, bucket["encoder"], rgb))

    decode = manifest["decode"]
    assert decode["packing"] == "tokens"
    rows, columns = bucket["height"] // 16, bucket["width"] // 16
    halves = np.split(output, 2, axis=1)
    latents = []
    for half, row in zip(halves, decode["outputs"], strict=True):
        tokens = (row["factor"] * half[0]).reshape(rows, columns, -1, 2, 2)  # "(h w) (c 2 2)"
        latents.append(tokens.transpose(2, 0, 3, 1, 4).reshape(-1, 2 * rows, 2 * columns))
    joined = np.stack(latents) / decode["latent_scale"] + decode["latent_shift"]
    decoded = run(folder, bucket["decoder"], joined.astype(np.float32))

    actual = {}
    for picture, row in zip(decoded.astype(np.float64), decode["outputs"], strict=True):
        clamped = np.clip(picture, -1, 1)
        if row["kind"] == "depth":
            assert row["clamp"] == "before_mean"
            actual["prediction"] = resized(clamped.mean(0, keepdims=True) / 2 + 0.5, width, height)[0]
        else:
            assert row["frame"] == "dsine"
            normals = resized(-clamped, width, height)
            actual["normals"] = (normals / np.maximum(np.linalg.norm(normals, axis=0), 1e-9)).transpose(1, 2, 0)
    return actual


def test_a_consumer_that_was_written_from_the_page() -> None:
    folder = Path(str(files("densegeo").joinpath("runtime/bundles/fe2e-tiny")))
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = safetensors.load_file(folder / manifest["verification"]["inputs"])
    images = [name for name in stored if name.endswith(".image")]
    assert len(images) == 2
    for name in images:
        actual = consume(folder, stored[name])
        for output, bound in manifest["verification"]["bounds"].items():
            expected = stored[f"{name}_{output}"]
            assert np.linalg.norm(actual[output] - expected) <= bound * np.linalg.norm(expected), (name, output)
