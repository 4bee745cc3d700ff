"""`ScaleTracker`: one line over time, from frames that are normalised anew, on exact rooms seen by a camera."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from densegeo.errors import CalibrationError, ConfigError
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.tracker import ScaleTracker, align
from densegeo.size import Size
from tests.runtime.rooms import CAMERA, HEIGHT, WIDTH, K, room

PIXEL = (30, 70)  # column, row


def normalised(depth: np.ndarray, normals: np.ndarray, scale: float, shift: float) -> Geometry:
    """A frame of that depth in a prediction of its own: ln(depth) = scale * p + shift."""
    p = ((np.log(depth) - shift) / scale).astype(np.float32)
    return Geometry(p, "log_affine", normals, np.ones(p.shape, bool), Size(WIDTH, HEIGHT), model="m")


def frames(count: int, seed: int = 0) -> list[tuple[Geometry, np.ndarray]]:
    """A still camera whose network normalises each frame anew."""
    rng = np.random.default_rng(seed)
    geometry, depth = room()
    actual = []
    for _ in range(count):
        line = 2.2 * np.exp(rng.normal(0, 0.05)), -0.3 + rng.normal(0, 0.1)
        actual.append((normalised(depth, geometry.normals, *line), depth))
    return actual


def reading(depth: np.ndarray, factor: float = 1.0) -> tuple[list[tuple[int, int]], list[float]]:
    return [PIXEL], [factor * float(depth[PIXEL[1], PIXEL[0]])]


def spread(geometry: Geometry) -> float:
    """Median standard deviation of the line, relative to depth."""
    assert geometry.calibration is not None
    return float(np.median(geometry.calibration.uncertainty(geometry.prediction)))


def test_noisy_readings_make_a_steady_depth() -> None:
    rng = np.random.default_rng(1)
    tracker, alone, tracked = ScaleTracker(), [], []
    for geometry, depth in frames(40):
        given = reading(depth, np.exp(rng.normal(0, 0.1)))
        alone.append(np.median(np.log(geometry.to_metric(K, anchors=given).depth / depth)))
        tracked.append(np.median(np.log(tracker.update(geometry, K, anchors=given, motion=np.eye(4)).depth / depth)))
    assert np.abs(np.diff(tracked)).mean() < np.abs(np.diff(alone)).mean() / 5
    assert np.abs(tracked[-10:]).mean() < 0.05
    assert tracker.resets == 0


def test_it_is_deterministic() -> None:
    def run() -> list[object]:
        tracker = ScaleTracker()
        return [tracker.update(geometry, K, anchors=reading(depth)).calibration for geometry, depth in frames(6)]

    assert run() == run()


def test_without_a_fact_frames_keep_one_unit() -> None:
    tracker, ratios = ScaleTracker(), []
    for geometry, depth in frames(12):
        actual = tracker.update(geometry, K)
        assert actual.depth_kind == "up_to_scale"
        ratios.append(np.median(actual.depth / depth))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


def test_the_first_fact_makes_metres_that_stay_without_more() -> None:
    tracker = ScaleTracker()
    shown = frames(9)
    kinds = []
    for index, (geometry, depth) in enumerate(shown):
        actual = tracker.update(geometry, K, anchors=reading(depth) if index == 3 else None)
        kinds.append(actual.depth_kind)
        if index >= 3:
            np.testing.assert_allclose(actual.depth, depth, rtol=0.05)
    assert kinds == ["up_to_scale"] * 3 + ["metric"] * 6


@pytest.mark.parametrize("motion", [None, np.eye(4)])
def test_the_variance_grows_without_evidence_and_falls_with_it(motion: np.ndarray | None) -> None:
    shown = frames(12)
    with_it, without = ScaleTracker(), ScaleTracker()
    grown, fallen = [], []
    for index, (geometry, depth) in enumerate(shown):
        given = reading(depth)
        # neither camera nor reading after the first frame: nothing is learnt
        told = {"intrinsics": K, "anchors": given} if index == 0 else {}
        grown.append(spread(without.update(geometry, **told)))
        fallen.append(spread(with_it.update(geometry, K, anchors=given, motion=np.eye(4))))
    assert (np.diff(grown) > 0).all()
    assert fallen[-1] < fallen[0]
    assert grown[-1] > fallen[-1]


def test_a_camera_that_may_have_moved_is_less_certain() -> None:
    shown = frames(6)
    still, unknown = ScaleTracker(), ScaleTracker()
    for geometry, depth in shown:
        known = still.update(geometry, K, anchors=reading(depth), motion=np.eye(4))
        other = unknown.update(geometry, K, anchors=reading(depth))
    assert spread(other) > spread(known)


def test_a_wrong_reading_is_gated_and_a_lasting_one_believed() -> None:
    tracker = ScaleTracker()
    shown = frames(30)
    for geometry, depth in shown[:20]:
        actual = tracker.update(geometry, K, anchors=reading(depth), motion=np.eye(4))
    before = np.median(actual.depth / depth)
    geometry, depth = shown[20]
    actual = tracker.update(geometry, K, anchors=reading(depth, 20.0), motion=np.eye(4))
    assert np.median(actual.depth / depth) == pytest.approx(before, rel=0.02)
    assert tracker.resets == 0
    for geometry, depth in shown[21:26]:  # the world is another size from here on, say
        actual = tracker.update(geometry, K, anchors=reading(depth, 20.0), motion=np.eye(4))
    assert tracker.resets == 1
    assert np.median(actual.depth / depth) == pytest.approx(20, rel=0.1)


def test_a_cut_is_noticed_at_once() -> None:
    tracker = ScaleTracker()
    for geometry, depth in frames(5):
        tracker.update(geometry, K, anchors=reading(depth))
    other, depth = room(height=3.0, tilt=-0.2, scale=1.5, shift=0.4)
    flipped = replace(other, prediction=other.prediction[:, ::-1].copy(), normals=other.normals[:, ::-1] * [-1, 1, 1])
    depth = depth[:, ::-1]
    actual = tracker.update(flipped, K)
    assert tracker.resets == 1
    assert actual.depth_kind == "up_to_scale"  # metres of another scene say nothing here
    again = tracker.update(flipped, K, anchors=reading(depth))
    np.testing.assert_allclose(again.depth, depth, rtol=0.05)


def test_two_frames_of_a_still_camera_are_aligned() -> None:
    (before, _), (after, _) = frames(2)
    actual = align(before, after)
    np.testing.assert_allclose(actual.alpha * after.prediction + actual.beta, before.prediction, atol=1e-3)
    assert actual.agreement > 0.999


def test_a_given_motion_aligns_frames_of_a_moving_camera() -> None:
    """Half a metre ahead: what came nearer must not be taken for another normalisation."""
    before, _ = room(ahead=6.0)
    after, _ = room(ahead=5.5, scale=1.9, shift=0.1)
    # forward along the floor, in a camera that looks down by 0.15 radians
    motion = np.eye(4)
    motion[:3, 3] = -0.5 * np.array([0, -np.sin(0.15), np.cos(0.15)])
    calibrated = before.to_metric(scale=2.2, shift=-0.3)
    given, blind = align(calibrated, after, CAMERA, motion), align(before, after)
    for actual, right in ((given, True), (blind, False)):
        # the line of the frame before, moved: (alpha * scale, shift + beta * scale), should be after's own
        line = np.array([actual.alpha * 2.2, -0.3 + actual.beta * 2.2])
        off = np.abs((line - (1.9, 0.1)) @ [float(np.median(after.prediction)), 1.0])
        assert (off < 0.02) == right


def test_a_tracker_that_knows_nothing_says_so() -> None:
    geometry, _ = room()
    with pytest.raises(CalibrationError, match="intrinsics, anchors, or both"):
        ScaleTracker().update(geometry)


def test_reset_forgets_metres() -> None:
    tracker = ScaleTracker()
    (geometry, depth), (later, _) = frames(2)
    assert tracker.update(geometry, K, anchors=reading(depth)).depth_kind == "metric"
    tracker.reset()
    assert tracker.update(later, K).depth_kind == "up_to_scale"


def test_a_motion_without_a_camera_is_refused() -> None:
    """It cannot be used, and to begin anew would lose the metres without a word."""
    ramp = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(48, 64)
    frame = Geometry(ramp, "log_affine", None, np.ones((48, 64), bool), Size(64, 48))
    tracker = ScaleTracker()
    tracker.update(frame, anchors=([(5.0, 5.0), (32.0, 24.0), (60.0, 45.0)], [1.2, 2.0, 3.5]))
    with pytest.raises(ConfigError, match="give intrinsics too"):
        tracker.update(frame, motion=np.eye(4))
    assert tracker.resets == 0
    assert tracker.update(frame).depth_kind == "metric"
