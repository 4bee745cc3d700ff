"""Solids that rays hit exactly. World frame: x right, y down, z forward, metres; the floor is y = 0.

Vectors are (3, N), contiguous by component. `intersect` gives the distance along each ray, in units of its direction's
length, or infinity; `surface` gives, at points on the solid, the outward unit normal and texture coordinates in metres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
NEAR = np.float32(1e-3)  # hits closer than this are the surface a ray starts on
_TINY = np.float32(1e-9)


def rotation(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """Rotation matrix, columns are the local axes in the world: roll about z, then pitch about x, then yaw about y."""
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a), math.sin(a)) for a in (yaw, pitch, roll))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (about_y @ about_x @ about_z).astype(np.float32)


def vector(*values: float) -> Array:
    """A (3, 1) vector."""
    return np.array(values, dtype=np.float32)[:, None]


def dot(a: Array, b: Array) -> Array:
    """Inner products of (3, N) vectors, (N,); much faster than a reduction over three rows."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


class Shape(Protocol):
    @property
    def center(self) -> Array: ...

    @property
    def radius(self) -> float:
        """Of a sphere that holds the solid; infinite for one without end."""
        ...

    def intersect(self, origin: Array, direction: Array) -> Array: ...

    def surface(self, points: Array) -> tuple[Array, Array]: ...

    def holds(self, point: Array, margin: float) -> bool:
        """Whether a point (3, 1) is inside the solid, or closer to it than `margin`."""
        ...


@dataclass(frozen=True)
class Ground:
    """The half space below y = 0."""

    center: Array = field(default_factory=lambda: vector(0, 0, 0))
    radius: float = math.inf

    def intersect(self, origin: Array, direction: Array) -> Array:
        down = direction[1]
        t = -origin[1] / np.where(np.abs(down) < _TINY, _TINY, down)
        return np.where((down > 0) & (t > NEAR), t, np.float32(np.inf))

    def surface(self, points: Array) -> tuple[Array, Array]:
        normals = np.zeros_like(points)
        normals[1] = -1
        return normals, points[[0, 2]]

    def holds(self, point: Array, margin: float) -> bool:
        return bool(point[1, 0] > -margin)


@dataclass(frozen=True)
class Sphere:
    center: Array
    radius: float

    def intersect(self, origin: Array, direction: Array) -> Array:
        offset = origin - self.center
        a = dot(direction, direction)
        b = dot(offset, direction)
        c = dot(offset, offset) - np.float32(self.radius**2)
        discriminant = b * b - a * c
        t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
        return np.where((discriminant > 0) & (t > NEAR), t, np.float32(np.inf))

    def surface(self, points: Array) -> tuple[Array, Array]:
        normals = (points - self.center) / np.float32(self.radius)
        angles = np.stack([np.arctan2(normals[0], normals[2]), np.arcsin(np.clip(normals[1], -1, 1))])
        return normals, np.float32(self.radius) * angles

    def holds(self, point: Array, margin: float) -> bool:
        return float(np.linalg.norm(point - self.center)) < self.radius + margin


@dataclass(frozen=True)
class Box:
    """A cuboid; `inside` makes it a room: rays hit its far faces and normals point inwards."""

    center: Array
    half: Array  # (3, 1)
    axes: Array = field(default_factory=rotation)
    inside: bool = False

    @property
    def radius(self) -> float:
        return math.inf if self.inside else float(np.linalg.norm(self.half))

    def intersect(self, origin: Array, direction: Array) -> Array:
        start = self.axes.T @ (origin - self.center)
        along = self.axes.T @ direction
        inverse = 1 / np.where(np.abs(along) < _TINY, _TINY, along)
        middle, reach = -start * inverse, self.half * np.abs(inverse)
        enter, leave = middle - reach, middle + reach
        first = np.maximum(np.maximum(enter[0], enter[1]), enter[2])
        last = np.minimum(np.minimum(leave[0], leave[1]), leave[2])
        if self.inside:
            return np.where((last > NEAR) & (first <= last), last, np.float32(np.inf))
        return np.where((first > NEAR) & (first <= last), first, np.float32(np.inf))

    def surface(self, points: Array) -> tuple[Array, Array]:
        local = self.axes.T @ (points - self.center)
        ratio = local / self.half
        axis = np.abs(ratio).argmax(0)
        sign = np.sign(np.take_along_axis(ratio, axis[None], 0)[0])
        normals = self.axes[:, axis] * (-sign if self.inside else sign)
        across, up = np.array([2, 0, 0])[axis], np.array([1, 2, 1])[axis]
        uv = np.stack([np.take_along_axis(local, pick[None], 0)[0] for pick in (across, up)])
        return normals, uv

    def holds(self, point: Array, margin: float) -> bool:
        local = self.axes.T @ (point - self.center)
        reach = self.half + np.float32(-margin if self.inside else margin)
        return bool((np.abs(local) < reach).all()) != self.inside


@dataclass(frozen=True)
class Cylinder:
    """An upright cylinder with flat ends."""

    center: Array
    width: float  # its radius
    half: float  # half its height

    @property
    def radius(self) -> float:
        return math.hypot(self.width, self.half)

    def intersect(self, origin: Array, direction: Array) -> Array:
        offset = origin - self.center
        a = np.maximum(direction[0] ** 2 + direction[2] ** 2, _TINY)
        b = offset[0] * direction[0] + offset[2] * direction[2]
        c = offset[0] ** 2 + offset[2] ** 2 - np.float32(self.width**2)
        discriminant = b * b - a * c
        root = np.sqrt(np.maximum(discriminant, 0))
        down = np.where(np.abs(direction[1]) < _TINY, _TINY, direction[1])
        middle, reach = -offset[1] / down, np.float32(self.half) / np.abs(down)
        first = np.maximum((-b - root) / a, middle - reach)
        last = np.minimum((-b + root) / a, middle + reach)
        return np.where((discriminant > 0) & (first > NEAR) & (first <= last), first, np.float32(np.inf))

    def surface(self, points: Array) -> tuple[Array, Array]:
        local = points - self.center
        across = np.sqrt(local[0] ** 2 + local[2] ** 2)
        cap = np.abs(local[1]) * self.width > across * self.half
        side = local / np.maximum(across, _TINY)
        side[1] = 0
        normals = np.where(cap, vector(0, 1, 0) * np.sign(local[1]), side)
        around = np.arctan2(local[0], local[2]) * np.float32(self.width)
        return normals, np.where(cap, local[[0, 2]], np.stack([around, local[1]]))

    def holds(self, point: Array, margin: float) -> bool:
        local = point - self.center
        away = math.hypot(local[0, 0], local[2, 0]) < self.width + margin
        return away and bool(abs(local[1, 0]) < self.half + margin)
