"""Moving cameras: how much metric depth of fixed points jumps from frame to frame, each frame by itself and tracked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.benchmarks.paths import SIZE
from densegeo.benchmarks.recorded import Recorded
from densegeo.errors import CalibrationError
from densegeo.runtime import Camera, Geometry, ScaleTracker
from densegeo.training.render import View

Record = dict[str, Any]
Float64 = NDArray[np.float64]
_STEP = 6  # pixels between the points that are followed


def moving_camera(rows: list[Recorded], evidence: str, seed: int) -> Record:
    """One sequence with one of `EVIDENCE`. Ways: frames "alone"; "tracked", with the motion given; "tracked, motion
    unknown"; "best line" through the true depth of each frame.

    Frames whose unit is still unknown count as none. jump: mean change of the error of ln(depth) on fixed points. line:
    median over the points, the part that is not the network's own flicker. error: AbsRel. resets: frames at which the
    tracker began anew. off: each frame's median error of ln(depth), None where there is no result.
    """
    rng = np.random.default_rng([seed, 24])
    rows = [row for row in rows if row.view.valid.any()]  # not those that show the sky alone
    measurements = [EVIDENCE[evidence](row, rng) for row in rows]
    ways: dict[str, Callable[[Recorded, Record], Geometry]] = {
        "alone": lambda row, measured: row.geometry.to_metric(row.view.intrinsics, **measured),
        "best line": lambda row, measured: _along(row, *row.best_line()),
    }
    trackers = {"tracked": ScaleTracker(), "tracked, motion unknown": ScaleTracker()}
    for name, tracker in trackers.items():
        ways[name] = _tracked(tracker, motion="unknown" not in name)
    result: Record = {"seed": seed, "kind": rows[0].view.kind}
    for name, way in ways.items():
        result[name] = _followed(rows, measurements, way, trackers.get(name))
    return result


def _tracked(tracker: ScaleTracker, motion: bool) -> Callable[[Recorded, Record], Geometry]:
    return lambda row, measured: tracker.update(
        row.geometry, row.view.intrinsics, motion=row.motion if motion else None, **measured
    )


def _along(row: Recorded, scale: float, shift: float) -> Geometry:
    return row.geometry.to_metric(scale=scale, shift=shift)


def _followed(
    rows: list[Recorded],
    measurements: list[Record],
    way: Callable[[Recorded, Record], Geometry],
    tracker: ScaleTracker | None,
) -> Record:
    series: dict[str, list[float]] = defaultdict(list)
    resets, off, last, before = list[int](), list[float | None](), None, None
    for index, (row, measured) in enumerate(zip(rows, measurements, strict=True)):
        count, view = tracker.resets if tracker else 0, row.view
        try:
            found_here = way(row, measured)
            depth = found_here.depth if found_here.depth_kind == "metric" else None
        except CalibrationError:
            depth = None
        if tracker and tracker.resets != count:
            resets.append(index)
        gap = None if depth is None else np.log(depth) - np.log(view.depth)
        off.append(None if gap is None else round(float(np.nanmedian(gap)), 4))
        if gap is not None:
            series["error"].append(float(np.nanmean(np.abs(np.expm1(gap)))))
            if last is not None and row.motion is not None and before is not None:
                current_pixels, former_pixels = fixed_points(view, before, row.motion)
                change = gap[current_pixels] - last[former_pixels]
                series["jump"].append(float(np.nanmean(np.abs(change))))
                series["line"].append(float(abs(np.nanmedian(change))))
        last, before = gap, view
    errors = series["error"]
    part = max(1, len(errors) // 4)
    quarters = {"error_first_quarter": errors[:part], "error_last_quarter": errors[-part:]}
    return {
        "frames": len(errors),
        **{name: float(np.mean(values)) if values else None for name, values in (series | quarters).items()},
        "resets": resets,
        "off": off,
    }


def fixed_points(now: View, before: View, motion: Float64) -> tuple[Any, Any]:
    """Pixels (rows, columns) of now, and of before, that show the same points."""
    camera, back = Camera(*now.intrinsics), np.linalg.inv(motion)
    rows, columns = (grid.ravel() for grid in np.mgrid[4 : SIZE.height : _STEP, 4 : SIZE.width : _STEP])
    visible = now.valid[rows, columns]
    rows, columns = rows[visible], columns[visible]
    points = camera.rays_at(np.stack([columns, rows], axis=1)) * now.depth[rows, columns][:, None]
    points = points @ back[:3, :3].T + back[:3, 3]
    uv = np.nan_to_num(np.rint(camera.project(points)), nan=-1).astype(int)
    visible = (uv >= 0).all(axis=1) & (uv[:, 0] < SIZE.width) & (uv[:, 1] < SIZE.height)
    rows, columns, uv, points = rows[visible], columns[visible], uv[visible], points[visible]
    same = np.abs(before.depth[uv[:, 1], uv[:, 0]] / points[:, 2] - 1) < 0.05  # not hidden by something nearer
    return (rows[same], columns[same]), (uv[same, 1], uv[same, 0])


def _somewhere(row: Recorded, rng: np.random.Generator) -> Record:
    rows, columns = np.nonzero(row.view.valid)
    at = rng.integers(len(rows), size=1)
    return {"anchors": (np.stack([columns[at], rows[at]], axis=1), row.view.depth[rows[at], columns[at]])}


def _ahead(row: Recorded, rng: np.random.Generator) -> Record:
    """The valid pixel next to the image's middle, within an eighth of its sides; nothing where there is none."""
    rows, columns = np.nonzero(row.view.valid)
    far = np.hypot((rows - SIZE.height / 2) / SIZE.height, (columns - SIZE.width / 2) / SIZE.width)
    nearest = int(far.argmin())
    if far[nearest] > 1 / 8:
        return {}
    at = rows[nearest], columns[nearest]
    return {"anchors": ([[at[1], at[0]]], [float(row.view.depth[at])])}


def _height(row: Recorded, rng: np.random.Generator) -> Record:
    return {"camera_height": row.height, "up": row.up}


EVIDENCE: dict[str, Callable[[Recorded, np.random.Generator], Record]] = {
    "one reading at a random pixel": _somewhere,
    "one reading straight ahead": _ahead,
    "the camera's height": _height,
}
