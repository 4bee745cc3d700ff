"""From samples and bundles to the table: alignment of sizes, baselines, skipped images, and the command itself."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from rich.console import Console
from sklearn.linear_model import LinearRegression
from typer.testing import CliRunner, Result

from densegeo.benchmarks import accuracy
from densegeo.benchmarks.accuracy import Options, Prediction, constant, evaluate, vertical_gradient
from densegeo.benchmarks.heldout import DEPTH_RANGE, synthetic_split
from densegeo.benchmarks.layouts import Sample, Split
from densegeo.errors import ConfigError, DatasetError
from densegeo.runtime import Estimator
from tests.support.datasets import picture, slow_angle, write
from tests.support.toy_bundle import make_toy_bundle

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
Float = NDArray[np.float32]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles of one model, in two precisions by name."""
    folder = tmp_path_factory.mktemp("bundles")
    return [make_toy_bundle(folder / precision, precision=precision) for precision in ("fp32", "fp16")]


def sample(depth: Float | None, normals: Float | None = None, size: tuple[int, int] = (6, 4)) -> Sample:
    """A grey picture of (height, width) `size`; NaN and zero vectors are invalid."""
    return Sample(
        name="made",
        rgb=np.full((*size, 3), 128, dtype=np.uint8),
        depth=depth,
        depth_valid=None if depth is None else np.isfinite(depth),
        normals=normals,
        normals_valid=None if normals is None else np.linalg.norm(normals, axis=-1) > 0,
    )


def split(*samples: Sample) -> Split:
    return Split("made", (1e-3, 100.0), len(samples), lambda: iter(samples))


def test_baselines_on_scenes_that_they_describe() -> None:
    wall = sample(np.full((6, 4), 3.0, dtype=np.float32), np.broadcast_to(np.float32([0, 0, -1]), (6, 4, 3)))
    (row,) = evaluate(split(wall), [("constant", constant)])
    assert row.depth is not None
    assert row.normals is not None
    assert row.depth.abs_rel == pytest.approx(0, abs=1e-6)
    assert row.normals.mean == 0
    assert row.normals.below_5 == 100

    falling = np.exp(2 - 0.3 * np.arange(6, dtype=np.float32))[:, None].repeat(4, axis=1)
    floor = np.zeros((6, 4, 3), dtype=np.float32)
    floor[3:, :, 1] = -1
    (row,) = evaluate(split(sample(falling, floor)), [("vertical gradient", vertical_gradient)])
    assert row.depth is not None
    assert row.normals is not None
    assert row.depth.abs_rel == pytest.approx(0, abs=1e-5)
    assert row.normals.mean == 0
    assert row.normals.pixels == 12


def test_images_without_a_valid_pixel_are_skipped_and_counted() -> None:
    empty = sample(np.full((6, 4), np.nan, dtype=np.float32), np.zeros((6, 4, 3), dtype=np.float32))
    full = sample(np.full((6, 4), 3.0, dtype=np.float32))
    called = []
    (row,) = evaluate(split(empty, full, empty), [("constant", constant)], lambda: called.append(None))
    assert (row.depth_images, row.normal_images, row.skipped, len(called)) == (1, 0, 2, 3)
    assert row.depth is not None
    assert row.depth.delta1 == 1
    (row,) = evaluate(split(empty), [("constant", constant)])
    assert (row.depth, row.normals, row.skipped) == (None, None, 1)


def test_a_model_without_normals_has_no_normal_scores() -> None:
    both = sample(np.full((6, 4), 3.0, dtype=np.float32), np.broadcast_to(np.float32([0, 0, -1]), (6, 4, 3)))
    flat = Prediction(np.ones((6, 4), dtype=np.float32), "affine", None)
    other, row = evaluate(split(both), [("constant", constant), ("depth only", lambda _: flat)])
    assert other.normals is not None
    assert row.depth is not None
    assert (row.normals, row.normal_images, row.skipped) == (None, 0, 0)


def test_predictions_are_resized_to_the_truth() -> None:
    """Bilinear with half-pixel centres: twice the width puts samples at a quarter and three quarters."""
    prediction = np.array([[0.0, 1.0]], dtype=np.float32)
    truth = np.exp(np.array([[0.0, 0.25, 0.75, 1.0]], dtype=np.float32))
    (row,) = evaluate(split(sample(truth)), [("p", lambda _: Prediction(prediction, "log_affine", None))])
    assert row.depth is not None
    assert row.depth.rmse_log == pytest.approx(0, abs=1e-6)


