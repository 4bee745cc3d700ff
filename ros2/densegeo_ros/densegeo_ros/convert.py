"""Fields of `densegeo.ros.outputs` -> rclpy's messages."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from copy import copy
from typing import Any

from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField
from std_msgs.msg import Header

from densegeo.ros.outputs import TOPICS

CLASSES: Mapping[str, type] = {
    topic: {cls.__name__: cls for cls in (CameraInfo, Image, PointCloud2)}[name.rpartition("/")[2]]
    for topic, name in TOPICS.items()
}


def message(topic: str, header: Header, fields: Mapping[str, Any]) -> Any:
    """The topic's message. Its bytes are copied once, into the array that rclpy sends without a copy."""
    data = array("B")
    data.frombytes(fields["data"])
    rest = {name: value for name, value in fields.items() if name not in ("data", "fields")}
    made = CLASSES[topic](header=header, data=data, **rest)
    if "fields" in fields:
        made.fields = [PointField(**field) for field in fields["fields"]]
    return made


def camera_info(header: Header, info: CameraInfo) -> CameraInfo:
    """The image's own camera, with the image's stamp and frame."""
    made = copy(info)
    made.header = header
    return made


def nanoseconds(header: Header) -> int:
    """A header's stamp."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)
