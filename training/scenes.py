"""Procedural scenes: rooms, corridors, streets and open ground, drawn from a seed.

The camera stands at x = z = 0 unless it is moved, `height` metres above the floor y = 0, and looks roughly along +z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from densegeo.training.shapes import Array, Box, Cylinder, Ground, Shape, Sphere, rotation, vector
from densegeo.training.textures import ANYTHING, EARTH, FACADE, FLOOR, WALL, Material, material


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


def _between(rng: Rng, low: float, high: float) -> float:
    """Log-uniform."""
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


def _box(x: float, y: float, z: float, width: float, height: float, depth: float, yaw: float = 0.0) -> Box:
    """A box that stands upright, its centre at (x, y, z)."""
    return Box(vector(x, y, z), vector(width / 2, height / 2, depth / 2), rotation(yaw))


def _turned(x: float, z: float, yaw: float, dx: float, dz: float) -> tuple[float, float]:
    """The offset (dx, dz) in a frame turned by yaw, added to (x, z)."""
    return x + math.cos(yaw) * dx + math.sin(yaw) * dz, z - math.sin(yaw) * dx + math.cos(yaw) * dz


def _legs(scene: Scene, x: float, z: float, yaw: float, size: tuple[float, float, float], surface: Material) -> None:
    width, height, depth = size
    for dx, dz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        leg = _turned(x, z, yaw, dx * (width / 2 - 0.04), dz * (depth / 2 - 0.04))
        scene.add(Cylinder(vector(leg[0], -height / 2, leg[1]), 0.025, height / 2), surface)


def crate(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, height, depth = (_between(rng, 0.15, 1.4) for _ in range(3))
    if scene.add(_box(x, -height / 2, z, width, height, depth, yaw), material(rng)) and rng.random() < 0.3:
        upper = _between(rng, 0.1, 0.5)
        scene.add(
            _box(x, -height - upper / 2, z, width * 0.6, upper, depth * 0.6, yaw + rng.normal(0, 0.3)), material(rng)
        )


def table(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, height, depth = rng.uniform(0.6, 2.0), rng.uniform(0.4, 0.95), rng.uniform(0.5, 1.0)
    surface = material(rng)
    scene.add(_box(x, -height, z, width, 0.05, depth, yaw), surface)
    _legs(scene, x, z, yaw, (width, height, depth), surface)
    for _ in range(int(rng.integers(0, 4))):
        dx, dz = rng.uniform(-0.4, 0.4) * width, rng.uniform(-0.4, 0.4) * depth
        on = _turned(x, z, yaw, dx, dz)
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
    scene.add(_box(x, -seat, z, width, 0.06, width, yaw), surface)
    behind = _turned(x, z, yaw, 0, width / 2 - 0.03)
    scene.add(_box(behind[0], -seat - back / 2, behind[1], width, back, 0.05, yaw), surface)
    _legs(scene, x, z, yaw, (width, seat, width), surface)


def sofa(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, surface = rng.uniform(1.2, 2.4), material(rng, {"plain": 3, "noise": 1, "stripes": 0.5})
    scene.add(_box(x, -0.22, z, width, 0.44, 0.85, yaw), surface)
    behind = _turned(x, z, yaw, 0, 0.36)
    scene.add(_box(behind[0], -0.62, behind[1], width, 0.42, 0.16, yaw), surface)
    for side in (-1, 1):
        arm = _turned(x, z, yaw, side * (width / 2 - 0.08), 0)
        scene.add(_box(arm[0], -0.54, arm[1], 0.16, 0.22, 0.85, yaw), surface)


def shelf(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    width, height, depth = rng.uniform(0.6, 1.6), rng.uniform(0.8, 2.2), rng.uniform(0.25, 0.5)
    surface = material(rng)
    back = _turned(x, z, yaw, 0, depth / 2)
    scene.add(_box(back[0], -height / 2, back[1], width, height, 0.03, yaw), surface)
    for level in range(int(rng.integers(2, 6))):
        scene.add(_box(x, -height * (level + 0.5) / 5, z, width, 0.04, depth, yaw), surface)
    for side in (-1, 1):
        at = _turned(x, z, yaw, side * width / 2, 0)
        scene.add(_box(at[0], -height / 2, at[1], 0.04, height, depth, yaw), surface)


def ball(scene: Scene, rng: Rng, x: float, z: float, _: float) -> None:
    size = _between(rng, 0.08, 0.7)
    scene.add(Sphere(vector(x, -size, z), size), material(rng))


def drum(scene: Scene, rng: Rng, x: float, z: float, _: float) -> None:
    width, height = _between(rng, 0.08, 0.5), _between(rng, 0.2, 1.6)
    scene.add(Cylinder(vector(x, -height / 2, z), width, height / 2), material(rng))


def pole(scene: Scene, rng: Rng, x: float, z: float, _: float) -> None:
    height = _between(rng, 1.0, 3.0)
    scene.add(Cylinder(vector(x, -height / 2, z), rng.uniform(0.015, 0.06), height / 2), material(rng))
    if rng.random() < 0.5:
        scene.add(Sphere(vector(x, -height, z), rng.uniform(0.08, 0.25)), material(rng))


def ramp(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    """A slanted board, leaning at any angle."""
    width, length = _between(rng, 0.4, 2.5), _between(rng, 0.5, 3.0)
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


def _start(rng: Rng, kind: str, height: tuple[float, float], pitch: tuple[float, float], yaw: float) -> Scene:
    axes = rotation(rng.uniform(-yaw, yaw), -rng.normal(*pitch), rng.normal(0, 0.03))
    return Scene(kind, rng.uniform(*height), axes, math.radians(rng.uniform(48, 92)))


def _daylight(scene: Scene, rng: Rng) -> None:
    """Sun (often behind clouds), sky and haze."""
    azimuth, elevation = rng.uniform(0, 2 * math.pi), rng.uniform(0.25, 1.4)
    towards = vector(
        math.cos(elevation) * math.sin(azimuth), -math.sin(elevation), math.cos(elevation) * math.cos(azimuth)
    )
    overcast = rng.random() < 0.35
    warm = vector(1.0, rng.uniform(0.8, 1.0), rng.uniform(0.65, 0.95))
    scene.lights.append(Light(warm * np.float32(0.15 if overcast else rng.uniform(0.6, 1.4)), direction=towards))
    blue = 0.0 if overcast else rng.uniform(0.2, 0.9)
    zenith = vector(0.75 - 0.55 * blue, 0.78 - 0.38 * blue, 0.82)
    scene.sky = (
        vector(0.85, 0.87, 0.9) * np.float32(rng.uniform(0.75, 1.15)),
        zenith * np.float32(rng.uniform(0.7, 1)),
    )
    scene.ambient = zenith * np.float32(0.7 if overcast else rng.uniform(0.25, 0.5))
    if rng.random() < 0.5:
        scene.haze = _between(rng, 60, 400)


def _interior(scene: Scene, rng: Rng, size: tuple[float, float, float], offset: tuple[float, float]) -> None:
    """Walls, floor, ceiling and lamps; `offset` (x, z) of the room's centre from the camera."""
    width, height, depth = size
    x, z = offset
    room = _box(x, -height / 2, z, width, height, depth)
    scene.room = Box(room.center, room.half, room.axes, inside=True)
    scene.things.append(Thing(scene.room, material(rng, WALL)))
    scene.add(_box(x, 0.0, z, width, 0.02, depth), material(rng, FLOOR))
    scene.add(_box(x, -height, z, width, 0.02, depth), material(rng, {"plain": 8, "tiles": 1, "noise": 0.5}))
    if rng.random() < 0.5:  # skirting
        surface = material(rng, {"plain": 1})
        for side in (-1, 1):
            scene.add(_box(x + side * width / 2, -0.06, z, 0.03, 0.12, depth), surface)
            scene.add(_box(x, -0.06, z + side * depth / 2, width, 0.12, 0.03), surface)
    scene.ambient = vector(*np.exp(rng.normal(0, 0.06, 3))) * np.float32(rng.uniform(0.25, 0.7))
    for _ in range(int(rng.integers(1, 4))):
        at = vector(
            x + rng.uniform(-0.45, 0.45) * width,
            -rng.uniform(0.75, 0.97) * height,
            z + rng.uniform(-0.45, 0.45) * depth,
        )
        warm = vector(1.0, rng.uniform(0.75, 1.0), rng.uniform(0.5, 1.0))
        scene.lights.append(Light(warm * np.float32(_between(rng, 0.8, 4.0)), position=at))