@pytest.mark.thorough
def test_bundles_score_as_a_second_implementation_says(bundles: list[Path]) -> None:
    """The whole path on two rendered views, again from the estimator's arrays, with other tools."""
    views = list(synthetic_split(2).samples())
    made = accuracy.measure(bundles, synthetic_split(2), Options(device="cpu"), Console(quiet=True))
    assert [row.predictor for row in made] == ["constant", "vertical gradient", *map(str, bundles)]
    assert [row.precision for row in made] == [None, None, "fp32", "fp16"]
    assert made[2].depth == made[3].depth  # one model under two names
    relative, logarithmic, degrees = [], [], []
    with Estimator(bundles[0], device="cpu") as estimator:
        for view in views:
            assert view.depth is not None
            assert view.depth_valid is not None
            assert view.normals is not None
            geometry = estimator(view.rgb)
            p, z = geometry.prediction[view.depth_valid].tolist(), view.depth[view.depth_valid].tolist()
            fitted = [(a, math.log(b)) for a, b in zip(p, z, strict=True) if a > 0]
            model = LinearRegression().fit([[a] for a, _ in fitted], [b for _, b in fitted])
            line = [min(float(model.coef_[0]) * a + float(model.intercept_), 5.0) for a in p]
            depth = [min(max(math.exp(a), DEPTH_RANGE[0]), DEPTH_RANGE[1]) for a in line]
            relative.append(statistics.fmean(abs(a - b) / b for a, b in zip(depth, z, strict=True)))
            logs = [(math.log(a) - math.log(b)) ** 2 for a, b in zip(depth, z, strict=True)]
            logarithmic.append(math.sqrt(statistics.fmean(logs)))
            assert geometry.normals is not None
            valid = view.normals_valid
            pairs = zip(geometry.normals[valid].tolist(), view.normals[valid].tolist(), strict=True)
            degrees += [slow_angle(a, b) for a, b in pairs]
    row = made[2]
    assert row.depth is not None
    assert row.normals is not None
    assert row.depth.abs_rel == pytest.approx(statistics.fmean(relative), rel=1e-5)
    assert row.depth.rmse_log == pytest.approx(statistics.fmean(logarithmic), rel=1e-5)
    assert row.normals.pixels == len(degrees)
    assert row.normals.mean == pytest.approx(statistics.fmean(degrees), abs=1e-3)
    assert row.normals.median == pytest.approx(statistics.median(degrees), abs=2e-3)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(accuracy.main)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def invoke(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(bundles: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "results" / "accuracy.json"
    output = invoke(*map(str, bundles), "--views", "2", "--json", str(file))
    for text in ("synthetic, 2 images", "AbsRel", "<11.25° %", "constant", "vertical gradient", "fp16", "frozen split"):
        assert text in output
    result = json.loads(output.splitlines()[-1])
    assert json.loads(file.read_text()) == result
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert result["images"] == 2
    assert len(result["rows"]) == 4
    assert result["rows"][3]["model"] == "toy"
    assert 0 < result["rows"][3]["depth"]["abs_rel"] < math.inf
    for key in ("machine", "versions", "commit", "command"):
        assert key in result


def test_the_command_on_data_of_ones_own(bundles: list[Path], tmp_path: Path) -> None:
    """Depth columns alone for a depth set, normal columns alone for a normal set."""
    for name, present, absent in (("nyuv2", "AbsRel", "median"), ("scannet-normals", "median", "AbsRel")):
        root = tmp_path / name
        file_list = write(name, root)
        if name == "scannet-normals":  # estimators refuse pictures below 16x16 pixels
            picture(root / "scene0001_01/001170_img.png", 64, 16)
        output = invoke(str(bundles[0]), "--dataset", name, "--data", str(root), "--list", str(file_list))
        table = output.splitlines()[:-1]
        assert any(present in line for line in table)
        assert not any(absent in line for line in table)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--dataset", "nyu"], ConfigError, "choose synthetic, nyuv2, kitti"),
        (["--dataset", "nyuv2"], ConfigError, "--data"),
        (["--data", "x"], ConfigError, "takes neither"),
        (["--preprocessing", "none"], ConfigError, "densegeo or authors"),
        (["--dataset", "nyuv2", "--data", "nowhere"], DatasetError, "nowhere does not exist"),
    ],
)
def test_wrong_requests(arguments: list[str], error: type[Exception], message: str, bundles: list[Path]) -> None:
    with pytest.raises(error, match=message):
        invoke(str(bundles[0]), *arguments)


def test_the_script_fails_with_one_line(tmp_path: Path, bundles: list[Path]) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), str(bundles[0]), "--dataset", "kitti"]
    result = subprocess.run([*script, "--data", str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert f"{tmp_path / 'eigen_test_files_with_gt.txt'}" in line


def test_a_folder_that_is_no_bundle_is_wrong_usage(tmp_path: Path) -> None:
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert "is not a densegeo bundle" in " ".join(result.output.replace("│", " ").split())


def test_it_runs_without_torch() -> None:
    code = "import sys, densegeo.benchmarks.accuracy; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
