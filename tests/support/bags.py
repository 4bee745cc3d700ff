"""Bags of made-up cameras, written by rosbags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer

from tests.support.ros import STORE, camera_info, cloud, image, imu, transform

WIDTH, HEIGHT = 96, 64


def pictures(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for n in range(count)]


def write_bag(path: Path, messages: list[tuple[str, float, Any]], plugin: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """(topic, seconds, message) each; a folder as `ros2 bag record` makes it."""
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        connections: dict[str, Any] = {}
        for topic, seconds, message in messages:
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], round(seconds * 1e9), bytes(STORE.serialize_cdr(message, kind)))
    return path


def camera_messages(
    topic: str = "/camera/image_raw", count: int = 4, info: bool = True
) -> list[tuple[str, float, Any]]:
    """Images at 1, 2, ... seconds; the first image comes before the first camera_info."""
    messages = []
    for number, picture in enumerate(pictures(count)):
        at = 1.0 + number
        messages.append((topic, at, image(picture, "rgb8", at=at)))
        if info:
            messages.append((f"{topic.rpartition('/')[0]}/camera_info", at + 0.01, camera_info(WIDTH, HEIGHT, at=at)))
    return messages


def room(path: Path, count: int = 2) -> Path:
    """A camera 1.2 m over a floor, with a lidar and an IMU in its place, whose axes are the camera's (/tf_static)."""
    from densegeo.training.render import view

    scene = view(0, "test", 0, 256, 192)
    size, focal = scene.depth.shape[::-1], 128 / np.tan(np.radians(75) / 2)
    v, u = np.mgrid[8 : size[1] : 16, 8 : size[0] : 16]
    depth = scene.depth[v, u].ravel()
    rays = np.stack([(u.ravel() - 127.5) / focal, (v.ravel() - 95.5) / focal, np.ones(u.size)], axis=1)
    points = (rays * depth[:, None])[np.isfinite(depth)].astype(np.float32)
    same = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    messages = [("/tf_static", 0.1, transform(same, "camera_optical", frame)) for frame in ("lidar", "imu")]
    for number in range(count):
        at = 1.0 + number
        messages += [
            ("/imu/data_raw", at - 0.02, imu([0.0, -9.81, 0.0], turning=[0.0, 0.0, 0.0], at=at - 0.02)),
            ("/lidar/points", at - 0.01, cloud(points, at=at - 0.01)),
            ("/camera/image_raw", at, image(scene.rgb, "rgb8", at=at)),
            ("/camera/camera_info", at, camera_info(*size, focal=float(focal), at=at)),
        ]
    return write_bag(path, messages)
