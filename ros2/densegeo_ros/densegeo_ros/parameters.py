"""The node's parameters: one row each, with what `ros2 param describe` shows of it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.lifecycle import LifecycleNode
from rclpy.parameter import Parameter

from densegeo.backends import NAMES
from densegeo.errors import ConfigError
from densegeo.ros.outputs import DEPTH_ENCODINGS
from densegeo.ros.ranges import Transform

SENSORS = ("", "PointCloud2", "LaserScan", "Range")


@dataclass(frozen=True)
class Row:
    """between: smallest and largest number. choices: of a text. live: may be changed while the node runs; others are
    read when it is configured.
    """

    name: str
    default: Any
    description: str
    between: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    live: bool = False

    def descriptor(self) -> ParameterDescriptor:
        descriptor = ParameterDescriptor(name=self.name, description=self.description)
        descriptor.additional_constraints = f"one of {', '.join(map(repr, self.choices))}" if self.choices else ""
        if self.between is not None:
            low, high = self.between
            if isinstance(self.default, int):
                descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
            else:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(low), to_value=float(high), step=0.0)
                ]
        return descriptor


ROWS = (
    Row("bundle", "fe2e-tiny", "The bundle's directory, or the name of one that comes with densegeo."),
    Row("backend", "auto", "What runs the bundle.", choices=("auto", *NAMES)),
    Row("device", "auto", "auto, cpu, cuda or cuda:N."),
    Row("fit", "stretch", "How an image fills the network's size: stretched, or padded.", choices=("stretch", "pad")),
    Row("timeout_s", 30.0, "Seconds the backend may take for one image before it counts as hanging.", (0.1, 3600.0)),
    Row("image_transport", "raw", "Image, or CompressedImage on image/compressed.", choices=("raw", "compressed")),
    Row(
        "ycbcr",
        "",
        "How nv12, yuyv and uyvy become RGB: BT.601 in video range unless said otherwise.",
        choices=("", "bt709", "full", "bt709-full"),
    ),
    Row("rectified", False, "The image is rectified: its camera is camera_info's P, without distortion."),
    Row("depth_encoding", "32FC1", "Metres, or millimetres in 16 bits.", choices=DEPTH_ENCODINGS, live=True),
    Row("points_stride", 4, "Every n-th pixel along both sides becomes a point.", (1, 64), live=True),
    Row("max_rate", 0.0, "Images a second at most; 0: as many as the network takes.", (0.0, 1000.0), live=True),
    Row("lazy", True, "Run the network only while a result has a subscriber.", live=True),
    Row("near", 0.0, "Smallest depth of the scene in metres; with `far`, depth is metric. 0: unknown.", (0.0, 1e4)),
    Row("far", 0.0, "Largest depth of the scene in metres. 0: unknown.", (0.0, 1e4)),
    Row(
        "camera_height",
        0.0,
        "Metres of the camera over the floor; with camera_info, depth is metric where a floor is seen. 0: unknown.",
        (0.0, 1000.0),
    ),
    Row("imu", False, "Take from the Imu messages on the topic imu which way is up, for camera_height."),
    Row(
        "imu_transform",
        [0.0],
        "x y z qx qy qz qw of the IMU's frame in the camera's optical frame; one 0: looked up with tf2.",
    ),
    Row("anchors", "", "The type of measured ranges on the topic anchors; empty: there are none.", choices=SENSORS),
    Row(
        "anchors_transform",
        [0.0],
        "x y z qx qy qz qw of the range sensor's frame in the camera's optical frame; one 0: looked up with tf2.",
    ),
    Row("anchors_max_age", 0.2, "Seconds that ranges may lie before or behind an image.", (0.0, 10.0)),
    Row("diagnostics_period", 1.0, "Seconds between two diagnostics.", (0.05, 60.0)),
)


def declare(node: LifecycleNode) -> None:
    """Declare all rows, and refuse what they do not allow."""
    for row in ROWS:
        node.declare_parameter(row.name, row.default, row.descriptor())


def read(node: LifecycleNode) -> SimpleNamespace:
    """All values by name. Raises ConfigError for those that do not go together."""
    values = SimpleNamespace(**{row.name: node.get_parameter(row.name).value for row in ROWS})
    for row in ROWS:
        if reason := against(row, getattr(values, row.name)):
            raise ConfigError(reason)
    if (values.near > 0) != (values.far > 0) or values.near > values.far:
        raise ConfigError(f"near and far belong together, with near < far; they are {values.near} and {values.far}.")
    if values.imu and not values.camera_height:
        raise ConfigError("imu says which way is up, which camera_height alone needs: set camera_height too.")
    for name in ("anchors_transform", "imu_transform"):
        setattr(values, name, transform_of(getattr(values, name)))
    return values


def against(row: Row, value: Any) -> str | None:
    """Why the row does not allow this value, or None. (Ranges are rclpy's to check.)"""
    if row.choices and value not in row.choices:
        return f"{row.name} must be one of {', '.join(map(repr, row.choices))}, not {value!r}"
    if row.name.endswith("_transform"):
        try:
            transform_of(value)
        except ConfigError as error:
            return f"{row.name}: {error}"
    return None


def transform_of(numbers: Any) -> Transform | None:
    """None: it is to be looked up. Raises ConfigError."""
    return None if list(numbers) == [0.0] else Transform.of(list(numbers))


def check(parameters: list[Parameter], configured: bool) -> SetParametersResult:
    """What is set at run time: values that the rows allow, and while the node is configured the live ones."""
    rows = {row.name: row for row in ROWS}
    for parameter in parameters:
        row = rows.get(parameter.name)
        if row is None:
            continue
        if configured and not row.live:
            reason = f"{row.name} is read when the node is configured: clean it up first, or set it in a file"
            return SetParametersResult(successful=False, reason=reason)
        if reason := against(row, parameter.value):
            return SetParametersResult(successful=False, reason=reason)
    return SetParametersResult(successful=True)
