"""From a network's own depth space to metres: two numbers per image, given or fitted to measured anchors.

Every kind is a straight line in some space of depth: log_affine ln(depth) = scale * p + shift, affine
depth = scale * p + shift, disparity_affine 1/depth = scale * p + shift. `SPACES` holds that space's functions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import number_of, shown
from densegeo.errors import CalibrationError, CalibrationWarning, ConfigError
from densegeo.outputs import DepthKind
from densegeo.runtime.evidence import Evidence


@dataclass(frozen=True)
class Space:
    """The space in which a depth kind is a straight line, with the depth units of its two parameters."""

    to: Callable[[Any], Any]  # metres -> the space
    back: Callable[[Any], Any]  # the space -> metres
    slope: Callable[[Any], Any]  # metres -> how much the space's value changes for a relative change of depth by one
    text: str


SPACES: dict[DepthKind, Space] = {
    "log_affine": Space(np.log, np.exp, np.ones_like, "ln(depth) = scale * prediction + shift"),
    "affine": Space(lambda x: x, lambda x: x, lambda x: x, "depth = scale * prediction + shift"),
    "disparity_affine": Space(np.reciprocal, np.reciprocal, np.reciprocal, "1/depth = scale * prediction + shift"),
}


_FAR = 300.0  # metres; what is measured is farther than this when it is in millimetres
DRIFT = 0.02  # what a frame may change of the scale, and of depth, relative: a moving camera, another normalisation


@dataclass(frozen=True)
class Calibration:
    """How a result became metric, or one whose unit is unknown.

    Attributes:
        kind: The depth kind before.
        scale: With `shift`, the line in that kind's space (metres).
        shift: See `scale`.
        residual: RMS over all anchors in that space, NaN when none were given.
        inliers: Anchors whose depth is met within a factor of 1.25.
        count: Anchors that were given.
        sources: What the line rests on.
        variance: Of the scale, of the shift, and their covariance; NaN where the numbers were given.
        metric: Whether depth is in metres; otherwise its unit is unknown, and the shift makes the median depth 1.

    Example:
        >>> found = Calibration("log_affine", scale=2.0, shift=0.5, variance=(0.04, 0.01, 0.0))
        >>> found.covariance.tolist(), found.metric
        ([[0.04, 0.0], [0.0, 0.01]], True)
    """

    kind: DepthKind
    scale: float
    shift: float
    residual: float = float("nan")
    inliers: int = 0
    count: int = 0
    sources: tuple[str, ...] = ()
    variance: tuple[float, float, float] = (float("nan"),) * 3
    metric: bool = True

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(2, 2) of scale and shift."""
        scale, shift, mixed = self.variance
        return np.array([[scale, mixed], [mixed, shift]])

    def prior_for(self, prediction: NDArray[Any]) -> Evidence:
        """The line as evidence for the next frame's, widened by `DRIFT`.

        Args:
            prediction: (N,) that frame's valid predictions.

        Returns:
            The evidence; of the scale alone where this calibration's unit is unknown.

        Raises:
            CalibrationError: The line's uncertainty is unknown, or there is no prediction.
            ConfigError: For no numbers.
        """
        if not np.isfinite(self.variance).all():
            origin = f" ({', '.join(self.sources)})" if self.sources else ""
            raise CalibrationError(
                f"The prior has no uncertainty, for its numbers were given{origin}: it cannot be weighed, whatever "
                "comes with it. Leave it out, or take the calibration of a result from anchors, a height or a size."
            )
        values = _numbers(prediction)
        if not values.size:
            raise CalibrationError("The prediction has no valid pixels, so that a prior says nothing of it.")
        middle = float(np.median(values))
        if not self.metric:
            sigma = math.hypot(math.sqrt(self.variance[0]), DRIFT * self.scale)
            return Evidence.of(1.0, 0.0, self.scale, sigma, "the prior's scale")
        with np.errstate(all="ignore"):
            unit = float(np.abs(SPACES[self.kind].slope(SPACES[self.kind].back(self.scale * middle + self.shift))))
        drift = drift_noise(middle, DRIFT * self.scale, DRIFT * (unit if np.isfinite(unit) else 1.0))
        return Evidence.of_line(self.scale, self.shift, self.covariance + drift, "the prior")

    def uncertainty(self, prediction: NDArray[Any]) -> NDArray[Any]:
        """How uncertain the line makes depth. The network's own error at a place comes on top.

        Args:
            prediction: Of any shape, such as a result's (H, W).

        Returns:
            Relative standard deviation of depth at each prediction, of the same shape; NaN where it is unknown.

        Raises:
            ConfigError: For no numbers.
        """
        scale, shift, mixed = self.variance
        prediction = _numbers(prediction)
        value = self.scale * prediction + self.shift
        spread = np.sqrt(np.maximum(scale * prediction**2 + 2 * mixed * prediction + shift, 0))
        with np.errstate(all="ignore"):
            return np.asarray(spread / np.abs(SPACES[self.kind].slope(SPACES[self.kind].back(value))))


def _numbers(prediction: object) -> NDArray[Any]:
    try:
        values = np.asarray(prediction)
    except ValueError:  # rows of several lengths
        values = np.empty(0, dtype=object)
    if values.dtype.kind not in "uif":
        raise ConfigError(f"A prediction is an array of numbers, not {shown(prediction)}.")
    return values


