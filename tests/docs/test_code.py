"""The Python on the pages runs as it is."""

from __future__ import annotations

import doctest
import sys
import types
from dataclasses import replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from densegeo.errors import NotMetricError
from densegeo.runtime import Estimator
from tests.support.documentation import blocks
from tests.support.project import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """photo.jpg in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "photo.jpg"
    path.write_bytes(files("densegeo").joinpath("photographs/hall.jpg").read_bytes())
    return path


def run(page: Path, given: dict[str, Any]) -> dict[str, Any]:
    """A page's blocks, one after the other in one namespace; names that a reader has are given."""
    for body in blocks(page, "python"):
        exec(compile(body, str(page), "exec"), given)
    return given


def test_the_readme_and_the_first_page(photograph: Path) -> None:
    (short,), (long,) = blocks(DOCS / "index.md", "python"), blocks(ROOT / "README.md", "python")
    assert short.splitlines()[-1] == 'geometry = Estimator("fe2e-tiny")("photo.jpg")'  # two of the README's lines
    assert long.startswith(short.splitlines()[0])
    made = run(ROOT / "README.md", {})
    assert made["metric"].depth.shape == made["geometry"].prediction.shape == (384, 512)
    with pytest.raises(NotMetricError):
        _ = made["geometry"].depth
    assert "`NotMetricError` until you say" in (DOCS / "python.md").read_text()
    assert (photograph.parent / "results" / "photo_normals.npy").is_file()


@pytest.mark.integration
def test_python(photograph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that nobody feeds would wait for ever: here it is closed as it is made."""
    pytest.importorskip("prometheus_client")
    Image.open(photograph).resize((256, 192)).save(photograph)
    published: list[Any] = []
    stream = Estimator.stream

    def fed(self: Estimator, *arguments: Any, **options: Any) -> Any:
        made = stream(self, *arguments, **options)
        made.put(photograph.read_bytes(), stamp=1.5)
        made.close()
        return made

    monkeypatch.setattr(Estimator, "stream", fed)
    uv = np.array([[50, 150], [128, 100], [200, 175], [150, 50]])
    given = {"uv": uv, "metres": np.array([3.0, 7.0, 2.5, 9.0]), "publish": lambda *found: published.append(found)}
    given |= {"fx": 200.0, "fy": 200.0, "cx": 127.5, "cy": 95.5}
    made = run(DOCS / "python.md", given)
    assert made["shape"].depth_kind == "up_to_scale"
    assert made["metric"].depth_kind == "metric"
    assert (photograph.parent / "results" / "photo_points.ply").is_file()
    assert [found[0] for found in published] == [1.5]


def test_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    run(DOCS / "robots.md", {"Estimator": Estimator})


@pytest.mark.integration
@pytest.mark.thorough  # tests/test_examples.py has the same as a program
def test_a_client(photograph: Path) -> None:
    pytest.importorskip("tritonclient.http")
    from tests.support.serving import started

    (body,) = blocks(DOCS / "serving.md", "python")
    pixels = np.zeros((48, 64, 3), np.uint8)
    with started("fe2e-tiny", "--threads", "1") as server:
        assert '"127.0.0.1:8000"' in body
        text = body.replace("127.0.0.1:8000", server.url.removeprefix("http://"))
        made: dict[str, Any] = {"pixels": pixels}
        exec(compile(text, "docs/serving.md", "exec"), made)
    assert made["result"].as_numpy("depth").shape == (48, 64)


def test_the_toy_backend_runs_a_bundle(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/add-a-backend.md: its row and its module, put where it says, give ONNX Runtime's results."""
    pytest.importorskip("onnx")
    from densegeo import backends
    from densegeo.runtime import backends as opening

    row, module = blocks(DOCS / "add-a-backend.md", "python")
    made = types.ModuleType("densegeo.runtime.backends.onnx_reference")
    exec(compile(module, "onnx_reference.py", "exec"), made.__dict__)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    added = eval(row, vars(backends))
    monkeypatch.setattr(opening, "BACKENDS", (*backends.BACKENDS, added))
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with Estimator(toy_bundle, "reference") as ours, Estimator(toy_bundle, "onnxruntime", "cpu") as theirs:
        result, expected = ours(image), theirs(image)
    np.testing.assert_allclose(result.prediction, expected.prediction, atol=1e-6)
    np.testing.assert_allclose(result.normals, expected.normals, atol=1e-5)


def test_the_toy_model_is_the_one_that_is_tested() -> None:
    """docs/add-a-model.md: its rows are those of tests/export/test_normals_alone.py, which builds the model."""
    pytest.importorskip("torch")
    from densegeo.models import families, presets, published, roles
    from densegeo.outputs import Output
    from densegeo.size import Size

    family, preset, publication = blocks(DOCS / "add-a-model.md", "python")
    given: dict[str, Any] = {**vars(families), "replace": replace, "Output": Output}
    exec(family, given)
    made = given["UNET_NORMALS"]
    assert set(given["FAMILIES"]) == {*families.FAMILIES, "unet-normals"}
    tested = (ROOT / "tests" / "export" / "test_normals_alone.py").read_text()
    assert 'NAME, CASE, TIMESTEP = "unet-normals", CASES[0], 999.0' in tested
    assert 'outputs=(Output(kind="normals", clamp="before_mean", frame="opengl"),)' in tested
    assert made.outputs == (Output(kind="normals", clamp="before_mean", frame="opengl"),)
    assert (made.name, made.timestep) == ("unet-normals", 999.0)
    row = eval(preset, {"Preset": presets.Preset, "UNET_NORMALS": made, "Size": Size})
    where = eval(publication, {"Publication": published.Publication, "FIFFDEPTH_ROLES": roles.FIFFDEPTH_ROLES})
    assert (row.name, where.model) == ("unet-normals", "unet-normals")


@pytest.mark.parametrize(
    "module",
    [
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("estimator", "stream")),
        *("geometry", "camera", "metric", "tracker", "bundle"),
    ],
)
def test_examples_in_docstrings(photograph: Path, module: str) -> None:
    actual = doctest.testmod(import_module(f"densegeo.runtime.{module}"))
    assert actual.attempted > 1
    assert actual.failed == 0
