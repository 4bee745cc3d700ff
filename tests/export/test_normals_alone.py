"""A model of normals alone: one row, and everything from its checkpoint to a `Geometry` follows.

The same U-Net as FiffDepth's at another timestep, its decoded picture read as normals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from densegeo.errors import MissingOutputError  # noqa: E402
from densegeo.export.build import build_bundle  # noqa: E402
from densegeo.export.build_options import BuildOptions  # noqa: E402
from densegeo.export.sources import SourceOptions  # noqa: E402
from densegeo.models.families import FAMILIES, FIFFDEPTH  # noqa: E402
from densegeo.models.presets import PRESETS, Preset  # noqa: E402
from densegeo.models.published import PUBLICATIONS, Publication  # noqa: E402
from densegeo.outputs import Output  # noqa: E402
from densegeo.runtime import Estimator, Geometry  # noqa: E402
from densegeo.runtime.backends.torch_modules import TorchBackend  # noqa: E402
from densegeo.runtime.bundle import read_manifest  # noqa: E402
from densegeo.runtime.faults import NoSuchStageError  # noqa: E402
from densegeo.runtime.images import load_image  # noqa: E402
from densegeo.runtime.resample import prepare, whole  # noqa: E402
from densegeo.runtime.verify import verify  # noqa: E402
from densegeo.size import Size  # noqa: E402
from tests.support.diffusers_checkpoint import CASES, modules, prompt  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.thorough]
NAME, CASE, TIMESTEP = "unet-normals", CASES[0], 999.0
FAMILY = replace(
    FIFFDEPTH, name=NAME, timestep=TIMESTEP, outputs=(Output(kind="normals", clamp="before_mean", frame="opengl"),)
)


@pytest.fixture(scope="module")
def bundle(
    diffusers_files: Callable[[Any], Path], tmp_path_factory: pytest.TempPathFactory, graphs_once: Path
) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, NAME, FAMILY)
        patch.setitem(PRESETS, NAME, Preset(NAME, FAMILY, (Size(*CASE.size),)))
        patch.setitem(PUBLICATIONS, NAME, Publication(NAME, nowhere="nowhere"))
        output = tmp_path_factory.mktemp("normals") / "bundle"
        given = SourceOptions(checkpoint=str(diffusers_files(CASE)))
        yield build_bundle(BuildOptions(model=NAME, output=output, source=given))


@pytest.fixture
def image() -> np.ndarray:
    width, height = CASE.size
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def diffusers_normals(image: np.ndarray) -> np.ndarray:
    """What diffusers' own modules make of the picture: clipped, unit, x right, y down, z forward."""
    unet, vae = modules(CASE)
    size = Size(image.shape[1], image.shape[0])
    rgb = torch.from_numpy(prepare(load_image(image), size, whole(size)))
    with torch.no_grad():
        latent = vae.encode(rgb).latent_dist.mean * vae.config.scaling_factor
        moved = unet(latent, TIMESTEP, encoder_hidden_states=prompt(CASE)).sample
        picture = vae.decode(moved / vae.config.scaling_factor).sample[0].clamp(-1, 1)
    unit = picture / picture.norm(dim=0).clamp(min=1e-9)
    return np.asarray((unit * torch.tensor([1.0, -1.0, -1.0])[:, None, None]).permute(1, 2, 0))


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_normals_are_those_of_diffusers(bundle: Path, image: np.ndarray, backend: str) -> None:
    with Estimator(bundle, backend, "cpu") as estimator:
        geometry = estimator(image)
    expected = diffusers_normals(image)
    assert expected.std() > 0.05
    assert geometry.normals is not None
    assert np.linalg.norm(geometry.normals - expected) <= 1e-5 * np.linalg.norm(expected)
    assert (geometry.prediction, geometry.depth_kind) == (None, None)
    assert geometry.valid.all()


def test_both_ways_are_verified_and_would_notice(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.decode.names == ("normals",)
    assert "channel-mean" in manifest.rewrites  # and changed nothing: normals have no mean
    with pytest.raises(NoSuchStageError, match="resize"):
        verify(bundle, "torch", "cpu", frames_on_cpu=True, broken="resize")
    for way in ({"backend": "onnxruntime"}, {"backend": "torch", "frames_on_cpu": True}):
        verdict = verify(bundle, device="cpu", **way)  # type: ignore[arg-type]
        assert verdict.good
        assert {check.output for check in verdict.served} == {"normals"}
        assert not verify(bundle, device="cpu", broken="normals", **way).good  # type: ignore[arg-type]


def test_a_device_keeps_normals_and_no_prediction(bundle: Path, image: np.ndarray) -> None:
    manifest = read_manifest(bundle)
    backend = TorchBackend(bundle, manifest, "cpu", frames_on_cpu=True)
    with Estimator.from_backend(backend, manifest, max_batch=2) as estimator:
        prediction, normals = estimator.tensors(image)
        assert prediction is None
        assert normals.shape == image.shape
        with pytest.raises(MissingOutputError):
            estimator.tensors(image, scale=1.0, shift=0.0)
        first, second = estimator.batch([image, image[::-1].copy()])
        assert first.prediction is second.prediction is None


def test_what_needs_depth_says_that_there_is_none(bundle: Path, image: np.ndarray, tmp_path: Path) -> None:
    with Estimator(bundle, "onnxruntime", "cpu") as estimator:
        geometry = estimator(image)
    for ask in (
        lambda one: one.depth,
        lambda one: one.to_metric(near=1, far=2),
        lambda one: one.points((50, 50, 8, 8)),
        lambda one: one.save(tmp_path / "out", ["png16"]),
        lambda one: one.save(tmp_path / "out", ["ply"], intrinsics=(50, 50, 8, 8)),
    ):
        with pytest.raises(MissingOutputError, match=f"{NAME} predicts normals alone"):
            ask(geometry)
    assert not (tmp_path / "out").exists()
    require_files(geometry, tmp_path, image)


def require_files(geometry: Geometry, folder: Path, image: np.ndarray) -> None:
    names = [path.name for path in geometry.save(folder, ["npy", "png"])]
    assert names == ["valid.npy", "normals.npy", "geometry.json", "normals.png"]
    width, height = geometry.source_size
    assert geometry.visualize(image).size == (2 * width, height)  # the picture and its normals
