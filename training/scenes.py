"""Procedural scenes: rooms, corridors, streets and open ground, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from densegeo.training.objects import (
    CLUTTER,
    FURNITURE,
    Light,
    Rng,
    Scene,
    Thing,
    log_uniform,
    offset_from,
    upright_box,
)
from densegeo.training.shapes import Box, Cylinder, Ground, Sphere, rotation, vector
from densegeo.training.textures import ANYTHING, EARTH, FACADE, FLOOR, WALL, material


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
        scene.haze = log_uniform(rng, 60, 400)


def _interior(scene: Scene, rng: Rng, size: tuple[float, float, float], offset: tuple[float, float]) -> None:
    """Walls, floor, ceiling and lamps; `offset` (x, z) of the room's centre from the camera."""
    width, height, depth = size
    x, z = offset
    room = upright_box(x, -height / 2, z, width, height, depth)
    scene.room = Box(room.center, room.half, room.axes, inside=True)
    scene.things.append(Thing(scene.room, material(rng, WALL)))
    scene.add(upright_box(x, 0.0, z, width, 0.02, depth), material(rng, FLOOR))
    scene.add(upright_box(x, -height, z, width, 0.02, depth), material(rng, {"plain": 8, "tiles": 1, "noise": 0.5}))
    if rng.random() < 0.5:  # skirting
        surface = material(rng, {"plain": 1})
        for side in (-1, 1):
            scene.add(upright_box(x + side * width / 2, -0.06, z, 0.03, 0.12, depth), surface)
            scene.add(upright_box(x, -0.06, z + side * depth / 2, width, 0.12, 0.03), surface)
    scene.ambient = vector(*np.exp(rng.normal(0, 0.06, 3))) * np.float32(rng.uniform(0.25, 0.7))
    for _ in range(int(rng.integers(1, 4))):
        at = vector(
            x + rng.uniform(-0.45, 0.45) * width,
            -rng.uniform(0.75, 0.97) * height,
            z + rng.uniform(-0.45, 0.45) * depth,
        )
        warm = vector(1.0, rng.uniform(0.75, 1.0), rng.uniform(0.5, 1.0))
        scene.lights.append(Light(warm * np.float32(log_uniform(rng, 0.8, 4.0)), position=at))


def _on_walls(scene: Scene, rng: Rng, count: int) -> None:
    """Pictures, doors, windows and beams flat on the room's walls."""
    assert scene.room is not None
    (x,), _, (z,) = scene.room.center
    (half_width,), (half_height,), (half_depth,) = scene.room.half
    for _ in range(count):
        door = rng.random() < 0.4
        width, height = (
            (rng.uniform(0.8, 1.1), 2.05) if door else (log_uniform(rng, 0.3, 2.0), log_uniform(rng, 0.3, 1.4))
        )
        height = min(height, 2 * half_height - 0.1)
        middle = (
            -height / 2 if door else float(np.clip(-rng.uniform(1.1, 1.9), -2 * half_height + height / 2, -height / 2))
        )
        thick = rng.uniform(0.02, 0.12)
        surface = material(rng, ANYTHING | {"photo": 4, "plain": 6})
        if rng.random() < 0.6:  # a side wall
            side = rng.choice([-1, 1])
            along = z + rng.uniform(-0.95, 0.95) * (half_depth - width / 2)
            scene.add(upright_box(x + side * half_width, middle, along, thick, height, width), surface)
        else:
            along = x + rng.uniform(-0.95, 0.95) * max(half_width - width / 2, 0)
            scene.add(upright_box(along, middle, z + half_depth, width, height, thick), surface)


def room(rng: Rng) -> Scene:
    scene = _start(rng, "room", (0.7, 1.9), (-0.1, 0.12), 0.9)
    width, depth = log_uniform(rng, 2.6, 9.0), log_uniform(rng, 3.0, 11.0)
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
    scene.add(upright_box(x, -2.0, z, rng.uniform(0.3, 0.3 * size[0]), 4.0, rng.uniform(0.2, 1.5)), material(rng, WALL))


