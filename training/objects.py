"""What a scene is made of: things, light and a camera; and furniture that is put into it, drawn from a seed.

The camera stands at x = z = 0 unless it is moved, `height` metres above the floor y = 0, and looks roughly along +z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from densegeo.training.shapes import Array, Box, Cylinder, Shape, Sphere, rotation, vector
from densegeo.training.textures import Material, material


@dataclass(frozen=True)
class Thing:
    shape: Shape
    material: Material


@dataclass(frozen=True)
class Light:
    """A sun (`position` None, `direction` towards it) or a lamp; `colour` is linear (3, 1)."""

    colour: Array
    direction: Array | None = None
    position: Array | None = None


@dataclass
class Scene:
    """What is there, how it is lit, and where the camera is."""

    kind: str
    height: float  # of the camera
    axes: Array  # camera to world
    field_of_view: float  # horizontal, radians
    ambient: Array = field(default_factory=lambda: vector(0.3, 0.3, 0.3))
    room: Box | None = None
    sky: tuple[Array, Array] | None = None  # colours at the horizon and at the zenith, (3, 1)
    haze: float = math.inf  # metres after which contrast has fallen by e
    things: list[Thing] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    place: tuple[float, float] = (0.0, 0.0)  # x and z of the camera

    @property
    def camera(self) -> Array:
        return vector(self.place[0], -self.height, self.place[1])

    def add(self, shape: Shape, surface: Material) -> bool:
        """Put a thing there unless it would swallow the camera."""
        if shape.holds(self.camera, 0.3):
            return False
        self.things.append(Thing(shape, surface))
        return True


Rng = np.random.Generator


def log_uniform(rng: Rng, low: float, high: float) -> float:
    """Log-uniform."""
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


def upright_box(x: float, y: float, z: float, width: float, height: float, depth: float, yaw: float = 0.0) -> Box:
    """A box that stands upright, its centre at (x, y, z)."""
    return Box(vector(x, y, z), vector(width / 2, height / 2, depth / 2), rotation(yaw))


def offset_from(x: float, z: float, yaw: float, dx: float, dz: float) -> tuple[float, float]:
    """The offset (dx, dz) in a frame turned by yaw, added to (x, z)."""
    return x + math.cos(yaw) * dx + math.sin(yaw) * dz, z - math.sin(yaw) * dx + math.cos(yaw) * dz


def _legs(scene: Scene, x: float, z: float, yaw: float, size: tuple[float, float, float], surface: Material) -> None:
    width, height, depth = size
    for dx, dz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        leg = offset_from(x, z, yaw, dx * (width / 2 - 0.04), dz * (depth / 2 - 0.04))
        scene.add(Cylinder(vector(leg[0], -height / 2, leg[1]), 0.025, height / 2), surface)


def crate(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, height, depth = (log_uniform(rng, 0.15, 1.4) for _ in range(3))
    if scene.add(upright_box(x, -height / 2, z, width, height, depth, yaw), material(rng)) and rng.random() < 0.3:
        upper = log_uniform(rng, 0.1, 0.5)
        scene.add(
            upright_box(x, -height - upper / 2, z, width * 0.6, upper, depth * 0.6, yaw + rng.normal(0, 0.3)),
            material(rng),
        )


def table(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, height, depth = rng.uniform(0.6, 2.0), rng.uniform(0.4, 0.95), rng.uniform(0.5, 1.0)
    surface = material(rng)
    scene.add(upright_box(x, -height, z, width, 0.05, depth, yaw), surface)
    _legs(scene, x, z, yaw, (width, height, depth), surface)
    for _ in range(int(rng.integers(0, 4))):
        dx, dz = rng.uniform(-0.4, 0.4) * width, rng.uniform(-0.4, 0.4) * depth
        on = offset_from(x, z, yaw, dx, dz)
        size = rng.uniform(0.05, 0.18)
        kind = rng.integers(3)
        at = vector(on[0], -height - 0.025 - size, on[1])
        shape: Shape = (
            Sphere(at, size)
            if kind == 0
            else Cylinder(at, size * 0.6, size)
            if kind == 1
            else Box(at, vector(size * 1.2, size, size * 0.7), rotation(rng.uniform(0, 6)))
        )
        scene.add(shape, material(rng))


def chair(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, seat, back = rng.uniform(0.4, 0.55), rng.uniform(0.4, 0.5), rng.uniform(0.35, 0.6)
    surface = material(rng)
    scene.add(upright_box(x, -seat, z, width, 0.06, width, yaw), surface)
    behind = offset_from(x, z, yaw, 0, width / 2 - 0.03)
    scene.add(upright_box(behind[0], -seat - back / 2, behind[1], width, back, 0.05, yaw), surface)
    _legs(scene, x, z, yaw, (width, seat, width), surface)


def sofa(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, surface = rng.uniform(1.2, 2.4), material(rng, {"plain": 3, "noise": 1, "stripes": 0.5})
    scene.add(upright_box(x, -0.22, z, width, 0.44, 0.85, yaw), surface)
    behind = offset_from(x, z, yaw, 0, 0.36)
    scene.add(upright_box(behind[0], -0.62, behind[1], width, 0.42, 0.16, yaw), surface)
    for side in (-1, 1):
        arm = offset_from(x, z, yaw, side * (width / 2 - 0.08), 0)
        scene.add(upright_box(arm[0], -0.54, arm[1], 0.16, 0.22, 0.85, yaw), surface)


def shelf(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, height, depth = rng.uniform(0.6, 1.6), rng.uniform(0.8, 2.2), rng.uniform(0.25, 0.5)
    surface = material(rng)
    back = offset_from(x, z, yaw, 0, depth / 2)
    scene.add(upright_box(back[0], -height / 2, back[1], width, height, 0.03, yaw), surface)
    for level in range(int(rng.integers(2, 6))):
        scene.add(upright_box(x, -height * (level + 0.5) / 5, z, width, 0.04, depth, yaw), surface)
    for side in (-1, 1):
        at = offset_from(x, z, yaw, side * width / 2, 0)
        scene.add(upright_box(at[0], -height / 2, at[1], 0.04, height, depth, yaw), surface)


def ball(scene: Scene, rng: Rng, x: float, z: float, _: float) -> None:
    size = log_uniform(rng, 0.08, 0.7)
    scene.add(Sphere(vector(x, -size, z), size), material(rng))


def drum(scene: Scene, rng: Rng, x: float, z: float, _: float) -> None:
    width, height = log_uniform(rng, 0.08, 0.5), log_uniform(rng, 0.2, 1.6)
    scene.add(Cylinder(vector(x, -height / 2, z), width, height / 2), material(rng))


def pole(scene: Scene, rng: Rng, x: float, z: float, _: float) -> None:
    height = log_uniform(rng, 1.0, 3.0)
    scene.add(Cylinder(vector(x, -height / 2, z), rng.uniform(0.015, 0.06), height / 2), material(rng))
    if rng.random() < 0.5:
        scene.add(Sphere(vector(x, -height, z), rng.uniform(0.08, 0.25)), material(rng))


def ramp(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    """A slanted board, leaning at any angle."""
    width, length = log_uniform(rng, 0.4, 2.5), log_uniform(rng, 0.5, 3.0)
    slope = rng.uniform(0.15, 1.4)
    height = math.sin(slope) * length / 2
    axes = rotation(yaw, slope, rng.normal(0, 0.1))
    scene.add(Box(vector(x, -height, z), vector(width / 2, 0.03, length / 2), axes), material(rng))


def tumbled(scene: Scene, rng: Rng, x: float, z: float, _: float) -> None:
    """A box turned in all directions."""
    half = np.exp(rng.uniform(math.log(0.08), math.log(0.6), 3)).astype(np.float32)[:, None]
    axes = rotation(*rng.uniform(0, 6.3, 3))
    scene.add(Box(vector(x, -float(np.linalg.norm(half)) * 0.7, z), half, axes), material(rng))


FURNITURE: tuple[Callable[[Scene, Rng, float, float, float], None], ...] = (
    crate,
    crate,
    table,
    chair,
    sofa,
    shelf,
    ball,
    drum,
    pole,
    ramp,
    tumbled,
)
CLUTTER = (crate, crate, ball, drum, pole, ramp, tumbled)
