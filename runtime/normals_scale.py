"""The scale of log depth from normals: `s` in ln d = s p + t, from how surfaces turn. docs/metres.md derives it.

For two neighbouring pixels of one surface the chord between their points is perpendicular to the normal n:
s * a + b = 0 with a = (n . r) dp, b = n . dr, for the pixels' mean ray r, its difference dr, and the predictions'
difference dp. Both are linear in n, so noise in normals gives no bias (a tangent of the angle, as a gradient of depth
has it, would), and sums of them along a row or column are linear too: smooth noise cancels over longer paths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import CalibrationError
from densegeo.runtime.camera import Camera
from densegeo.size import Size

Float = NDArray[np.float32]

_SIDE = 96  # pixels of the shorter side of the grid that it works on
_LAGS = (2, 4, 8, 16)  # grid pixels that a path spans
_SATURATED = 0.003  # predictions this close to 0 or 1 may be clamped ones
_GRAZING = 0.08  # smallest -n . r: flatter surfaces amplify the normals' noise without bound
_RATIO = 0.1  # noise of p over noise of the normals' direction (radians), see docs/metres.md
_NEAR, _CLIPPED = 12, 0.4  # grid pixels, share: where so much is saturated, the rest of it is so but for its noise
_CORRELATED = 8.0  # grid pixels over which noise is smooth
_GRID = np.exp(np.linspace(np.log(0.1), np.log(16.0), 18)).astype(np.float32)
_TRIED = 1600  # paths by which the start is chosen
_CUT = 3.0  # Tukey's biweight ends here, in robust standard deviations
_FLAT = 5e-3  # radians; slopes below it are none
_EXACT = 2.5e-4  # radians; residuals of exact input
_STEPS, _LAST_STEPS = 8, 4
_COARSE = 4  # the first steps take one path of so many
# How much of the residuals' share of the slopes is left in ln s. Independent errors average out, a network's go
# together over whole surfaces and do not: which it is, the correlation of residuals 12 grid pixels apart tells, below
# 0.4 or above 0.6. What is left was fitted to held-out views with noise (seeds 7, 8, 9; 0.2), whatever its amount, and
# to fe2e-tiny's own predictions (seed 7; 0.7).
_APART, _TOGETHER_LAG = 12, 4
_INDEPENDENT, _TOGETHER = 0.4, 0.6
_LEFT = (0.10, 0.46)
_UNKNOWN_CORRELATION = 0.7  # where too few residuals lie so far apart
MIN_PATHS = 300
MAX_ERROR = 0.8  # of ln s, one standard deviation
MAX_SHARE = 1.5  # of the residuals over the slopes: with walls that face the camera it is above, whatever the noise


@dataclass(frozen=True)
class Scale:
    """value, sigma: of s and its standard deviation. paths: how many were used. noise: their residual, radians."""

    value: float
    sigma: float
    paths: int
    noise: float


def scale_from_normals(prediction: Float, normals: Float, valid: NDArray[np.bool_], camera: Camera) -> Scale:
    """prediction (H, W) log-affine; normals (H, W, 3) in the OpenCV frame; valid (H, W); camera of this image.

    Raises CalibrationError, with the reason, where normals do not tell.
    """
    grid = _Grid.of(prediction, normals, valid, camera)
    parts = [*_along_rows(grid), *_along_rows(grid.transposed())]
    paths = _Paths.joined([part for _, part, _ in parts])
    if paths.a.size < MIN_PATHS:
        raise CalibrationError(
            "Normals do not tell the scale: too little of the image is a surface that is neither saturated, invalid "
            "nor seen edge-on. Give anchors, or near and far."
        )
    s, *_ = _converged(paths.every(_COARSE), _start(paths), _STEPS)
    s, weight, noise2 = _converged(paths, s, _LAST_STEPS)
    variance, total = paths.variance(s), max(float(weight.sum()), 1e-9)
    signal = float((weight * paths.b**2 / variance).sum() / total)
    share = float(np.sqrt(noise2 / max(signal, 1e-12)))
    # noise of normals makes slopes of its own, which tell nothing
    of_noise = noise2 * float((weight * paths.t0 / variance).sum() / total)
    left = np.exp(np.interp(_correlation(parts, s, noise2), (_INDEPENDENT, _TOGETHER), np.log(_LEFT)))
    sigma = s * float(left * np.sqrt(noise2 / max(signal - of_noise, 0.02 * signal, 1e-12)))
    if not (sigma < MAX_ERROR * s and share < MAX_SHARE):
        raise CalibrationError(
            "Normals do not tell the scale: all surfaces face the camera alike, so that their slopes drown in the "
            f"noise ({np.degrees(np.sqrt(signal)):.1f} against {np.degrees(np.sqrt(noise2)):.1f} degrees). "
            "Give two anchors or more, or near and far."
        )
    if not _GRID[0] < s < _GRID[-1]:
        raise CalibrationError(
            f"Normals do not tell the scale: s = {s:.3g} fits best, which no scene has. Are these this image's "
            "intrinsics? Give two anchors or more, or near and far."
        )
    return Scale(s, sigma, int((weight > 0).sum()), float(np.sqrt(noise2)))


@dataclass(frozen=True)
class _Grid:
    """Means over square blocks: p (h, w), n and rays (h, w, 3), usable (h, w)."""

    p: Float
    n: Float
    rays: Float
    usable: NDArray[np.bool_]

    @classmethod
    def of(cls, prediction: Float, normals: Float, valid: NDArray[np.bool_], camera: Camera) -> _Grid:
        block = max(1, round(min(prediction.shape) / _SIDE))
        inside = np.abs(prediction - np.float32(0.5)) < 0.5 - _SATURATED
        p, n, whole = _blocks(prediction, block), _blocks(normals, block), _every(valid & inside, block)
        whole &= _around(~_every(inside | ~valid, block), _NEAR) < _CLIPPED
        height, width = p.shape
        coarse = replace(
            camera,
            fx=camera.fx / block,
            fy=camera.fy / block,
            cx=(camera.cx + 0.5) / block - 0.5,
            cy=(camera.cy + 0.5) / block - 0.5,
            size=Size(width, height),
        )
        rays = coarse.rays(Size(width, height))
        n /= np.maximum(np.sqrt((n * n).sum(axis=-1, keepdims=True)), np.float32(1e-9))
        whole &= np.isfinite(p) & np.isfinite(n[..., 0]) & np.isfinite(rays[..., 0])
        if not whole.all():  # a NaN would run on through the sums
            p, n = np.where(whole, p, np.float32(0.5)), np.where(whole[..., None], n, np.float32(0))
            rays = np.where(np.isfinite(rays), rays, np.float32(0))
        return cls(p, n, rays, whole)

    def transposed(self) -> _Grid:
        return _Grid(self.p.T, self.n.swapaxes(0, 1), self.rays.swapaxes(0, 1), self.usable.T)


def _blocks(plane: Float, block: int) -> Float:
    """Means over block x block pixels; what is left over at the right and below is not used."""
    height, width = plane.shape[0] // block * block, plane.shape[1] // block * block
    rows = plane[0:height:block, :width].astype(np.float32)
    for offset in range(1, block):
        rows += plane[offset:height:block, :width]
    sums = rows[:, 0::block].copy()
    for offset in range(1, block):
        sums += rows[:, offset::block]
    return np.asarray(sums / np.float32(block * block))


def _around(plane: NDArray[np.bool_], reach: int) -> Float:
    """(h, w) -> the share of True in the square of pixels that are at most `reach` rows and columns away."""
    sums = np.cumsum(np.cumsum(np.pad(plane.astype(np.float32), ((1, 0), (1, 0))), axis=0), axis=1)
    (top, below), (left, right) = (
        (np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(i))) for i in map(np.arange, plane.shape)
    )
    count = (below - top)[:, None] * (right - left)
    totals = sums[below][:, right] - sums[top][:, right] - sums[below][:, left] + sums[top][:, left]
    return np.asarray(totals / count, dtype=np.float32)


def _every(plane: NDArray[np.bool_], block: int) -> NDArray[np.bool_]:
    """Whether all of a block is True."""
    height, width = plane.shape[0] // block * block, plane.shape[1] // block * block
    rows = plane[0:height:block, :width].copy()
    for offset in range(1, block):
        rows &= plane[offset:height:block, :width]
    all_true = rows[:, 0::block].copy()
    for offset in range(1, block):
        all_true &= rows[:, offset::block]
    return np.asarray(all_true)


@dataclass(frozen=True)
class _Paths:
    """s a + b = 0 for each path (N,), float32, with variance t0 + s t1 + s^2 t2. count: the paths it stands for."""

    a: Float
    b: Float
    t0: Float
    t1: Float
    t2: Float
    count: Float

    @classmethod
    def joined(cls, parts: list[_Paths]) -> _Paths:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def every(self, step: int) -> _Paths:
        return _Paths(*(getattr(self, name)[::step] for name in self.__dataclass_fields__))

    @property
    def telling(self) -> NDArray[np.bool_]:
        """The steeper half: a wall that faces the camera fits any scale, and must not say how large residuals are."""
        slope = self.b * self.b / self.t0
        some = slope[slope > _FLAT**2]  # an exact wall, however large, is no half
        return np.asarray(slope >= np.median(some if some.size else slope))

    def variance(self, s: float) -> Float:
        """Of s a + b, for a standard deviation of one radian in the normals' direction."""
        return np.asarray(self.t0 + np.float32(s) * (self.t1 + np.float32(s) * self.t2))

    def slope(self, s: float) -> Float:
        """Of `variance` in s."""
        return np.asarray(self.t1 + np.float32(2 * s) * self.t2)


