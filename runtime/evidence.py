"""What is known of the line `value = scale * prediction + shift`, as a Gaussian in information form, and its fusion.

Normals say something of the scale, an anchor of one point of the line, a known height of many, the last frame of both
numbers. In information form these simply add: J = sum x x' / sigma^2, h = sum x y / sigma^2 over the rows x = (a, b)
that say a * scale + b * shift = y, give or take sigma.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
_SINGULAR = 1e-12  # smallest share of the larger eigenvalue that still counts as knowledge


@dataclass(frozen=True, eq=False)
class Evidence:
    """information: (2, 2), the inverse covariance of (scale, shift), singular where one is unknown. vector: (2,),
    information @ (scale, shift). sources: what it rests on, in words.
    """

    information: Float64
    vector: Float64
    sources: tuple[str, ...] = ()

    @classmethod
    def nothing(cls) -> Evidence:
        """Knows nothing."""
        return cls(np.zeros((2, 2)), np.zeros(2))

    @classmethod
    def of(cls, a: ArrayLike, b: ArrayLike, y: ArrayLike, sigma: ArrayLike, source: str = "") -> Evidence:
        """From rows a * scale + b * shift = y with standard deviations sigma, each (N,) or a number."""
        arrays = np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in (a, b, y, sigma)))
        first, second, values, errors = (array.ravel() for array in arrays)
        rows = np.stack([first / errors, second / errors], axis=-1)
        information: Float64 = (rows.T @ rows).astype(np.float64)
        vector: Float64 = (rows.T @ (values / errors)).astype(np.float64)
        return cls(information, vector, (source,) if source else ())

    @classmethod
    def of_line(cls, scale: float, shift: float, covariance: Float64, source: str = "") -> Evidence:
        """From a line and the (2, 2) covariance of its numbers."""
        information: Float64 = np.linalg.inv(covariance).astype(np.float64)
        return cls(information, information @ (scale, shift), (source,) if source else ())

    def __add__(self, other: Evidence) -> Evidence:
        """Both, if their errors are independent."""
        sources = dict.fromkeys(self.sources + other.sources)
        return Evidence(self.information + other.information, self.vector + other.vector, tuple(sources))

    @property
    def rank(self) -> int:
        """How many of the two numbers, or of their mixtures, are known."""
        # prediction and its space are of order one, so that the two numbers' units compare
        low, high = np.linalg.eigvalsh(self.information)
        return 0 if high <= 0 else 1 if low <= _SINGULAR * high else 2

    @property
    def line(self) -> tuple[float, float]:
        """(scale, shift); of those that fit equally well the smallest."""
        solution = np.linalg.lstsq(self.information, self.vector, rcond=None)[0] if self.rank < 2 else self._solve()
        return float(solution[0]), float(solution[1])

    @property
    def covariance(self) -> Float64:
        """(2, 2) of (scale, shift); needs rank 2."""
        return np.asarray(np.linalg.inv(self.information))

    def after_step(self, alpha: float, beta: float, noise: Float64) -> Evidence:
        """Of the line in a prediction p' with p = alpha * p' + beta: (alpha * scale, shift + beta * scale).

        noise: (2, 2) covariance that the step adds. Needs rank 2: this is a Kalman filter's prediction.
        """
        step = np.array([[alpha, 0.0], [beta, 1.0]])
        scale, shift = step @ self.line
        return Evidence.of_line(scale, shift, step @ self.covariance @ step.T + noise, *self.sources[:1])

    def surprise(self, other: Evidence) -> float:
        """Squared Mahalanobis distance of what both say, over its degrees of freedom; above about 9 they disagree."""
        both = self + other
        if not both.rank or not self.rank or not other.rank:
            return 0.0

        def cost(evidence: Evidence, at: Float64) -> float:
            gap = at - np.array(evidence.line)
            return float(gap @ evidence.information @ gap)

        at = np.array(both.line)
        return (cost(self, at) + cost(other, at)) / max(1, self.rank + other.rank - both.rank)

    def _solve(self) -> Float64:
        return np.asarray(np.linalg.solve(self.information, self.vector))


def fuse(evidence: Iterable[Evidence]) -> Evidence:
    """All of them."""
    return sum(evidence, Evidence.nothing())
