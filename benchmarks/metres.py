"""Metres without a lidar, measured: scale from normals under noise, a network's own predictions with one more fact,
anchors with outliers, a wrong model, and moving cameras. docs/metres.md says what the rows mean.

    python benchmarks/metres.py --json benchmarks/results/metres_cpu.json     # --quick: a tenth of everything
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from densegeo.benchmarks.environment import environment, write_json
from densegeo.benchmarks.heldout import SEED, SIZE, SPLIT
from densegeo.benchmarks.noisy import NOISES, observed, shape_error
from densegeo.benchmarks.paths import FRAMES, path
from densegeo.errors import CalibrationError, CalibrationWarning
from densegeo.runtime import Camera, Estimator, ScaleTracker
from densegeo.runtime.normals_scale import scale_from_normals
from densegeo.size import Size
from densegeo.training.render import View, view

BOUNDS = (0.003, 0.012, 0.022, 0.040)  # AbsRel for each row of NOISES
SECOND_SEED = 101  # no choice was made on its views
GUESS = 2.1  # the median scale of training views
Record = dict[str, Any]
Float64 = NDArray[np.float64]


def views(seed: int, count: int) -> Iterator[View]:
    return (view(seed, SPLIT, index, *SIZE) for index in range(count))


def noise_table(count: int) -> list[Record]:
    """Must show 1; views that `to_scale` refuses count with a scale of GUESS."""
    rows = []
    for (noise, degrees), bound in zip(NOISES, BOUNDS, strict=True):
        rng, errors, scales, refused = np.random.default_rng(0), [], [], 0
        for seen in track(list(views(SEED, count)), f"noise {noise:.1%}, {degrees:g} degrees"):
            geometry, truth = observed(seen, rng, noise, degrees)
            try:
                found = geometry.to_scale(seen.intrinsics)
                scales.append(found.calibration.scale / truth)  # type: ignore[union-attr]
                errors.append(shape_error(seen, found.depth))
            except CalibrationError:
                refused += 1
                errors.append(shape_error(seen, np.exp(GUESS * geometry.require_prediction("depth"))))
        rows.append(
            {
                "noise": noise,
                "degrees": degrees,
                "abs_rel": float(np.mean(errors)),
                "bound": bound,
                "refused": refused,
                "scale_off": float(np.std(np.log(scales))),
            }
        )
    return rows


def own_predictions(estimator: Estimator, seed: int, count: int) -> Record:
    """Must show 2 and 4: medians of AbsRel, and the share of errors within one and two standard deviations."""
    errors: dict[str, list[float]] = defaultdict(list)
    inside: dict[str, list[float]] = defaultdict(list)
    refused: dict[str, int] = defaultdict(int)
    for index, seen in enumerate(track(list(views(seed, count)), f"own predictions, seed {seed}")):
        geometry, valid = estimator(seen.rgb), seen.valid
        p, truth = geometry.require_prediction("depth"), seen.depth
        scale, shift = np.polyfit(p[valid].astype(float), np.log(truth[valid].astype(float)), 1)
        errors["best line"].append(_abs_rel(seen, np.exp(scale * p + shift)))
        errors["best line, shape"].append(shape_error(seen, np.exp(scale * p)))
        errors["fixed guess, shape"].append(shape_error(seen, np.exp(GUESS * p)))
        errors["scale 1, shape"].append(shape_error(seen, np.exp(p)))
        rng = np.random.default_rng([seed, index])
        rows, columns = np.nonzero(valid)
        at = rng.permutation(len(rows))[:10]
        uv, metres = np.stack([columns[at], rows[at]], axis=1), truth[rows[at], columns[at]]
        for name, number in (("normals, shape", 0), ("one anchor", 1), ("ten anchors", 10)):
            try:
                if number:
                    found = geometry.to_metric(seen.intrinsics, anchors=(uv[:number], metres[:number]))
                else:
                    found = geometry.to_scale(seen.intrinsics)
            except CalibrationError:
                refused[name] += 1
                continue
            assert found.calibration is not None
            if name == "normals, shape":
                errors[name].append(shape_error(seen, found.depth))
                z = (found.calibration.scale - scale) / np.sqrt(found.calibration.variance[0])
            else:
                errors[name].append(_abs_rel(seen, found.depth))
                gap = np.median(np.log(found.depth[valid]) - np.log(truth[valid]))
                z = gap / np.median(found.calibration.uncertainty(p[valid]))
            inside[name].append(abs(float(z)))
    return {
        "seed": seed,
        "median_abs_rel": {name: float(np.median(values)) for name, values in errors.items()},
        "refused": dict(refused),
        "within_one_sigma": {name: float(np.mean(np.array(values) < 1)) for name, values in inside.items()},
        "within_two_sigma": {name: float(np.mean(np.array(values) < 2)) for name, values in inside.items()},
    }


def _abs_rel(seen: View, depth: NDArray[Any]) -> float:
    return float(np.mean(np.abs(depth[seen.valid] / seen.depth[seen.valid] - 1)))


def anchors_table(estimator: Estimator, count: int) -> list[Record]:
    """The 100 held-out views at 3 to 400 anchors with outliers: AbsRel over that of the best line, medians."""
    found: dict[tuple[int, float], list[float]] = defaultdict(list)
    refused: dict[tuple[int, float], int] = defaultdict(int)
    for index, seen in enumerate(track(list(views(SEED, count)), "anchors")):
        geometry = estimator(seen.rgb)
        p, valid = geometry.require_prediction("depth"), seen.valid
        scale, shift = np.polyfit(p[valid].astype(float), np.log(seen.depth[valid].astype(float)), 1)
        best = _abs_rel(seen, np.exp(scale * p + shift))
        rows, columns = np.nonzero(valid)
        rng = np.random.default_rng([9, index])
        for number in (3, 10, 100, 400):
            at = rng.permutation(len(rows))[:number]
            uv, exact = np.stack([columns[at], rows[at]], axis=1), seen.depth[rows[at], columns[at]].astype(float)
            for outliers in (0.0, 0.3, 0.45):
                metres = exact.copy()
                wrong = int(outliers * number)
                metres[:wrong] = rng.uniform(0.3, 60, wrong)
                try:
                    error = _abs_rel(seen, geometry.to_metric(seen.intrinsics, anchors=(uv, metres)).depth)
                    found[number, outliers].append(error / best)
                except CalibrationError:
                    refused[number, outliers] += 1
    return [
        {"anchors": n, "outliers": o, "over_best_line": float(np.median(v)), "refused": refused[n, o]}
        for (n, o), v in found.items()
    ]


def motorcycle(estimator: Estimator, anchors: int = 400) -> Record:
    """A model that is wrong: 39 crops panned over Middlebury's motorcycle, exact anchors, each from the last's line."""
    folder = files("skimage") / "data"  # its loader would also fetch the right image, which the wheel has not
    left = np.asarray(Image.open(BytesIO((folder / "motorcycle_left.png").read_bytes())).convert("RGB"))
    disparity = np.load(BytesIO((folder / "motorcycle_disp.npz").read_bytes()))["arr_0"]
    depth = 994.978 * 0.193001 / (disparity + 31.086)  # Middlebury's calib.txt at this size: f, baseline, doffs
    scales: dict[str, list[float]] = {"alone": [], "with the last as prior": []}
    refused, prior = 0, None
    for crop in range(39):
        part = (slice(0, 480), slice(crop * 2, crop * 2 + 640))
        geometry = estimator(np.ascontiguousarray(left[part]))
        rows, columns = np.nonzero(np.isfinite(depth[part]) & (depth[part] > 0))
        at = np.random.default_rng(crop).permutation(len(rows))[:anchors]
        given = (np.stack([columns[at], rows[at]], axis=1), depth[part][rows[at], columns[at]])
        for name in scales:
            try:
                found = geometry.to_metric(anchors=given, prior=prior if name != "alone" else None).calibration
                assert found is not None
                scales[name].append(found.scale)
                prior = found if name != "alone" else prior
            except CalibrationError:
                refused += 1
    steps = {name: float(np.abs(np.diff(np.log(values))).max()) for name, values in scales.items()}
    return {"refused": refused, "largest_step_of_ln_scale": steps, "scales": scales}


def moving_camera(estimator: Estimator, seed: int, frames: int, cut: int | None = None) -> Record:
    """One range reading a frame near the image's middle: frames by themselves, and tracked."""
    tracker, before_view = ScaleTracker(), None
    jumps: dict[str, list[float]] = defaultdict(list)
    errors: dict[str, list[float]] = defaultdict(list)
    resets, last = [], dict[str, NDArray[np.float32]]()
    for index, frame in enumerate(path(seed, frames, cut=cut)):
        geometry, seen = estimator(frame.view.rgb), frame.view
        rows, columns = np.nonzero(seen.valid[72:120, 96:160])
        middle = np.argmin((rows - 24) ** 2 + (columns - 32) ** 2) if len(rows) else None
        anchors = None
        if middle is not None:
            at = (int(rows[middle]) + 72, int(columns[middle]) + 96)
            anchors = ([[at[1], at[0]]], [float(seen.depth[at])])
        before = tracker.resets
        for name in ("alone", "tracked"):
            try:
                if name == "alone":
                    found = geometry.to_metric(seen.intrinsics, anchors=anchors)
                else:
                    found = tracker.update(geometry, seen.intrinsics, anchors=anchors, motion=frame.motion)
            except CalibrationError:
                last.pop(name, None)
                continue
            gap = np.log(found.depth) - np.log(seen.depth)
            errors[name].append(float(np.nanmean(np.abs(np.expm1(gap)))))
            if name in last and frame.motion is not None and before_view is not None:
                here, there = _fixed_points(seen, before_view, frame.motion)
                jumps[name].append(float(np.nanmean(np.abs(gap[here] - last[name][there]))))
            last[name] = gap
        before_view = seen
        if tracker.resets != before:
            resets.append(index)
    part = max(1, frames // 4)
    tracked = errors["tracked"]
    return {
        "seed": seed,
        "jump": {name: float(np.mean(values)) for name, values in jumps.items()},
        "frames": {name: len(values) for name, values in errors.items()},
        "error": {name: float(np.mean(values)) for name, values in errors.items()},
        "error_first_and_last_quarter": [float(np.mean(tracked[:part])), float(np.mean(tracked[-part:]))],
        "resets_at": resets,
        "cut_at": cut,
    }


def _fixed_points(now: View, before: View, motion: Float64) -> tuple[Any, Any]:
    """Pixels (rows, columns) of now, and of before, that show the same points."""
    camera, back = Camera(*now.intrinsics), np.linalg.inv(motion)
    rows, columns = (grid.ravel() for grid in np.mgrid[4 : SIZE.height : 6, 4 : SIZE.width : 6])
    kept = now.valid[rows, columns]
    rows, columns = rows[kept], columns[kept]
    points = camera.rays_at(np.stack([columns, rows], axis=1)) * now.depth[rows, columns][:, None]
    points = points @ back[:3, :3].T + back[:3, 3]
    uv = np.nan_to_num(np.rint(camera.project(points)), nan=-1).astype(int)
    kept = (uv >= 0).all(axis=1) & (uv[:, 0] < SIZE.width) & (uv[:, 1] < SIZE.height)
    rows, columns, uv, points = rows[kept], columns[kept], uv[kept], points[kept]
    same = np.abs(before.depth[uv[:, 1], uv[:, 0]] / points[:, 2] - 1) < 0.05  # not hidden by something nearer
    return (rows[same], columns[same]), (uv[same, 1], uv[same, 0])


def milliseconds() -> float:
    """Processor time of the estimator at 640x480, one thread: the best of 30."""
    geometry, _ = observed(next(views(SEED, 1)), np.random.default_rng(0), 0.002, 2.0)
    assert geometry.normals is not None
    p, normals = (
        np.repeat(np.repeat(plane, 3, 0), 3, 1)[:480, :640].copy()
        for plane in (geometry.require_prediction("depth"), geometry.normals)
    )
    camera, valid, spent = Camera(550, 550, 319.5, 239.5, Size(640, 480)), np.ones((480, 640), dtype=bool), []
    for _ in range(31):
        start = time.process_time()
        scale_from_normals(p, normals, valid, camera)
        spent.append(time.process_time() - start)
    return 1e3 * min(spent[1:])


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of everything.")] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the result here.")] = None,  # noqa: UP045
) -> None:
    """All tables, printed as JSON."""
    warnings.simplefilter("ignore", CalibrationWarning)
    count, sequences, frames = (10, 1, 12) if quick else (100, 10, FRAMES)
    result: Record = {"environment": environment(("numpy", "onnxruntime", "scikit-image"))}
    result["milliseconds_640x480"] = milliseconds()
    result["noise"] = noise_table(count)
    with Estimator("fe2e-tiny") as estimator:
        result["own_predictions"] = [own_predictions(estimator, seed, count) for seed in (SEED, SECOND_SEED)]
        result["anchors"] = anchors_table(estimator, count)
        result["motorcycle"] = motorcycle(estimator)
        result["paths"] = [moving_camera(estimator, seed, frames) for seed in range(sequences)]
        result["cut"] = moving_camera(estimator, 100, frames, cut=frames * 2 // 3)
    Console().print_json(data=result)
    if json_file is not None:
        write_json(json_file, result)


if __name__ == "__main__":
    typer.run(main)