_Part: TypeAlias = tuple[int, _Paths, NDArray[np.bool_]]  # lag, paths, where on the raster of their starts they are


def _along_rows(grid: _Grid) -> list[_Part]:
    n, ray = 0.5 * (grid.n[:, 1:] + grid.n[:, :-1]), 0.5 * (grid.rays[:, 1:] + grid.rays[:, :-1])
    step = grid.rays[:, 1:] - grid.rays[:, :-1]
    turn, dp = np.einsum("ijk,ijk->ij", n, ray), grid.p[:, 1:] - grid.p[:, :-1]
    continuous = grid.usable[:, 1:] & grid.usable[:, :-1] & (turn < -_GRAZING)
    values = [turn * dp, np.einsum("ijk,ijk->ij", n, step), turn, dp, np.einsum("ijk,ijk->ij", ray, ray)]
    values += [
        np.einsum("ijk,ijk->ij", ray, step),
        np.einsum("ijk,ijk->ij", step, step),
        (~continuous).astype(np.float32),
    ]
    # float64: the sums' differences are small beside the sums
    sums = np.zeros((len(values), dp.shape[0], dp.shape[1] + 1))
    np.cumsum(np.stack(values), axis=2, dtype=np.float64, out=sums[:, :, 1:])
    return [_of_lag(sums, lag) for lag in _LAGS if lag < dp.shape[1]]