def _on_walls(scene: Scene, rng: Rng, count: int) -> None:
    """Pictures, doors, windows and beams flat on the room's walls."""
    assert scene.room is not None
    (x,), _, (z,) = scene.room.center
    (half_width,), (half_height,), (half_depth,) = scene.room.half
    for _ in range(count):
        door = rng.random() < 0.4
        width, height = (rng.uniform(0.8, 1.1), 2.05) if door else (_between(rng, 0.3, 2.0), _between(rng, 0.3, 1.4))
        height = min(height, 2 * half_height - 0.1)
        middle = (
            -height / 2 if door else float(np.clip(-rng.uniform(1.1, 1.9), -2 * half_height + height / 2, -height / 2))
        )
        thick = rng.uniform(0.02, 0.12)
        surface = material(rng, ANYTHING | {"photo": 4, "plain": 6})
        if rng.random() < 0.6:  # a side wall
            side = rng.choice([-1, 1])
            along = z + rng.uniform(-0.95, 0.95) * (half_depth - width / 2)
            scene.add(_box(x + side * half_width, middle, along, thick, height, width), surface)
        else:
            along = x + rng.uniform(-0.95, 0.95) * max(half_width - width / 2, 0)
            scene.add(_box(along, middle, z + half_depth, width, height, thick), surface)


