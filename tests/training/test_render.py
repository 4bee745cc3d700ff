"""Rendered views: exact, reproducible, and what training makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from densegeo.training.data import batches, compact, log_depth, read_chunks, render_chunks
from densegeo.training.render import FARTHEST, View, view

VIEWS = 10


@pytest.fixture(scope="module")
def views() -> list[View]:
    return [view(0, "train", index, 128, 96) for index in range(VIEWS)]


def test_the_same_arguments_give_the_same_view(views: list[View]) -> None:
    again = view(0, "train", 3, 128, 96)
    for name in ("rgb", "depth", "normals", "valid"):
        np.testing.assert_array_equal(getattr(again, name), getattr(views[3], name))
    assert again.intrinsics == views[3].intrinsics
    for other in (view(0, "train", 4, 128, 96), view(1, "train", 3, 128, 96), view(0, "test", 3, 128, 96)):
        assert not np.array_equal(other.rgb, again.rgb)


def test_views_hold_what_they_promise(views: list[View]) -> None:
    for seen in views:
        assert (seen.rgb.dtype, seen.depth.dtype, seen.normals.dtype) == (np.uint8, np.float32, np.float32)
        assert np.isfinite(seen.depth[seen.valid]).all()
        assert np.isnan(seen.depth[~seen.valid]).all()
        assert seen.depth[seen.valid].min() > 0
        assert seen.depth[seen.valid].max() < FARTHEST
        assert np.linalg.norm(seen.normals[seen.valid], axis=-1) == pytest.approx(1, abs=1e-4)
        assert (seen.normals[~seen.valid] == 0).all()
        assert seen.rgb.std() > 3


def test_normals_face_the_camera_and_agree_with_depth(views: list[View]) -> None:
    gaps = []
    for seen in views:
        fx, fy, cx, cy = seen.intrinsics
        rows, columns = np.indices(seen.depth.shape)
        rays = np.stack([(columns - cx) / fx, (rows - cy) / fy, np.ones_like(seen.depth)], axis=-1)
        assert ((rays * seen.normals).sum(-1)[seen.valid] < 1e-3).all()
        points = rays * seen.depth[..., None]
        right, down = points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1]
        cross = np.cross(down, right)  # right x down points away from the camera in the OpenCV frame
        cross /= np.linalg.norm(cross, axis=-1, keepdims=True)
        cosine = (cross * seen.normals[:-1, :-1]).sum(-1)
        gaps.append(np.degrees(np.arccos(np.clip(cosine[np.isfinite(cosine)], -1, 1))))
    assert np.median(np.concatenate(gaps)) < 0.5
    assert np.mean(np.concatenate(gaps) < 5) > 0.8  # the rest lies on edges and round things


def test_all_kinds_of_scene_occur() -> None:
    kinds = {view(0, "train", index, 64, 48).kind for index in range(30)}
    assert kinds == {"room", "corridor", "street", "open ground"}


def test_log_depth_runs_between_percentiles_and_puts_the_sky_far_away() -> None:
    depth = np.exp(np.linspace(0, 3, 10_000, dtype=np.float32)).reshape(100, 100)
    valid = np.ones((100, 100), dtype=bool)
    valid[-10:] = False
    target = log_depth(np.where(valid, depth, np.nan).astype(np.float32), valid)
    assert (target[~valid] == 1).all()
    logarithm = np.log(depth[valid])
    low, high = np.percentile(logarithm, [2, 98])
    np.testing.assert_allclose(target[valid], np.clip(2 * (logarithm - low) / (high - low) - 1, -1, 1), atol=1e-4)


def test_compact_turns_normals_into_the_networks_axes(views: list[View]) -> None:
    rgb, _, normals = compact(views[0])
    np.testing.assert_array_equal(rgb, views[0].rgb)
    valid = views[0].valid
    np.testing.assert_allclose(normals[valid] / 127, -views[0].normals[valid], atol=0.004)
    assert (normals[~valid] == [0, 0, 127]).all()


@pytest.mark.thorough
def test_chunks_are_rendered_once_and_hold_the_views(tmp_path: Path) -> None:
    files = render_chunks(tmp_path, 0, "train", 3, (64, 48))
    chunk = read_chunks(files)
    assert chunk.rgb.shape == (3, 48, 64, 3)
    np.testing.assert_array_equal(chunk.rgb[2], view(0, "train", 2, 64, 48).rgb)
    before = [file.stat().st_mtime_ns for file in files]
    assert render_chunks(tmp_path, 0, "train", 3, (64, 48)) == files
    assert [file.stat().st_mtime_ns for file in files] == before


def test_batches_can_start_anywhere_and_cover_an_epoch() -> None:
    whole = batches(10, 3, seed=1)
    first = [next(whole) for _ in range(8)]
    assert len(set(np.concatenate(first[:3]).tolist())) == 9
    late = batches(10, 3, seed=1, start=4)
    for expected in first[4:]:
        np.testing.assert_array_equal(next(late), expected)
