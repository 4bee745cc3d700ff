"""A `Geometry` -> the fields of sensor_msgs/Image and PointCloud2, whoever then makes the messages of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from densegeo.errors import ConfigError
from densegeo.ros.images import Picture
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.images import load_image

Float = NDArray[np.float32]
Fields = dict[str, Any]  # a message's, without its header; data: flat uint8, a view where that is possible
DepthEncoding = Literal["32FC1", "16UC1"]
DEPTH_ENCODINGS: tuple[DepthEncoding, ...] = ("32FC1", "16UC1")
FLOAT32 = 7  # sensor_msgs/PointField
MOST_MILLIMETRES = 65535

# what is published -> its type; "camera_info" is the image's own
TOPICS: Mapping[str, str] = {
    "depth": "sensor_msgs/msg/Image",
    "depth_up_to_scale": "sensor_msgs/msg/Image",
    "relative_depth": "sensor_msgs/msg/Image",
    "normals": "sensor_msgs/msg/Image",
    "points": "sensor_msgs/msg/PointCloud2",
    "camera_info": "sensor_msgs/msg/CameraInfo",
}


@dataclass(frozen=True)
class Options:
    """depth_encoding: of metres, see `depth_image`. points_stride: every n-th pixel along both sides becomes a point.

    Raises ConfigError.
    """

    depth_encoding: DepthEncoding = "32FC1"
    points_stride: int = 4

    def __post_init__(self) -> None:
        if self.depth_encoding not in DEPTH_ENCODINGS:
            raise ConfigError(f"A depth image is one of {', '.join(DEPTH_ENCODINGS)}, not {self.depth_encoding!r}.")
        if self.points_stride < 1:
            raise ConfigError(f"Every n-th pixel becomes a point: n is at least 1, not {self.points_stride}.")


def possible(geometry: Geometry, camera: object | None) -> set[str]:
    """Which topics a result has something for: metres are "depth", anything else the prediction, "relative_depth", and
    true shape in an unknown unit "depth_up_to_scale" as well.
    """
    topics = {"normals"} if geometry.normals is not None else set()
    if geometry.depth_kind == "metric":
        topics |= {"depth", "points"} if camera is not None else {"depth"}
    elif geometry.depth_kind is not None:
        topics.add("relative_depth")
    if geometry.depth_kind == "up_to_scale":
        topics.add("depth_up_to_scale")
    return topics


def messages(
    geometry: Geometry, picture: Picture, camera: Any, topics: Collection[str], options: Options
) -> dict[str, Fields]:
    """Topic -> fields, of the topics that are wanted and `possible`. camera: a `Camera`, or None where unknown."""
    fields_of: dict[str, Fields] = {}
    able = possible(geometry, camera)
    for topic in (topic for topic in TOPICS if topic in able and topic in topics):
        if topic == "depth":
            fields_of[topic] = depth_image(geometry.depth, options.depth_encoding)
        elif topic == "depth_up_to_scale":
            fields_of[topic] = float_image(geometry.depth)
        elif topic == "relative_depth":
            fields_of[topic] = float_image(relative_depth(geometry))
        elif topic == "normals":
            assert geometry.normals is not None
            fields_of[topic] = float_image(geometry.normals)
        else:
            rgb = load_image(picture.image, picture.color).rgb
            fields_of[topic] = point_cloud(geometry.points(camera), rgb, geometry.normals, options.points_stride)
    return fields_of


def relative_depth(geometry: Geometry) -> Float:
    """(h, w) without a unit: the network's own prediction."""
    return geometry.require_prediction("relative depth")


def depth_image(depth: Float, encoding: DepthEncoding = "32FC1") -> Fields:
    """Metres (h, w), NaN where invalid -> a depth image of REP 118: 32FC1 metres with NaN, or 16UC1 millimetres with 0,
    also where 16 bits do not reach (65.535 m). Raises ConfigError for another encoding.
    """
    if encoding == "32FC1":
        return float_image(depth)
    if encoding != "16UC1":
        raise ConfigError(f"A depth image is one of {', '.join(DEPTH_ENCODINGS)}, not {encoding!r}.")
    with np.errstate(invalid="ignore"):
        millimetres = np.rint(depth * np.float32(1000))
        representable = (millimetres > 0) & (millimetres <= MOST_MILLIMETRES)
    return _image(np.where(representable, millimetres, 0).astype("<u2"), "16UC1")


def float_image(array: Float) -> Fields:
    """(h, w) -> 32FC1, (h, w, 3) -> 32FC3."""
    return _image(np.ascontiguousarray(array, "<f4"), "32FC1" if array.ndim == 2 else "32FC3")


def point_cloud(points: Float, rgb: NDArray[Any] | None, normals: Float | None, stride: int) -> Fields:
    """Points (h, w, 3) in metres, NaN where invalid, their picture and normals -> a PointCloud2 of one row without the
    invalid ones, every `stride`-th pixel along both sides.

    Fields, all float32: x, y, z; of a picture (h, w, 3), uint8 or float in [0, 1], rgb, whose bits are 0x00RRGGBB as
    RViz and PCL read them; of normals normal_x, normal_y, normal_z.
    """
    cut = np.s_[stride // 2 :: stride, stride // 2 :: stride]
    chosen = points[cut]
    valid = np.isfinite(chosen).all(axis=-1)
    names = ["x", "y", "z"]
    columns: list[NDArray[Any]] = [chosen[valid][:, axis] for axis in range(3)]
    if rgb is not None:
        levels = rgb[cut][valid]
        if levels.dtype != np.uint8:
            levels = np.rint(levels * 255).astype(np.uint8)
        red, green, blue = (levels[:, channel].astype(np.uint32) for channel in range(3))
        names.append("rgb")
        columns.append((red << 16 | green << 8 | blue).view(np.float32))
    if normals is not None:
        names += ["normal_x", "normal_y", "normal_z"]
        columns += [normals[cut][valid][:, axis] for axis in range(3)]
    packed = np.stack([column.astype("<f4", copy=False) for column in columns], axis=1)
    size = 4 * len(names)
    fields = [{"name": name, "offset": 4 * place, "datatype": FLOAT32, "count": 1} for place, name in enumerate(names)]
    return {
        "height": 1,
        "width": len(packed),
        "fields": fields,
        "is_bigendian": False,
        "point_step": size,
        "row_step": size * len(packed),
        "data": packed.reshape(-1).view(np.uint8),
        "is_dense": True,
    }


def _image(array: NDArray[Any], encoding: str) -> Fields:
    return {
        "height": array.shape[0],
        "width": array.shape[1],
        "encoding": encoding,
        "is_bigendian": 0,
        "step": array.strides[0],
        "data": array.reshape(-1).view(np.uint8),
    }