def room(rng: Rng) -> Scene:
    scene = _start(rng, "room", (0.7, 1.9), (-0.1, 0.12), 0.9)
    width, depth = _between(rng, 2.6, 9.0), _between(rng, 3.0, 11.0)
    offset = rng.uniform(-0.35, 0.35) * width, depth * rng.uniform(0.1, 0.42)
    _interior(scene, rng, (width, rng.uniform(max(2.2, scene.height + 0.4), 3.6), depth), offset)
    _on_walls(scene, rng, int(rng.integers(0, 6)))
    for _ in range(int(rng.integers(1, 9))):
        against = rng.random() < 0.4
        spread = 0.47 if against else 0.4
        x = offset[0] + rng.uniform(-spread, spread) * width
        z = offset[1] + (0.5 * depth - 0.3 if against else rng.uniform(-0.3, 0.45) * depth)
        if math.hypot(x, z) > 0.9:
            yaw = 0.0 if against else float(rng.choice([0, math.pi / 2, math.pi, rng.uniform(0, 6.3)]))
            FURNITURE[int(rng.integers(len(FURNITURE)))](scene, rng, x, z, yaw)
    if rng.random() < 0.3:  # a pillar, or a wall that juts out
        _pillar(scene, rng, (width, depth), offset)
    return scene


def _pillar(scene: Scene, rng: Rng, size: tuple[float, float], offset: tuple[float, float]) -> None:
    x, z = offset[0] + rng.choice([-0.45, 0.45]) * size[0], offset[1] + rng.uniform(-0.1, 0.45) * size[1]
    scene.add(_box(x, -2.0, z, rng.uniform(0.3, 0.3 * size[0]), 4.0, rng.uniform(0.2, 1.5)), material(rng, WALL))


