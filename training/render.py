"""Rays into a scene: what a camera sees, and the exact depth and normals behind every pixel."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from densegeo.training.objects import Light, Rng, Scene, Thing
from densegeo.training.scenes import draw
from densegeo.training.shapes import Array, dot, vector
from densegeo.training.textures import noise

FARTHEST = 100.0  # metres; what lies beyond counts as sky


@dataclass(frozen=True)
class View:
    """A rendered picture with its ground truth; H x W pixels.

    rgb: uint8 (H, W, 3), sRGB-like. depth: float32 (H, W), z along the optical axis in metres, NaN where invalid.
    normals: float32 (H, W, 3), unit, OpenCV camera frame (x right, y down, z forward), camera-facing, 0 where invalid.
    intrinsics: (fx, fy, cx, cy) in pixels, the first pixel's centre at (0, 0).
    """

    kind: str
    rgb: NDArray[np.uint8]
    depth: Array
    normals: Array
    valid: NDArray[np.bool_]
    intrinsics: tuple[float, float, float, float]


def view(seed: int, split: str, index: int, width: int = 256, height: int = 192) -> View:
    """Scene `index` of a split ("train", "test", ...): the same arguments give the same view."""
    return scene_and_view(seed, split, index, width, height)[1]


def scene_and_view(seed: int, split: str, index: int, width: int, height: int) -> tuple[Scene, View]:
    """`view`, with the scene that it shows."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    while True:
        scene = draw(rng)
        rendered = render(scene, width, height, rng)
        near, far = np.nanpercentile(rendered.depth, [2, 98]) if rendered.valid.mean() > 0.3 else (1, 1)
        if far > 1.2 * near:  # a bare wall or an empty sky teaches nothing
            return scene, rendered


def render(scene: Scene, width: int, height: int, rng: Rng) -> View:
    """Ray-cast a scene; `rng` draws exposure, colour cast and sensor noise."""
    focal = 0.5 * width / math.tan(0.5 * scene.field_of_view)
    cx, cy = 0.5 * (width - 1), 0.5 * (height - 1)
    x, y = np.meshgrid((np.arange(width) - cx) / focal, (np.arange(height) - cy) / focal)
    rays = scene.axes @ np.stack([x.ravel(), y.ravel(), np.ones(width * height)]).astype(np.float32)  # camera z = 1
    depth, nearest = _cast(scene, rays, width, height, (focal, cx, cy))
    visible = depth < FARTHEST
    points = scene.camera + rays * np.where(visible, depth, 0)
    normals = np.zeros_like(rays)
    colour = _sky(scene, rays, rng)
    groups = [(thing, np.flatnonzero(visible & (nearest == index))) for index, thing in enumerate(scene.things)]
    albedo, gloss = np.zeros_like(rays), np.zeros_like(depth)
    for thing, at in groups:
        if len(at):
            normals[:, at], uv = thing.shape.surface(points[:, at])
            facing = np.abs(dot(normals[:, at], rays[:, at]))
            albedo[:, at] = thing.material.albedo(
                uv, depth[at] / np.float32(focal) / np.sqrt(np.maximum(facing, np.float32(0.05)))
            )
            gloss[at] = thing.material.gloss
    lit = np.flatnonzero(visible)
    colour[:, lit] = _shade(scene, points[:, lit], normals[:, lit], albedo[:, lit], gloss[lit], rays[:, lit])
    if scene.haze < math.inf and scene.sky is not None:
        clear = np.exp(-depth[lit] / np.float32(scene.haze))
        colour[:, lit] = colour[:, lit] * clear + scene.sky[0] * (1 - clear)
    normals = scene.axes.T @ (normals / np.sqrt(np.maximum(dot(normals, normals), np.float32(1e-12))))
    shape = (height, width)
    return View(
        kind=scene.kind,
        rgb=_develop(colour.reshape(3, *shape), rng),
        depth=np.where(visible, depth, np.float32(np.nan)).reshape(shape).astype(np.float32),
        normals=np.ascontiguousarray(normals.T).reshape(*shape, 3),
        valid=visible.reshape(shape),
        intrinsics=(focal, focal, cx, cy),
    )


def _cast(
    scene: Scene, rays: Array, width: int, height: int, lens: tuple[float, float, float]
) -> tuple[Array, NDArray[np.int64]]:
    """Nearest hit of every ray: depth (N,) and the thing's index; each thing is tried inside its bounding rectangle."""
    depth = np.full((height, width), np.inf, dtype=np.float32)
    nearest = np.full((height, width), -1, dtype=np.int64)
    grid = rays.reshape(3, height, width)
    for index, thing in enumerate(scene.things):
        window = _window(scene, thing, width, height, lens)
        if window is None:
            continue
        rows, columns = window
        part = np.ascontiguousarray(grid[:, rows, columns]).reshape(3, -1)
        if part.shape[1] == 0:
            continue
        t = thing.shape.intersect(scene.camera, part).reshape(depth[rows, columns].shape)
        closer = t < depth[rows, columns]
        depth[rows, columns][closer] = t[closer]
        nearest[rows, columns][closer] = index
    return depth.ravel(), nearest.ravel()