def require_calibration(name: str, value: object, kind: DepthKind) -> None:
    """Raises CalibrationError for anything but the calibration of depth of this kind."""
    if not isinstance(value, Calibration):
        raise CalibrationError(f"{name} must be the `calibration` of a result, not {shown(value)}.")
    if value.kind != kind:
        raise CalibrationError(f"The {name} is of {shown(value.kind)} depth, this result is {kind}.")


def drift_noise(middle: float, scale: float, value: float) -> NDArray[np.float64]:
    """(2, 2) covariance of (scale, shift) for independent errors of the scale, and of the line at the prediction
    `middle`, of these standard deviations.
    """
    turn, lift = scale**2, value**2
    return np.array([[turn, -turn * middle], [-turn * middle, turn * middle**2 + lift]])


def metric_depth(prediction: NDArray[np.float32], calibration: Calibration) -> NDArray[np.float32]:
    """(H, W) prediction -> (H, W) float32 metres; NaN where the line gives no positive, finite depth."""
    with np.errstate(all="ignore"):
        line = np.float32(calibration.scale) * prediction + np.float32(calibration.shift)
        depth = np.asarray(SPACES[calibration.kind].back(line), dtype=np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def valid_in(calibration: Calibration, prediction: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(H, W) which valid pixels have a depth by this line. A CalibrationWarning says how many have none.

    Raises CalibrationError when no pixel is left.
    """
    remaining = valid & np.isfinite(metric_depth(prediction, calibration))
    if newly_invalid := int(valid.sum()) - int(remaining.sum()):
        line = f"{SPACES[calibration.kind].text}, with scale {calibration.scale:.4g}, shift {calibration.shift:.4g}"
        no_depth = f"no depth, or one that is not positive or beyond float32, by {line}."
        if not remaining.any():
            raise CalibrationError(f"Every pixel has {no_depth} Check the numbers' units and signs.")
        share = f"{newly_invalid} of {int(valid.sum())} pixels have"
        warnings.warn(f"{share} {no_depth} They are invalid now.", CalibrationWarning, stacklevel=4)
    return remaining


def from_parameters(kind: DepthKind, scale: float, shift: float) -> Calibration:
    """Given numbers. Raises CalibrationError unless both are finite and scale is positive."""
    scale, shift = number("scale", scale), number("shift", shift)
    if not (np.isfinite(scale) and np.isfinite(shift)):
        raise CalibrationError(f"scale and shift must be finite, not {scale} and {shift}.")
    if scale <= 0:
        raise CalibrationError(f"scale must be positive in {SPACES[kind].text}, not {scale:g}.")
    return Calibration(kind, scale, shift, sources=("scale and shift",))


def number(name: str, value: object) -> float:
    """A float whose magnitude float32 holds, or an infinity or NaN. Raises CalibrationError for anything else."""
    converted = number_of(value)
    if converted is None:
        raise CalibrationError(f"{name} must be a number, not {shown(value)}.")
    if math.isfinite(converted) and abs(converted) > float(np.finfo(np.float32).max):
        raise CalibrationError(f"{name} must be within float32's range, not {value!r}.")
    return converted


def doubt_metres(name: str, metres: float, stacklevel: int) -> None:
    """A CalibrationWarning for what is so large that it is rather millimetres."""
    if metres > _FAR:
        warnings.warn(
            f"{name}: {metres:.4g} m, which looks like millimetres. Divide by 1000.",
            CalibrationWarning,
            stacklevel=stacklevel + 1,
        )


def from_range(kind: DepthKind, values: NDArray[Any], near: float, far: float) -> Calibration:
    """The line that puts the nearest and the farthest of the valid predictions (N,) at near and far metres.

    The extremes rather than percentiles: so every depth lies in [near, far], and none becomes invalid.
    Raises CalibrationError unless 0 < near < far and the prediction is not flat.
    """
    near, far = number("near", near), number("far", far)
    if not (np.isfinite(near) and np.isfinite(far) and np.finfo(np.float32).tiny <= near < far):
        raise CalibrationError(f"near and far must be finite metres with 0 < near < far, not {near} and {far}.")
    doubt_metres("near and far", near, stacklevel=3)
    percentiles(values)
    low, high = float(values.min()), float(values.max())
    ends = sorted((float(SPACES[kind].to(float(near))), float(SPACES[kind].to(float(far)))))
    scale = (ends[1] - ends[0]) / (high - low)
    return Calibration(kind, scale, ends[0] - scale * low, sources=("near and far",))


def percentiles(values: NDArray[Any]) -> tuple[float, float]:
    """The 2nd and 98th of a prediction's valid values (N,). Raises CalibrationError for none and for one alone."""
    if values.size == 0:
        raise CalibrationError("The prediction has no valid pixels, so it cannot be calibrated.")
    low, high = (float(p) for p in np.percentile(values.astype(np.float64), (2, 98)))
    if high - low <= 1e-6 * max(1.0, abs(high)):
        raise CalibrationError("The prediction is flat (one depth everywhere), so no scale can be determined.")
    return low, high