def corridor(rng: Rng) -> Scene:
    scene = _start(rng, "corridor", (0.7, 1.9), (-0.03, 0.08), 0.3)
    width, depth = rng.uniform(1.3, 4.0), _between(rng, 6.0, 35.0)
    offset = rng.uniform(-0.3, 0.3) * width, depth * 0.5 - rng.uniform(0.5, 1.5)
    _interior(scene, rng, (width, rng.uniform(max(2.2, scene.height + 0.4), 4.0), depth), offset)
    assert scene.room is not None
    _on_walls(scene, rng, int(rng.integers(2, 12)))
    ceiling = -2 * float(scene.room.half[1, 0])
    if rng.random() < 0.6:  # light panels
        step, bright = rng.uniform(1.5, 4.0), material(rng, {"plain": 1})
        for index in range(min(12, int(depth / step))):
            scene.add(_box(offset[0], ceiling, 1.0 + step * index, rng.uniform(0.3, 0.5) * width, 0.06, 0.5), bright)
    if rng.random() < 0.35:  # pillars along the walls
        step, surface = rng.uniform(2.0, 5.0), material(rng, WALL)
        for index in range(min(8, int(depth / step))):
            for side in (-1, 1):
                x = offset[0] + side * width / 2
                scene.add(_box(x, ceiling / 2, 1.5 + step * index, 0.5, -ceiling, 0.4), surface)
    for _ in range(int(rng.integers(0, 6))):
        x = offset[0] + rng.choice([-1, 1]) * rng.uniform(0.25, 0.45) * width
        z = rng.uniform(1.5, min(depth - 2, 14))
        CLUTTER[int(rng.integers(len(CLUTTER)))](scene, rng, x, z, 0.0)
    return scene


