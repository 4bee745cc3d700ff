"""Messages as rosbags makes them: another library's types, and its encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from rosbags.typesys import Stores, get_typestore

STORE = get_typestore(Stores.ROS2_JAZZY)
T = STORE.types


def header(seconds: float = 1.5, frame: str = "camera_optical") -> Any:
    stamp = round(seconds * 1e9)
    time = T["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
    return T["std_msgs/msg/Header"](stamp=time, frame_id=frame)


def image(array: np.ndarray, encoding: str, *, padding: int = 0, big: bool = False, at: float = 1.5) -> Any:
    """Rows of the array, each followed by so many bytes of 0xAA."""
    stored = array.astype(array.dtype.newbyteorder(">" if big else "<"))
    rows = stored.reshape(len(stored), -1).view(np.uint8)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xAA)
    height = len(array) * 2 // 3 if encoding == "nv12" else len(array)
    return T["sensor_msgs/msg/Image"](
        header=header(at),
        height=height,
        width=array.shape[1],
        encoding=encoding,
        is_bigendian=int(big),
        step=padded.shape[1],
        data=padded.reshape(-1),
    )


def camera_info(width: int, height: int, *, focal: float = 100.0, at: float = 1.5) -> Any:
    matrix = np.array([focal, 0, (width - 1) / 2, 0, focal, (height - 1) / 2, 0, 0, 1], np.float64)
    roi = T["sensor_msgs/msg/RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    return T["sensor_msgs/msg/CameraInfo"](
        header=header(at),
        height=height,
        width=width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=matrix,
        r=np.eye(3).ravel(),
        p=np.insert(matrix, [3, 6, 9], 0.0),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )


def cloud(points: np.ndarray, *, at: float = 1.5, frame: str = "lidar", big: bool = False) -> Any:
    """x, y, z after a field of another kind, as drivers order them."""
    order = ">" if big else "<"
    kind = np.dtype([("intensity", f"{order}u2"), ("x", f"{order}f4"), ("y", f"{order}f4"), ("z", f"{order}f4")])
    packed = np.zeros(len(points), kind)
    for column, axis in enumerate("xyz"):
        packed[axis] = points[:, column]
    field = T["sensor_msgs/msg/PointField"]
    codes = {"intensity": 4, "x": 7, "y": 7, "z": 7}
    return T["sensor_msgs/msg/PointCloud2"](
        header=header(at, frame),
        height=1,
        width=len(points),
        fields=[field(name=name, offset=kind.fields[name][1], datatype=codes[name], count=1) for name in codes],  # type: ignore[index]
        is_bigendian=big,
        point_step=kind.itemsize,
        row_step=0,
        data=packed.view(np.uint8),
        is_dense=True,
    )


def transform(numbers: list[float], parent: str, child: str) -> Any:
    """A TFMessage of one static transform."""
    x, y, z, qx, qy, qz, qw = numbers
    message = T["geometry_msgs/msg/Transform"](
        translation=T["geometry_msgs/msg/Vector3"](x=x, y=y, z=z),
        rotation=T["geometry_msgs/msg/Quaternion"](x=qx, y=qy, z=qz, w=qw),
    )
    stamped = T["geometry_msgs/msg/TransformStamped"](header=header(0, parent), child_frame_id=child, transform=message)
    return T["tf2_msgs/msg/TFMessage"](transforms=[stamped])


def imu(acceleration: list[float], *, turning: list[float] | None = None, at: float = 1.5, frame: str = "imu") -> Any:
    """Acceleration in m/s^2, turning in rad/s; None: it has no gyroscope."""
    vector = T["geometry_msgs/msg/Vector3"]
    absent, measured = np.array([-1.0, *[0.0] * 8]), np.zeros(9)
    return T["sensor_msgs/msg/Imu"](
        header=header(at, frame),
        orientation=T["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=0.0, w=1.0),
        orientation_covariance=absent,
        angular_velocity=vector(*(turning or [0.0] * 3)),
        angular_velocity_covariance=measured if turning else absent,
        linear_acceleration=vector(*acceleration),
        linear_acceleration_covariance=measured,
    )


def reading(metres: float, *, at: float = 1.5, frame: str = "range") -> Any:
    """A range finder's."""
    return T["sensor_msgs/msg/Range"](
        header=header(at, frame),
        radiation_type=1,
        field_of_view=0.05,
        min_range=0.1,
        max_range=30.0,
        range=metres,
        variance=0.0,
    )
