"""Surfaces' colours: procedural patterns and crops of freely licensed photographs, sampled with mipmaps."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densegeo.errors import ResourceError

Array = NDArray[np.float32]
SIZE = 128  # texels a side; one tile
# Carried by scikit-image: CC0 (brick, grass, gravel, coffee, chelsea) or in the public domain (astronaut, rocket).
PHOTOGRAPHS = ("brick.png", "grass.png", "gravel.png", "coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg")


@functools.cache
def photographs() -> tuple[Array, ...]:
    """The photographs in linear light, (H, W, 3) in [0, 1]. Raises ResourceError when scikit-image lacks them."""
    spec = find_spec("skimage")
    folder = Path(next(iter(spec.submodule_search_locations or []))) / "data" if spec is not None else None
    if folder is None or not (folder / PHOTOGRAPHS[0]).is_file():
        raise ResourceError("The textures' photographs come with scikit-image: pip install scikit-image")
    pictures = (Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS)
    return tuple((np.asarray(picture, dtype=np.float32) / 255) ** np.float32(2.2) for picture in pictures)


def noise(rng: np.random.Generator, coarsest: int = 4, octaves: int = 5, stretch: int = 1) -> Array:
    """Tileable value noise (SIZE, SIZE) in [0, 1]; `stretch` > 1 makes it longer along the rows (wood, brushed)."""
    total = np.zeros((SIZE, SIZE), dtype=np.float32)
    for octave in range(octaves):
        cells = coarsest << octave
        if cells > SIZE:
            break
        lattice = rng.random((cells, max(1, cells // stretch)), dtype=np.float32)
        total += _resize_wrapped(lattice) * np.float32(0.55**octave)
    low, high = total.min(), total.max()
    return (total - low) / max(float(high - low), 1e-6)


def _resize_wrapped(lattice: Array) -> Array:
    """Bilinear interpolation of a periodic lattice to (SIZE, SIZE)."""
    for axis in (0, 1):
        cells = lattice.shape[axis]
        position = np.arange(SIZE, dtype=np.float32) * np.float32(cells / SIZE)
        index = position.astype(np.int64)
        weight = (position - index)[:, None] if axis == 0 else position - index
        lattice = np.take(lattice, index, axis) * (1 - weight) + np.take(lattice, (index + 1) % cells, axis) * weight
    return lattice


def stripes(rng: np.random.Generator) -> Array:
    count, duty = int(rng.integers(1, 9)), rng.uniform(0.2, 0.8)
    phase = (np.arange(SIZE) * count / SIZE) % 1
    return np.broadcast_to((phase < duty).astype(np.float32), (SIZE, SIZE)).copy()


def checker(rng: np.random.Generator) -> Array:
    cells = 2 * int(rng.integers(1, 5))
    parity = np.arange(SIZE) * cells // SIZE
    return ((parity[:, None] + parity) % 2).astype(np.float32)


def tiles(rng: np.random.Generator) -> Array:
    """Bricks, tiles or planks: rows shifted against one another, joints between, each with its own shade."""
    rows = int(rng.integers(2, 9))
    columns = max(1, rows // int(rng.integers(1, 4)))
    joint = rng.uniform(0.02, 0.12)
    y = np.arange(SIZE) * rows / SIZE
    shift = rng.choice([0.0, 0.5]) * (y.astype(int) % 2)
    x = np.arange(SIZE) * columns / SIZE + shift[:, None]
    shade = rng.uniform(0.5, 1.0, (rows, columns)).astype(np.float32)
    picture = shade[y.astype(int)[:, None], x.astype(int) % columns]
    inside = ((y % 1) > joint)[:, None] & ((x % 1) > joint * columns / rows)
    return np.where(inside, picture, np.float32(rng.uniform(0, 0.6)))


def windows(rng: np.random.Generator) -> Array:
    """A facade: dark or bright panes in a regular grid."""
    rows, columns = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    y, x = np.arange(SIZE) * rows / SIZE, np.arange(SIZE) * columns / SIZE
    low, high = rng.uniform(0.15, 0.35), rng.uniform(0.6, 0.85)
    pane = ((y % 1 > low) & (y % 1 < high))[:, None] & ((x % 1 > low) & (x % 1 < high))
    shade = rng.uniform(0.6, 1.0, (rows, columns)).astype(np.float32)
    return np.where(pane, shade[y.astype(int)[:, None], x.astype(int)], np.float32(0))


def _colour(rng: np.random.Generator) -> Array:
    """A colour in linear light, (3,): mostly muted, now and then bright."""
    grey = rng.uniform(0.04, 0.85)
    tint = rng.normal(0, rng.choice([0.03, 0.12, 0.35]), 3)
    return np.clip(grey * np.exp(tint), 0.01, 0.95).astype(np.float32)


@dataclass(frozen=True)
class Material:
    """A mipmapped tile of `metres` a side, turned by `angle` on the surface."""

    mips: tuple[Array, ...]  # (size, size, 3), finest first
    metres: float
    angle: float
    gloss: float

    def albedo(self, uv: Array, pixel: Array) -> Array:
        """Texture coordinates (2, N) in metres and a pixel's width there (N,) in metres -> linear colour (3, N)."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turned = np.stack([cos * uv[0] - sin * uv[1], sin * uv[0] + cos * uv[1]]) * np.float32(1 / self.metres)
        level = np.log2(np.maximum(pixel * np.float32(SIZE / self.metres), 1)).round().astype(np.int64)
        level = np.minimum(level, len(self.mips) - 1)
        out = np.empty((uv.shape[1], 3), dtype=np.float32)
        for index in np.unique(level):
            at = np.flatnonzero(level == index)
            out[at] = _sample(self.mips[index], turned[:, at])
        return out.T


