"""What frames of a stream tell: kept for later frames, and put together over frames that were dropped or failed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from densegeo.runtime.geometry import Geometry
from densegeo.runtime.observations import ObservedScale, checked_observations, take_over
from densegeo.runtime.tracker import ScaleTracker
from tests.runtime.rooms import K, room


def ahead(metres: float) -> np.ndarray:
    """A camera that went so far ahead."""
    motion = np.eye(4)
    motion[2, 3] = -metres
    return motion


def observed(**options: Any) -> dict[str, Any]:
    defaults = dict.fromkeys(("intrinsics", "anchors", "up", "camera_height", "motion"))
    return checked_observations(**(defaults | options))


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every `ScaleTracker.update`, which gives back what it is given."""
    calls: list[dict[str, Any]] = []

    def update(self: ScaleTracker, geometry: Geometry, **observations: Any) -> Geometry:
        calls.append(observations)
        return geometry

    monkeypatch.setattr(ScaleTracker, "update", update)
    return calls


def test_a_camera_and_its_height_hold_for_later_frames(updates: list[dict[str, Any]]) -> None:
    geometry, scale = room()[0], ObservedScale()
    scale.apply(geometry, observed())
    assert updates == []  # nothing was told yet
    scale.apply(geometry, observed(intrinsics=K, camera_height=1.5, up=(0, -1, 0)))
    scale.apply(geometry, observed())
    assert updates[1]["camera_height"] == 1.5
    assert updates[1]["intrinsics"] == updates[0]["intrinsics"]
    assert "up" not in updates[1]


@pytest.mark.parametrize(
    ("failed", "expected"),
    [([0.5], 0.75), ([0.5, 1.0], 1.75), ([None], None), ([0.5, None], None), ([None, 0.5], None)],
)
def test_the_motion_over_frames_that_failed(
    updates: list[dict[str, Any]], failed: list[float | None], expected: float | None
) -> None:
    """Of one whose motion is unknown, so is the whole."""
    geometry, scale = room()[0], ObservedScale()
    for metres in failed:
        scale.skip(observed(motion=None if metres is None else ahead(metres)))
    for _ in range(2):
        scale.apply(geometry, observed(intrinsics=K, motion=ahead(0.25)))
    if expected is None:
        assert updates[0]["motion"] is None
    else:
        np.testing.assert_allclose(updates[0]["motion"], ahead(expected))
    np.testing.assert_allclose(updates[1]["motion"], ahead(0.25))


def test_what_a_dropped_frame_told_goes_to_the_next() -> None:
    dropped = observed(intrinsics=K, camera_height=1.5, up=(0, -1, 0), motion=ahead(0.5))
    following = observed(camera_height=1.6, motion=ahead(0.25))
    take_over(dropped, following)
    assert following["intrinsics"] == dropped["intrinsics"]
    assert following["camera_height"] == 1.6
    assert "up" not in following
    np.testing.assert_allclose(following["motion"], ahead(0.75))
