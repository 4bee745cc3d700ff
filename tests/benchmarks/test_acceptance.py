"""The acceptance of a model, from its checkpoint to the verdict: it can fail, it can pass, half a set never passes."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from densegeo.benchmarks import acceptance, layouts
from densegeo.benchmarks.acceptance import PUBLISHED, Figure, Published
from densegeo.errors import ConfigError, DatasetError
from tests.support import datasets
from tests.support.project import ROOT
from tests.support.shared import Build

COUNT = 1  # images of each toy set


def write_eth3d(root: Path) -> list[str]:
    """As Marigold's evaluation lays it out: a JPEG, and raw float32 metres of its size."""
    rgb, truth = "rgb/office/images/dslr_images/DSC_0219.JPG", "depth/office_dslr_depth/DSC_0219.JPG"
    datasets.picture(root / rgb, 64, 48)
    (root / truth).parent.mkdir(parents=True)
    depth = np.linspace(1, 9, 64 * 48, dtype="<f4")
    depth[5] = np.inf
    (root / truth).write_bytes(depth.tobytes())
    return [f"{rgb} {truth}"]


def write_scannet_normals(root: Path) -> list[str]:
    """As DSINE's: the line names the picture alone."""
    datasets.picture(root / "scene/000000_img.png", 64, 48)
    colours = np.repeat(np.repeat(datasets.COLOURS, 48, axis=0), 16, axis=1)
    Image.fromarray(colours).save(root / "scene/000000_normal.png")
    return ["scene/000000_img.png"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both sets in their public layouts, of one image each."""
    folder = tmp_path / "data"
    for name, layout in (("eth3d", write_eth3d), ("scannet-normals", write_scannet_normals)):
        row = layouts.DATASETS[name]
        (folder / name).mkdir(parents=True)
        (folder / name / row.lists[0]).write_text("\n".join(layout(folder / name)))
        monkeypatch.setitem(layouts.DATASETS, name, dataclasses.replace(row, count=COUNT))  # type: ignore[arg-type]
    return folder


@pytest.fixture(
    params=[pytest.param("bundle", marks=pytest.mark.thorough), pytest.param("checkpoint", marks=pytest.mark.slow)]
)
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_bundle: Build) -> None:
    """From the checkpoint, by `densegeo build`; or, as long as that takes, from what it made before."""
    if request.param == "bundle":
        monkeypatch.setattr(
            acceptance, "build", lambda *given: shutil.copytree(small_bundle(), given[3], dirs_exist_ok=True)
        )


def command(data: Path, out: Path, checkpoint: Path, *more: str) -> tuple[int, dict[str, Any]]:
    app = typer.Typer()
    app.command(context_settings={"allow_extra_args": True})(acceptance.main)
    words = ["--checkpoint", str(checkpoint), "--data", str(data), "-o", str(out / "bundle")]
    words += ["--json", str(out / "x.json"), "--preprocessing", "densegeo", "--size", "48x32", *more]
    build = ["--config", str(checkpoint / "config.json"), "--no-lora", "--precision", "fp32"]
    result = CliRunner().invoke(app, [*words, "--", *build, "--backend", "onnxruntime"], catch_exceptions=False)
    return result.exit_code, json.loads((out / "x.json").read_text())


@pytest.mark.integration
@pytest.mark.usefixtures("start")
def test_a_checkpoint_fails_and_passes_by_its_scores(
    data: Path, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights are far from the real figures; held against what they do score, they pass."""
    code, failed = command(data, tmp_path, small_checkpoint, "--backend", "onnxruntime")
    assert code == 1
    assert not failed["passed"]
    assert failed["partial"] == []
    assert not any(one["met"] for one in failed["figures"] if one["dataset"] == "scannet-normals")
    assert failed["sets"]["eth3d"][-1]["depth_images"] == COUNT
    assert failed["sets"]["scannet-normals"][-1]["normals"]["pixels"] == 48 * 48
    assert {source["role"] for source in failed["bundle"]["sources"]} >= {"dit", "vae", "prompt"}
    assert failed["verified"][0] == "onnxruntime"

    measured = {(one["dataset"], one["score"]): one["measured"] for one in failed["figures"]}
    figures = PUBLISHED["fe2e"].figures
    own = [dataclasses.replace(one, published=measured[one.dataset, one.score]) for one in figures]
    monkeypatch.setitem(PUBLISHED, "fe2e", dataclasses.replace(PUBLISHED["fe2e"], figures=tuple(own)))
    code, passed = command(data, tmp_path, small_checkpoint)
    assert code == 0
    assert passed["passed"]
    assert {(one["dataset"], one["score"]): one["measured"] for one in passed["figures"]} == measured
    assert passed["bundle"]["build_key"] == failed["bundle"]["build_key"]

    monkeypatch.setitem(layouts.DATASETS, "eth3d", dataclasses.replace(layouts.DATASETS["eth3d"], count=2))  # type: ignore[arg-type]
    listed = data / "eth3d" / layouts.DATASETS["eth3d"].lists[0]
    listed.write_text(listed.read_text() + "\n" + listed.read_text())
    code, partial = command(data, tmp_path, small_checkpoint, "--views", "1")
    assert code == 1
    assert all(one["met"] for one in partial["figures"])
    assert partial["partial"] == ["eth3d: 1 images; the published split has 2"]


@pytest.mark.parametrize(
    ("rule", "published", "good", "bad"),
    [
        ("error", 0.0379, 0.0386, 0.0388),
        ("angle", 13.8166, 14.116, 14.118),
        ("share", 67.2134, 66.714, 66.712),
    ],
)
def test_how_far_off_a_score_may_be(rule: Any, published: float, good: float, bad: float) -> None:
    figure = Figure("x", "depth", "abs_rel", published, rule)
    assert figure.met(published)
    assert figure.met(good)
    assert not figure.met(bad)
    assert not figure.met(math.nan)


def test_the_figures_are_the_published_ones() -> None:
    actual = {(one.dataset, one.score): one.published for one in PUBLISHED["fe2e"].figures}
    assert actual == {
        ("eth3d", "abs_rel"): 0.0379,
        ("eth3d", "rmse"): 0.4701,
        ("eth3d", "delta1"): 98.77,
        ("scannet-normals", "mean"): 13.8166,
        ("scannet-normals", "below_11_25"): 67.2134,
    }


def test_missing_data_is_said_before_anything_is_built(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "build", lambda *_: pytest.fail("built first"))
    one: Published = PUBLISHED["fe2e"]
    with pytest.raises(ConfigError, match=r"no folder.*--data"):
        acceptance.open_sets(one, tmp_path / "nowhere", None)
    (data / "eth3d" / layouts.DATASETS["eth3d"].lists[0]).unlink()
    with pytest.raises(DatasetError, match=r"file list of eth3d was expected at .*eth3d_filename_list\.txt"):
        acceptance.run(
            "fe2e",
            "x",
            data,
            tmp_path / "bundle",
            acceptance.Options(),
            sizes=(),
            views=None,
            more=[],
        )


def test_make_says_what_it_needs() -> None:
    done = subprocess.run(
        ["make", "-n", "acceptance", "CHECKPOINT=a b", "DATA=c"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert '--checkpoint "a b" --data "c"' in done.stdout
