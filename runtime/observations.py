"""What a camera's user tells of a frame (`Stream.put`): checked, kept for later frames, and taken to metres."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from densegeo.argument_checks import number_of, shown
from densegeo.errors import CalibrationError, ConfigError
from densegeo.runtime.camera import Camera, CameraLike
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.tracker import ScaleTracker, checked_motion

Observations = dict[str, Any]  # arguments of `ScaleTracker.update`; "motion" is always there, None where it is unknown

_STANDING = ("intrinsics", "camera_height")  # what holds for later frames too


def checked_observations(
    intrinsics: CameraLike | None, anchors: Any, up: ArrayLike | None, camera_height: float | None, motion: Any
) -> Observations:
    """One frame's observations. Raises ConfigError for another type or shape; whether they suffice shows later."""
    options = {"intrinsics": intrinsics, "camera_height": camera_height, "anchors": anchors, "up": up}
    observations = {name: value for name, value in options.items() if value is not None}
    _check_types(**observations)
    observations["motion"] = None if motion is None else checked_motion(motion)
    if intrinsics is not None:
        observations["intrinsics"] = Camera.of(intrinsics)
    return observations


def take_over(dropped: Observations, following: Observations) -> None:
    """Let `following` hold what a dropped frame before it told: what stands for later frames, and its motion."""
    following["motion"] = _after(dropped["motion"], following["motion"])
    for name in _STANDING:
        if name in dropped:
            following.setdefault(name, dropped[name])


class ObservedScale:
    """A `ScaleTracker` over the frames of one stream, some of which tell nothing and some of which fail."""

    def __init__(self) -> None:
        self._tracker = ScaleTracker()
        self._standing: Observations = {}  # what holds until something else is given
        self._failed: list[Any] = []  # the motions up to frames that failed since, put together: one, or none

    def apply(self, geometry: Geometry, observations: Observations) -> tuple[Geometry, CalibrationError | None]:
        """The result with depth, where anything was told of the camera or the scene; or as it is, with the reason."""
        observations = dict(observations)
        self._standing.update({name: observations[name] for name in _STANDING if name in observations})
        observations["motion"] = reduce(_after, [*self._failed, observations["motion"]])
        refusal: CalibrationError | None = None
        if geometry.prediction is not None and (self._standing or "anchors" in observations):
            try:
                geometry = self._tracker.update(geometry, **(self._standing | observations))
            except CalibrationError as error:
                refusal = error
        self._failed.clear()
        return geometry, refusal

    def skip(self, observations: Observations) -> None:
        """A frame without a result: the camera moved on all the same."""
        self._failed = [reduce(_after, [*self._failed, observations["motion"]])]


def _check_types(intrinsics: object = None, camera_height: object = None, anchors: Any = None, up: Any = None) -> None:
    """Raises ConfigError for what no frame can have; what a frame says against one is its refusal."""
    height = number_of(camera_height)
    if camera_height is not None and (height is None or not 0 < height < math.inf):
        raise ConfigError(f"camera_height must be metres above 0, not {shown(camera_height)}.")
    if up is not None and _shape(up) != (3,):
        raise ConfigError(f"up must be three numbers, against gravity in the camera's frame, not {shown(up)}.")
    if anchors is not None:
        uv, metres = map(_shape, anchors) if isinstance(anchors, (tuple, list)) and len(anchors) == 2 else (None, None)
        if uv is None or metres is None or len(uv) != 2 or uv[1] != 2 or metres != uv[:1]:
            raise ConfigError(
                f"anchors must be a pair (uv, metres) of numbers, uv (N, 2) and metres (N,), not {shown(anchors)}."
            )


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of numbers; None for anything else."""
    try:
        return np.asarray(value, dtype=np.float64).shape
    except (TypeError, ValueError):
        return None


def _after(first: Any, second: Any) -> Any:
    """Both motions, one after the other; None, unknown, when either is."""
    return None if first is None or second is None else second @ first