def _across(lag: int) -> int:
    """Grid pixels between neighbouring paths, across them."""
    return max(2, lag // 4)


def _of_lag(sums: NDArray[np.float64], lag: int) -> _Part:
    along, across = max(1, lag // 3), _across(lag)
    part = sums[:, ::across]
    ends = (part[:, :, lag:] - part[:, :, :-lag])[:, :, ::along]
    unbroken = ends[7] < 0.5
    a, b, turn, dp, ray2, cross, step2 = (plane[unbroken].astype(np.float32) for plane in ends[:7])
    turn, ray2 = turn / lag, ray2 / lag
    # how much of the noise of normals, and of that of predictions, is left over a path
    direct, smooth = min(1.0, _CORRELATED / lag), min(1.0, (lag / _CORRELATED) ** 2)
    t2 = direct * dp * dp * ray2 + 2 * _RATIO**2 * smooth * turn * turn
    count = np.full(a.shape, along * across, dtype=np.float32)
    return lag, _Paths(a, b, direct * lag * step2 + 1e-9, 2 * direct * dp * cross, t2, count), unbroken


def _correlation(parts: list[_Part], s: float, noise2: float) -> float:
    """Of residuals `_APART` grid pixels apart across the paths, those beyond three standard deviations clipped."""
    products = squares = 0.0
    limit = 3 * float(np.sqrt(noise2))
    for _, paths, unbroken in (part for part in parts if part[0] == _TOGETHER_LAG):
        raster = np.zeros(unbroken.shape, dtype=np.float32)
        raster[unbroken] = np.clip((s * paths.a + paths.b) / np.sqrt(paths.variance(s)), -limit, limit)
        apart = _APART // _across(_TOGETHER_LAG)
        first, second = raster[:-apart] * unbroken[apart:], raster[apart:] * unbroken[:-apart]
        products += float((first * second).sum())
        squares += 0.5 * float((first * first).sum() + (second * second).sum())
    return products / squares if squares > 0 else _UNKNOWN_CORRELATION


def _converged(paths: _Paths, s: float, steps: int) -> tuple[float, Float, float]:
    """Newton's steps on Tukey's biweight, whose width follows the median residual: s, weights, squared noise."""
    telling = paths.telling
    for _ in range(steps):
        z2 = (s * paths.a + paths.b) ** 2 / paths.variance(s)
        noise2 = max(1.4826**2 * float(np.median(z2[telling])), _EXACT**2)
        weight = paths.count * np.maximum(1 - z2 / np.float32(noise2 * _CUT**2), 0) ** 2
        move = _step(paths, s, weight)
        s += move
        if abs(move) < 3e-4 * s:
            break
    return s, weight, noise2


def _start(paths: _Paths) -> float:
    """The scale of the least median residual, among some."""
    some = paths.every(max(1, paths.a.size // _TRIED))
    telling = some.telling
    some = _Paths(*(getattr(some, name)[telling] for name in some.__dataclass_fields__))
    scores = [float(np.median((s * some.a + some.b) ** 2 / some.variance(float(s)))) for s in _GRID]
    return float(_GRID[int(np.argmin(scores))])


def _step(paths: _Paths, s: float, weight: Float) -> float:
    """Newton's step towards the zero of the derivative of the sum of weighted squares, (s a + b)^2 / variance(s).

    The variance is that at s too: so noise in a, which would pull s towards zero, does not (errors in variables).
    """

    def force(at: float) -> float:
        variance = paths.variance(at)
        part = (at * paths.a + paths.b) / variance
        return float((weight * part * (paths.a - 0.5 * part * paths.slope(at))).sum())

    here, delta = force(s), 1e-2 * s
    slope = (force(s + delta) - here) / delta
    if slope <= 0:  # beyond the valley: the curvature without the variance's change
        slope = float((weight * paths.a**2 / paths.variance(s)).sum())
    return float(np.clip(-here / max(slope, 1e-12), -0.4 * s, 0.6 * s))