def _window(
    scene: Scene, thing: Thing, width: int, height: int, lens: tuple[float, float, float]
) -> tuple[slice, slice] | None:
    """Rows and columns that a thing's bounding sphere can cover, or None when it is behind the camera."""
    radius = thing.shape.radius
    if not math.isfinite(radius):
        return slice(0, height), slice(0, width)
    (x,), (y,), (z,) = scene.axes.T @ (thing.shape.center - scene.camera)
    if z < -radius:
        return None
    if z <= 1.01 * radius:
        return slice(0, height), slice(0, width)
    focal, cx, cy = lens
    bounds = []
    for middle, offset, extent in ((y, cy, height), (x, cx, width)):
        edges = [(middle + sign * radius) / (z + side * radius) for sign in (-1, 1) for side in (-1, 1)]
        low, high = math.floor(offset + focal * min(edges)), math.ceil(offset + focal * max(edges)) + 1
        bounds.append(slice(min(max(low, 0), extent), min(max(high, 0), extent)))
    return bounds[0], bounds[1]


def _sky(scene: Scene, rays: Array, rng: Rng) -> Array:
    if scene.sky is None:
        return np.zeros_like(rays)
    horizon, zenith = scene.sky
    up = np.clip(-rays[1] / np.sqrt(dot(rays, rays)), 0, 1)
    colour = horizon + (zenith - horizon) * np.sqrt(up)
    clouds, cover = noise(rng, 4), np.float32(rng.uniform(0, 0.8))
    above = np.maximum(up, 0.08)
    u, v = ((np.stack([rays[0], rays[2]]) / above * 6) % clouds.shape[0]).astype(np.int64) % clouds.shape[0]
    return colour + (np.float32(0.9) - colour) * (clouds[v, u] * cover * np.minimum(4 * up, 1))


def _shadowed(scene: Scene, points: Array, light: Light, towards: Array, distance: Array) -> NDArray[np.bool_]:
    """Whether something stands between each point and the light; a room, the ground and flat fittings cast none."""
    dark = np.zeros(points.shape[1], dtype=bool)
    for thing in scene.things:
        shape = thing.shape
        if not math.isfinite(shape.radius) or shape.radius > 60:
            continue
        offset = shape.center - points
        along = dot(offset, towards)
        near = dot(offset, offset) - along * along < np.float32(shape.radius**2)
        at = np.flatnonzero(near & ~dark & (along > -shape.radius) & (along < distance + shape.radius))
        if len(at):
            ray = towards if towards.shape[1] == 1 else towards[:, at]
            dark[at] |= shape.intersect(points[:, at], ray) < distance[at]
    return dark


def _shade(scene: Scene, points: Array, normals: Array, albedo: Array, gloss: Array, rays: Array) -> Array:
    """Lambert with a little gloss, hard shadows, an ambient term that corners darken; linear colour (3, N)."""
    start = points + normals * np.float32(4e-3)
    ambient = scene.ambient * (np.float32(0.75) - np.float32(0.25) * normals[1])
    if scene.room is not None:
        gap = scene.room.half - np.abs(scene.room.axes.T @ (points - scene.room.center))
        ambient = ambient * _corners(gap)
    else:
        ambient = ambient * (1 - np.float32(0.3) * np.exp(points[1] / np.float32(0.3)) * (np.abs(normals[1]) < 0.9))
    total = albedo * ambient
    view_direction = -rays / np.sqrt(dot(rays, rays))
    for light in scene.lights:
        if light.position is not None:
            towards = light.position - start
            distance = np.sqrt(dot(towards, towards))
            towards = towards / distance
            strength = np.float32(4) / (1 + distance * distance)
        else:
            assert light.direction is not None
            towards, strength = light.direction, np.float32(1)
            distance = np.full(points.shape[1], np.inf, dtype=np.float32)
        cosine = np.maximum(dot(normals, towards), 0)
        cosine[_shadowed(scene, start, light, towards, distance) & (cosine > 0)] = 0
        half = towards + view_direction
        half = half / np.sqrt(dot(half, half))
        shine = gloss * np.maximum(dot(normals, half), 0) ** 40 * (cosine > 0)
        total += light.colour * (strength * (albedo * cosine + shine))
    return total


def _corners(gap: Array) -> Array:
    """How much of the ambient light reaches a point on a room's inside; gap: (3, N) metres to the nearest faces."""
    near = 1 - np.float32(0.35) * np.exp(-gap / np.float32(0.35))
    return near[0] * near[1] * near[2] / np.float32(0.65)  # one of the gaps is zero: the point's own face


def _develop(colour: Array, rng: Rng) -> NDArray[np.uint8]:
    """Lens blur, exposure, white balance, shot and read noise, gamma: linear (3, H, W) -> uint8 (H, W, 3)."""
    level = float(np.percentile(colour.mean(0), 70)) + 1e-4
    exposure = np.float32(math.exp(rng.normal(math.log(0.45), 0.4)) / level)
    exposed = colour * exposure * vector(*np.exp(rng.normal(0, 0.05, 3)))[..., None]
    blur = np.float32(rng.uniform(0.0, 0.25))
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (1, 1)
        wide = np.pad(exposed, pad, mode="edge")
        before, after = (np.take(wide, range(start, start + exposed.shape[axis]), axis) for start in (0, 2))
        exposed = exposed * (1 - 2 * blur) + (before + after) * blur
    sigma = np.float32(rng.exponential(0.008))
    shot = sigma * np.sqrt(np.maximum(exposed, 0)) + sigma * np.float32(0.2)
    noisy = exposed + shot * rng.standard_normal(exposed.shape, dtype=np.float32)
    picture = np.clip(noisy, 0, 1) ** np.float32(1 / rng.uniform(1.9, 2.5))
    return np.ascontiguousarray((picture * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