def _sample(tile: Array, uv: Array) -> Array:
    """Bilinear lookup in a periodic tile; uv (2, N) in tiles -> (N, 3)."""
    size = tile.shape[0]
    position = uv * size - np.float32(0.5)
    floor = np.floor(position)
    x, y = (position - floor)[:, :, None]
    (x0, y0), (x1, y1) = floor.astype(np.int64) % size, (floor.astype(np.int64) + 1) % size
    top = tile[y0, x0] * (1 - x) + tile[y0, x1] * x
    return top * (1 - y) + (tile[y1, x0] * (1 - x) + tile[y1, x1] * x) * y


def material(rng: np.random.Generator, kinds: Mapping[str, float] | None = None) -> Material:
    """A random surface. `kinds` weighs plain, noise, wood, stripes, checker, tiles, windows and photo."""
    kinds = kinds or ANYTHING
    kind = str(rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
    metres = float(np.exp(rng.uniform(math.log(0.3), math.log(3.0))))
    if kind == "photo":
        picture = photographs()[int(rng.integers(len(photographs())))]
        side = int(rng.integers(SIZE, min(picture.shape[:2]) + 1))
        row, column = (int(rng.integers(0, extent - side + 1)) for extent in picture.shape[:2])
        crop = Image.fromarray((picture[row : row + side, column : column + side] * 255).astype(np.uint8))
        tile = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
        tile = np.concatenate([tile, tile[::-1]])[:: rng.choice([1, -1])]  # mirrored, so that it tiles
        tile = np.concatenate([tile, tile[:, ::-1]], axis=1)[::2, ::2] * np.exp(rng.normal(0, 0.15, 3))
    else:
        first, second = _colour(rng), _colour(rng)
        if kind == "plain":
            second, pattern = first * rng.uniform(0.75, 1.0), noise(rng, int(rng.choice([2, 8, 32])))
        else:
            pattern = _PATTERNS[kind](rng)
            if rng.random() < 0.5:  # wear
                pattern = pattern * (1 - rng.uniform(0, 0.5) * noise(rng))
        tile = first + (second - first) * pattern[..., None]
    if kind == "windows":
        metres = float(rng.uniform(2.5, 8.0))
    mips = [np.ascontiguousarray(np.clip(tile, 0.01, 1), dtype=np.float32)]
    while mips[-1].shape[0] > 1:
        fine = mips[-1][::2] + mips[-1][1::2]
        mips.append((fine[:, ::2] + fine[:, 1::2]) * np.float32(0.25))
    upright = kind in ("windows", "tiles")
    angle = float(rng.integers(4)) * math.pi / 2 if not upright else 0.0
    gloss = float(rng.choice([0.0, 0.0, 0.05, 0.3]))
    return Material(tuple(mips), metres, angle, gloss)


_PATTERNS = {
    "noise": lambda rng: noise(rng, int(rng.choice([2, 4, 8, 16]))),
    "wood": lambda rng: noise(rng, 8, 4, stretch=8),
    "stripes": stripes,
    "checker": checker,
    "tiles": tiles,
    "windows": windows,
}
ANYTHING = {"plain": 5, "noise": 2, "wood": 1, "stripes": 1, "checker": 0.7, "tiles": 1, "photo": 2.0}
WALL = {"plain": 7, "noise": 1, "tiles": 1.5, "stripes": 0.4, "photo": 0.6}
FLOOR = {"plain": 3, "noise": 2, "wood": 2, "tiles": 3, "checker": 0.7, "photo": 1.5}
FACADE = {"windows": 5, "tiles": 2, "plain": 2, "photo": 0.5}
EARTH = {"noise": 4, "photo": 3, "plain": 3, "tiles": 1}
