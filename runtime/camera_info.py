"""ROS' CameraInfo in its three spellings: ROS 2's message (k, d, r, p), ROS 1's (K, D, R, P), camera_info's YAML.

Only attributes and keys are read, so that no ROS is needed. Fields: sensor_msgs/msg/CameraInfo.msg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from densegeo.argument_checks import number_of, shown
from densegeo.errors import ConfigError
from densegeo.extras import install_hint
from densegeo.runtime.lens import LENSES, Lens

_MATRICES = {"k": ("k", "K", "camera_matrix"), "p": ("p", "P", "projection_matrix")}
_DISTORTION = ("d", "D", "distortion_coefficients")
_MODELS: dict[str, Lens] = {
    "plumb_bob": "plumb_bob",
    "": "plumb_bob",
    "rational_polynomial": "rational_polynomial",
    "equidistant": "equidistant",
    "fisheye": "equidistant",  # Kalibr's and RealSense's word for it
}


@dataclass(frozen=True)
class Info:
    """What counts of a CameraInfo: 3x3 or 3x4 matrix at full resolution, lens, binning, offset, size as published."""

    matrix: NDArray[np.float64]
    lens: Lens
    distortion: tuple[float, ...]
    binning: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]  # (0, 0): unknown


def looks_like(value: object) -> bool:
    """Whether it has a CameraInfo's matrices."""
    return any(hasattr(value, name) for name in ("k", "K")) and any(hasattr(value, name) for name in ("p", "P"))


def load(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file's mapping. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The camera file {path} cannot be read: {error.strerror or error}.") from error
    try:
        decode = msgspec.json.decode if path.suffix.lower() == ".json" else msgspec.yaml.decode
        content: object = decode(data)
    except ImportError as error:
        raise ConfigError(f"Reading YAML needs PyYAML. Install it: {install_hint('camera')}.") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"The camera file {path} is neither YAML nor JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"The camera file {path} holds no camera_info: camera_matrix is missing.")
    return content


def read(info: object, rectified: bool) -> Info:
    """See `Camera.from_camera_info`."""
    matrix = _numbers(info, _MATRICES["p" if rectified else "k"], "P" if rectified else "K")
    if matrix.size not in (9, 12) or not np.isfinite(matrix).all():
        raise ConfigError("A CameraInfo's K has 9 finite numbers and its P 12.")
    if not matrix.any() or matrix[0] == 0:
        raise ConfigError("This CameraInfo is uncalibrated (K is zero). Calibrate the camera, or give a field of view.")
    name = str(_field(info, ("distortion_model",), ""))
    distortion = () if rectified else tuple(float(value) for value in _numbers(info, _DISTORTION, None))
    if name not in _MODELS:
        raise ConfigError(f"There is no distortion model {name!r}; known are {', '.join(LENSES)}.")
    lens = _MODELS[name]
    if not any(distortion) and lens != "equidistant":
        distortion = ()
    binning = tuple(max(_count(info, f"binning_{axis}"), 1) for axis in "xy")
    roi = _field(info, ("roi",), {})
    x, y, width, height = (_count(roi, key) for key in ("x_offset", "y_offset", "width", "height"))
    full = [_count(info, key, f"image_{key}") for key in ("width", "height")]
    region_size = (width or full[0], height or full[1])
    return Info(
        matrix=matrix,
        lens="plumb_bob" if rectified else lens,
        distortion=distortion,
        binning=(binning[0], binning[1]),
        offset=(x, y),
        size=(region_size[0] // binning[0], region_size[1] // binning[1]),
    )


def _field(value: object, names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        if isinstance(value, Mapping):
            if name in value:
                return value[name]
        elif hasattr(value, name):
            return getattr(value, name)
    return default


def _count(value: object, *names: str) -> int:
    """Pixels, or how many; 0 where it has none of these fields."""
    for name in names:
        raw = _field(value, (name,), None)
        if raw is None:
            continue
        number = number_of(raw)
        if number is None or not (number >= 0 and number.is_integer()):
            raise ConfigError(f"A CameraInfo's {name} must be a whole number, 0 or more, not {shown(raw)}.")
        return int(number)
    return 0


def _numbers(info: object, names: tuple[str, ...], required: str | None) -> NDArray[np.float64]:
    """A matrix's numbers in rows; YAML has them under `data`."""
    values = _field(info, names, None)
    if isinstance(values, Mapping):
        values = values.get("data")
    if values is None:
        if required is None:
            return np.empty(0)
        raise ConfigError(f"This camera has no {required} (camera_info's YAML: {names[-1]}).")
    try:
        return np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"A CameraInfo's {names[0]} must be numbers. {error}") from error
