"""Ray casting against implicit descriptions of the solids, written separately."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from densegeo.training.shapes import Array, Box, Cylinder, Ground, Shape, Sphere, rotation, vector

AXES = rotation(0.4, -0.7, 1.1)
CENTER = vector(0.3, -0.6, 4.0)


def in_sphere(points: Array) -> Array:
    return np.linalg.norm(points - CENTER, axis=0) / 0.8


def in_box(points: Array) -> Array:
    return np.abs((AXES.T @ (points - CENTER)) / vector(0.5, 0.9, 0.2)).max(0)


def in_cylinder(points: Array) -> Array:
    x, y, z = points - CENTER
    return np.maximum(np.hypot(x, z) / 0.4, np.abs(y) / 0.7)


SOLIDS: dict[str, tuple[Shape, Callable[[Array], Array]]] = {  # the function is below 1 inside
    "sphere": (Sphere(CENTER, 0.8), in_sphere),
    "box": (Box(CENTER, vector(0.5, 0.9, 0.2), AXES), in_box),
    "cylinder": (Cylinder(CENTER, 0.4, 0.7), in_cylinder),
}


@pytest.fixture
def rays() -> Array:
    rng = np.random.default_rng(3)
    return np.stack([rng.uniform(-0.4, 0.5, 4000), rng.uniform(-0.5, 0.3, 4000), np.ones(4000)]).astype(np.float32)


@pytest.mark.parametrize("name", SOLIDS)
def test_rays_stop_at_the_first_point_of_a_solid(name: str, rays: Array) -> None:
    shape, implicit = SOLIDS[name]
    origin = vector(0, -0.5, 0)
    t = shape.intersect(origin, rays)
    hit = np.isfinite(t)
    assert 0.05 < hit.mean() < 0.95
    assert implicit(origin + rays[:, hit] * t[hit]) == pytest.approx(1, abs=1e-3)
    for share in np.linspace(0.05, 0.999, 40):
        assert (implicit(origin + rays[:, hit] * t[hit] * share) > 1 - 1e-3).all()
    for distance in np.linspace(0.1, 8, 200):  # rays that miss never come inside
        assert (implicit(origin + rays[:, ~hit] * distance) > 1 - 1e-3).all()


@pytest.mark.parametrize("name", SOLIDS)
def test_normals_point_out_of_a_solid(name: str, rays: Array) -> None:
    shape, implicit = SOLIDS[name]
    origin = vector(0, -0.5, 0)
    t = shape.intersect(origin, rays)
    points = (origin + rays * np.where(np.isfinite(t), t, 0))[:, np.isfinite(t)]
    normals, uv = shape.surface(points)
    assert np.linalg.norm(normals, axis=0) == pytest.approx(1, abs=1e-4)
    inner, outer = implicit(points - 0.01 * normals), implicit(points + 0.01 * normals)
    assert (outer > inner).mean() > 0.999  # at an edge either face's normal may win
    assert uv.shape == (2, points.shape[1])


def test_a_room_is_hit_from_inside(rays: Array) -> None:
    half = vector(2, 1.5, 3)
    room = Box(vector(0, -1, 1), half, inside=True)
    origin = vector(0, -1.2, 0)
    t = room.intersect(origin, rays)
    assert np.isfinite(t).all()
    points = origin + rays * t
    assert np.abs((points - room.center) / half).max(0) == pytest.approx(1, abs=1e-4)
    normals, _ = room.surface(points)
    assert ((room.center - points) * normals).sum(0).min() > 0
    assert not room.holds(origin, 0.1)
    assert room.holds(vector(1.95, -1, 0), 0.1)


def test_the_ground_is_seen_below_the_horizon_only() -> None:
    rays = np.array([[0, 0, 0], [-0.1, 0, 0.25], [1, 1, 1]], dtype=np.float32)
    t = Ground().intersect(vector(0, -2, 0), rays)
    assert np.isinf(t[:2]).all()
    assert t[2] == pytest.approx(8)