def corridor(rng: Rng) -> Scene:
    scene = _start(rng, "corridor", (0.7, 1.9), (-0.03, 0.08), 0.3)
    width, depth = rng.uniform(1.3, 4.0), log_uniform(rng, 6.0, 35.0)
    offset = rng.uniform(-0.3, 0.3) * width, depth * 0.5 - rng.uniform(0.5, 1.5)
    _interior(scene, rng, (width, rng.uniform(max(2.2, scene.height + 0.4), 4.0), depth), offset)
    assert scene.room is not None
    _on_walls(scene, rng, int(rng.integers(2, 12)))
    ceiling = -2 * float(scene.room.half[1, 0])
    if rng.random() < 0.6:  # light panels
        step, bright = rng.uniform(1.5, 4.0), material(rng, {"plain": 1})
        for index in range(min(12, int(depth / step))):
            scene.add(
                upright_box(offset[0], ceiling, 1.0 + step * index, rng.uniform(0.3, 0.5) * width, 0.06, 0.5), bright
            )
    if rng.random() < 0.35:  # pillars along the walls
        step, surface = rng.uniform(2.0, 5.0), material(rng, WALL)
        for index in range(min(8, int(depth / step))):
            for side in (-1, 1):
                x = offset[0] + side * width / 2
                scene.add(upright_box(x, ceiling / 2, 1.5 + step * index, 0.5, -ceiling, 0.4), surface)
    for _ in range(int(rng.integers(0, 6))):
        x = offset[0] + rng.choice([-1, 1]) * rng.uniform(0.25, 0.45) * width
        z = rng.uniform(1.5, min(depth - 2, 14))
        CLUTTER[int(rng.integers(len(CLUTTER)))](scene, rng, x, z, 0.0)
    return scene


def _car(scene: Scene, rng: Rng, x: float, z: float, yaw: float) -> None:
    length, width, low = rng.uniform(3.4, 5.0), rng.uniform(1.6, 1.9), rng.uniform(0.7, 0.95)
    paint, glass = material(rng, {"plain": 1}), material(rng, {"plain": 1})
    scene.add(upright_box(x, -low / 2 - 0.15, z, width, low, length, yaw), paint)
    cabin = offset_from(x, z, yaw, 0, 0.1 * length)
    scene.add(upright_box(cabin[0], -low - 0.4, cabin[1], width * 0.88, 0.55, length * 0.5, yaw), glass)
    for dx, dz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        wheel = offset_from(x, z, yaw, dx * width * 0.45, dz * length * 0.32)
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
            scene.add(upright_box(shift + side * (half - walk / 2), -0.06, 60.0, walk, 0.14, 160.0), pavement)
        if rng.random() < 0.12:
            continue  # this side is open
        z = rng.uniform(-8.0, 0.0)
        while z < 90:
            width, height = rng.uniform(5, 22), log_uniform(rng, 3.0, 25.0)
            recess = rng.uniform(0, 2.0) if rng.random() < 0.5 else 0.0
            x = shift + side * (half + recess + 5)
            scene.add(upright_box(x, -height / 2, z + width / 2, 10.0, height, width), material(rng, FACADE))
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
        height = log_uniform(rng, 4, 20)
        scene.add(upright_box(shift, -height / 2, rng.uniform(25, 85), 60.0, height, 8.0), material(rng, FACADE))
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
        z = log_uniform(rng, 1.5, 22.0)
        x = rng.uniform(-0.8, 0.8) * z
        _clutter(scene, rng, x, z, rng.uniform(0, 6.3))
    for _ in range(int(rng.integers(0, 5))):
        z = log_uniform(rng, 5, 50)
        _tree(scene, rng, rng.uniform(-0.8, 0.8) * z, z)
    if rng.random() < 0.6:  # a house, a wall or a hedge behind
        z, height = log_uniform(rng, 6, 50), log_uniform(rng, 1.0, 8.0)
        width = rng.uniform(0.3, 3.0) * z
        x = rng.uniform(-0.5, 0.5) * z
        scene.add(
            upright_box(x, -height / 2, z, width, height, rng.uniform(0.2, 6), rng.normal(0, 0.5)),
            material(rng, FACADE),
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
