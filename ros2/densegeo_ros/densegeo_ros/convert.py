"""Fields of `densegeo.ros.outputs` -> messages for rclpy: images and clouds as the bytes that go over the wire.

rclpy would copy a message's data four times on the way to the middleware (into an array, into C, while encoding, into
the middleware's own memory), which for 640x480 takes as long as some networks' stages. Bytes it hands on as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from copy import copy
from typing import Any

from sensor_msgs.msg import CameraInfo, Image, PointCloud2

from densegeo.ros.outputs import TOPICS

CLASSES: Mapping[str, type] = {
    topic: {cls.__name__: cls for cls in (CameraInfo, Image, PointCloud2)}[name.rpartition("/")[2]]
    for topic, name in TOPICS.items()
}
_LITTLE_ENDIAN = b"\x00\x01\x00\x00"  # of plain CDR, DDSI-RTPS 2.5, section 10.5


class _Cdr:
    """Plain CDR, little-endian: numbers lie at multiples of their size (OMG DDS-XTypes 1.3, section 7.4.3)."""

    def __init__(self, begun: bytes = b"") -> None:
        self.body = bytearray(begun)

    def numbers(self, *values: int) -> _Cdr:
        """uint32 each."""
        self.body += bytes(-len(self.body) % 4)
        self.body += struct.pack(f"<{len(values)}I", *values)
        return self

    def byte(self, value: int) -> _Cdr:
        self.body.append(value)
        return self

    def text(self, value: str) -> _Cdr:
        encoded = value.encode() + b"\0"
        self.numbers(len(encoded)).body.extend(encoded)
        return self


def header(source: Any) -> bytes:
    """A std_msgs/Header's bytes."""
    stamp = source.stamp
    encoder = _Cdr(struct.pack("<iI", stamp.sec, stamp.nanosec)).text(source.frame_id)
    return bytes(encoder.body)


def message(topic: str, head: bytes, fields: Mapping[str, Any]) -> bytes:
    """The topic's message. Its data are copied once. head: see `header`."""
    encoder = _Cdr(head).numbers(fields["height"], fields["width"])
    if CLASSES[topic] is Image:
        encoder.text(fields["encoding"]).byte(fields["is_bigendian"]).numbers(fields["step"])
    else:
        encoder.numbers(len(fields["fields"]))
        for field in fields["fields"]:
            encoder.text(field["name"]).numbers(field["offset"]).byte(field["datatype"]).numbers(field["count"])
        encoder.byte(fields["is_bigendian"]).numbers(fields["point_step"], fields["row_step"])
    encoder.numbers(fields["data"].nbytes)
    end = bytes([fields["is_dense"]]) if "is_dense" in fields else b""
    return b"".join((_LITTLE_ENDIAN, encoder.body, fields["data"], end))


def camera_info(header: Any, info: CameraInfo) -> CameraInfo:
    """The image's own camera, with the image's stamp and frame."""
    camera = copy(info)
    camera.header = header
    return camera


def nanoseconds(header: Any) -> int:
    """A header's stamp."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)
