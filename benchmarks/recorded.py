"""Rendered views and paths with what a network predicts of them, kept in `out/metres`: making them takes minutes.

A file's name holds a digest of the generator's sources and of the bundle, so that a change of either makes new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from densegeo.benchmarks import paths
from densegeo.benchmarks.heldout import SIZE, SPLIT
from densegeo.files import atomic_write
from densegeo.runtime import Estimator, Geometry
from densegeo.size import Size
from densegeo.training import render, scenes, shapes, textures
from densegeo.training.render import View, scene_and_view

FOLDER = Path("out") / "metres"


@dataclass(frozen=True, eq=False)
class Recorded:
    """One picture's truth and a network's prediction of it. view: its rgb is left out. motion, up, height: as in
    `PathFrame`.
    """

    view: View
    geometry: Geometry
    motion: NDArray[np.float64] | None
    up: NDArray[np.float64]
    height: float

    def best_line(self) -> tuple[float, float]:
        """(scale, shift) through ln of the true depth of every valid pixel, by least squares: what a fit can reach."""
        valid, prediction = self.view.valid, self.geometry.require_prediction("depth")
        scale, shift = np.polyfit(prediction[valid].astype(float), np.log(self.view.depth[valid].astype(float)), 1)
        return float(scale), float(shift)


def views(estimator: Estimator, seed: int, count: int) -> list[Recorded]:
    """The first views of the held-out split with this seed."""

    def frames() -> Iterable[paths.PathFrame]:
        for index in range(count):
            scene, view = scene_and_view(seed, SPLIT, index, *SIZE)
            yield paths.PathFrame(view, None, paths.up_in(scene), scene.height)

    return _recorded(estimator, f"views-{seed}-{count}", frames(), count)


def path(estimator: Estimator, seed: int, frames: int, cut: int | None = None) -> list[Recorded]:
    """The frames of `paths.path`."""
    name = f"path-{seed}-{frames}" + ("" if cut is None else f"-cut-{cut}")
    return _recorded(estimator, name, paths.path(seed, frames, cut=cut), frames)


def _recorded(estimator: Estimator, name: str, frames: Iterable[paths.PathFrame], count: int) -> list[Recorded]:
    file = FOLDER / f"{name}-{_digest(estimator)}.npz"
    if not file.is_file():
        rows = []
        for frame in track(frames, f"rendering and estimating {name}", total=count):
            geometry, view = estimator(frame.view.rgb), frame.view
            motion = np.full((4, 4), np.nan) if frame.motion is None else frame.motion
            truth = (view.kind, view.depth, view.normals, view.valid, view.intrinsics)
            rows.append((*truth, geometry.prediction, geometry.normals, geometry.valid, motion, frame.up, frame.height))
        FOLDER.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial, partial.open("wb") as stream:
            np.savez(
                stream, allow_pickle=False, **dict(zip(_NAMES, map(np.stack, zip(*rows, strict=True)), strict=True))
            )
    with np.load(file) as stored:
        every = [stored[name] for name in _NAMES]
    return [_row(dict(zip(_NAMES, row, strict=True)), estimator) for row in zip(*every, strict=True)]


_NAMES = (
    *("kind", "depth", "normals", "valid", "intrinsics"),
    *("prediction", "predicted_normals", "predicted_valid", "motion", "up", "height"),
)


def _row(row: dict[str, Any], estimator: Estimator) -> Recorded:
    height, width = row["depth"].shape
    rgb, camera = np.empty((0, 0, 3), dtype=np.uint8), tuple(row["intrinsics"].tolist())
    view = View(str(row["kind"]), rgb, row["depth"], row["normals"], row["valid"], camera)
    normals, valid, size = row["predicted_normals"], row["predicted_valid"], Size(width, height)
    geometry = Geometry(row["prediction"], "log_affine", normals, valid, size, model=estimator.manifest.model)
    motion = row["motion"] if np.isfinite(row["motion"]).all() else None
    return Recorded(view, geometry, motion, row["up"], float(row["height"]))


def _digest(estimator: Estimator) -> str:
    sources = [Path(str(module.__file__)) for module in (paths, render, scenes, shapes, textures)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources))
    digest.update(repr((estimator.backend, estimator.manifest)).encode())
    return digest.hexdigest()[:12]
