"""A camera that moves through a procedural scene: frames with exact depth, normals, and the motion between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from densegeo.size import Size
from densegeo.training.objects import Scene
from densegeo.training.render import View, render
from densegeo.training.scenes import draw
from densegeo.training.shapes import Array, rotation

SIZE = Size(256, 192)
FRAMES = 60
_SPEED = (0.008, 0.025)  # metres a frame: 0.25 to 0.75 m/s at 30 frames a second
_CLEAR = 0.45  # metres to everything


@dataclass(frozen=True)
class PathFrame:
    """view: what is seen. motion: (4, 4), points of the last frame's camera into this one's; None: the first, or a cut.
    up: (3,) against gravity in the camera's frame. height: of the camera over the floor, metres.
    """

    view: View
    motion: NDArray[np.float64] | None
    up: NDArray[np.float64]
    height: float


def path(seed: int, frames: int = FRAMES, size: Size = SIZE, cut: int | None = None) -> Iterator[PathFrame]:
    """The same seed gives the same frames. cut: the frame at which another scene begins."""
    rng = np.random.default_rng([seed, 24])
    last: Scene | None = None
    for index in range(frames):
        if last is None or index == cut:
            scene, exposure = _open_scene(rng), int(rng.integers(2**31))
            speed = rng.uniform(*_SPEED)
            turning, swing, side = rng.uniform(0.001, 0.004), rng.uniform(20, 50), rng.uniform(-0.6, 0.6)
            last, motion = scene, None
        else:
            scene = _moved(last, scene, speed, side, turning * math.cos(2 * math.pi * index / swing))
            motion, last = _between(last, scene), scene
        # the same exposure, clouds and pattern of noise in each frame of a scene
        view = render(scene, *size, np.random.default_rng(exposure))
        yield PathFrame(view, motion, up_in(scene), scene.height)


def up_in(scene: Scene) -> NDArray[np.float64]:
    """(3,) against gravity in the camera's frame."""
    return np.asarray(scene.axes.T @ np.array([0, -1, 0]), dtype=np.float64)


def _open_scene(rng: np.random.Generator) -> Scene:
    """One with something to see and room ahead."""
    while True:
        scene = draw(rng)
        view = render(scene, 64, 48, np.random.default_rng(0))
        if view.valid.mean() < 0.5:
            continue
        near, far = np.nanpercentile(view.depth, [2, 98])
        if far > 1.5 * near and near > 0.8:
            return scene


def _moved(last: Scene, scene: Scene, speed: float, side: float, turn: float) -> Scene:
    axes = rotation(turn) @ last.axes
    ahead = axes @ np.array([math.sin(side), 0, math.cos(side)])
    ahead *= speed / max(1e-6, float(np.hypot(ahead[0], ahead[2])))
    there = replace(last, axes=axes, place=(last.place[0] + float(ahead[0]), last.place[1] + float(ahead[2])))
    return replace(last, axes=axes) if _blocked(there) else there


def _blocked(scene: Scene) -> bool:
    """Whether the camera is too close to a thing or a wall; floors and ceilings are not in its way."""
    camera, room = scene.camera, scene.room
    if room is not None and room.holds(np.stack([camera[0], room.center[1], camera[2]]), _CLEAR):
        return True
    return any(thing.shape.holds(camera, _CLEAR) for thing in scene.things[1:])


def _between(last: Scene, scene: Scene) -> NDArray[np.float64]:
    """World points X are axes.T (X - camera) in a camera."""
    pose = np.eye(4)
    pose[:3, :3] = scene.axes.T @ last.axes
    offset: Array = last.camera - scene.camera
    pose[:3, 3] = (scene.axes.T @ offset)[:, 0]
    return pose