def _car(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    length, width, low = rng.uniform(3.4, 5.0), rng.uniform(1.6, 1.9), rng.uniform(0.7, 0.95)
    paint, glass = material(rng, {"plain": 1}), material(rng, {"plain": 1})
    scene.add(_box(x, -low / 2 - 0.15, z, width, low, length, yaw), paint)
    cabin = _turned(x, z, yaw, 0, 0.1 * length)
    scene.add(_box(cabin[0], -low - 0.4, cabin[1], width * 0.88, 0.55, length * 0.5, yaw), glass)
    for dx, dz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        wheel = _turned(x, z, yaw, dx * width * 0.45, dz * length * 0.32)
        scene.add(Sphere(vector(wheel[0], -0.3, wheel[1]), 0.32), material(rng, {"plain": 1}))


def _tree(scene: Scene, rng: Rng, x: float, z: float) -> None:
    trunk, crown = rng.uniform(1.0, 3.0), rng.uniform(0.8, 2.2)
    scene.add(Cylinder(vector(x, -trunk / 2, z), rng.uniform(0.06, 0.25), trunk / 2), material(rng, {"wood": 1}))
    leaves = material(rng, {"photo": 2, "noise": 3})
    for _ in range(int(rng.integers(1, 4))):
        dx, dy, dz = rng.normal(0, 0.35, 3) * crown
        scene.add(Sphere(vector(x + dx, -trunk - crown * 0.7 + dy, z + dz), crown * rng.uniform(0.5, 1)), leaves)


def street(rng: Rng) -> Scene:
    scene = _start(rng, "street", (1.2, 2.4), (-0.02, 0.06), 0.35)
    _daylight(scene, rng)
    scene.things.append(Thing(Ground(), material(rng, EARTH)))
    half = rng.uniform(3.0, 11.0)
    shift = rng.uniform(-0.4, 0.4) * half
    pavement = material(rng, {"tiles": 3, "plain": 2})
    for side in (-1, 1):
        walk = rng.uniform(1.0, 3.5)
        if rng.random() < 0.8:
            scene.add(_box(shift + side * (half - walk / 2), -0.06, 60.0, walk, 0.14, 160.0), pavement)
        if rng.random() < 0.12:
            continue  # this side is open
        z = rng.uniform(-8.0, 0.0)
        while z < 90:
            width, height = rng.uniform(5, 22), _between(rng, 3.0, 25.0)
            recess = rng.uniform(0, 2.0) if rng.random() < 0.5 else 0.0
            x = shift + side * (half + recess + 5)
            scene.add(_box(x, -height / 2, z + width / 2, 10.0, height, width), material(rng, FACADE))
            z += width + (rng.uniform(1, 10) if rng.random() < 0.25 else 0.0)
        for _ in range(int(rng.integers(0, 5))):
            z = rng.uniform(4, 45)
            if rng.random() < 0.5:
                _car(scene, rng, shift + side * (half - walk - 1.1), z, rng.normal(0, 0.05))
            else:
                _tree(scene, rng, shift + side * (half - walk * 0.5), z)
        if rng.random() < 0.6:
            step, tall, surface = rng.uniform(6, 20), rng.uniform(3, 8), material(rng, {"plain": 1})
            for index in range(4):
                at = vector(shift + side * (half - 0.4), -tall / 2, 3 + step * index)
                scene.add(Cylinder(at, rng.uniform(0.04, 0.12), tall / 2), surface)
    if rng.random() < 0.5:  # the street ends
        height = _between(rng, 4, 20)
        scene.add(_box(shift, -height / 2, rng.uniform(25, 85), 60.0, height, 8.0), material(rng, FACADE))
    for _ in range(int(rng.integers(0, 5))):
        x, z = shift + rng.uniform(-0.8, 0.8) * half, rng.uniform(3, 30)
        (_car if rng.random() < 0.4 else _clutter)(scene, rng, x, z, rng.normal(0, 0.4))
    return scene


def _clutter(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    CLUTTER[int(rng.integers(len(CLUTTER)))](scene, rng, x, z, yaw)


def open_ground(rng: Rng) -> Scene:
    scene = _start(rng, "open ground", (0.5, 2.2), (-0.12, 0.1), 0.5)
    _daylight(scene, rng)
    scene.things.append(Thing(Ground(), material(rng, EARTH)))
    for _ in range(int(rng.integers(2, 14))):
        z = _between(rng, 1.5, 22.0)
        x = rng.uniform(-0.8, 0.8) * z
        _clutter(scene, rng, x, z, rng.uniform(0, 6.3))
    for _ in range(int(rng.integers(0, 5))):
        z = _between(rng, 5, 50)
        _tree(scene, rng, rng.uniform(-0.8, 0.8) * z, z)
    if rng.random() < 0.6:  # a house, a wall or a hedge behind
        z, height = _between(rng, 6, 50), _between(rng, 1.0, 8.0)
        width = rng.uniform(0.3, 3.0) * z
        x = rng.uniform(-0.5, 0.5) * z
        scene.add(
            _box(x, -height / 2, z, width, height, rng.uniform(0.2, 6), rng.normal(0, 0.5)), material(rng, FACADE)
        )
    if rng.random() < 0.4:  # hills
        for _ in range(int(rng.integers(1, 4))):
            size, z = rng.uniform(40, 120), rng.uniform(60, 110)
            at = vector(rng.uniform(-80, 80), size * rng.uniform(0.75, 0.95), z + size * 0.5)
            scene.add(Sphere(at, size), material(rng, EARTH))
    return scene


LAYOUTS: tuple[tuple[Callable[[Rng], Scene], float], ...] = (
    (room, 0.42),
    (corridor, 0.16),
    (street, 0.22),
    (open_ground, 0.20),
)


def draw(rng: Rng) -> Scene:
    """A random scene of a random layout."""
    layouts, shares = zip(*LAYOUTS, strict=True)
    return layouts[int(rng.choice(len(layouts), p=shares))](rng)
