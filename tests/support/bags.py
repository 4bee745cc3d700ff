"""Bags of made-up cameras, written by rosbags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer

from tests.support.ros import STORE, camera_info, image

WIDTH, HEIGHT = 96, 64


def pictures(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for n in range(count)]


def write_bag(path: Path, messages: list[tuple[str, float, Any]], plugin: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """(topic, seconds, message) each; a folder as `ros2 bag record` makes it."""
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        made: dict[str, Any] = {}
        for topic, seconds, message in messages:
            kind = message.__msgtype__
            if topic not in made:
                made[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(made[topic], round(seconds * 1e9), bytes(STORE.serialize_cdr(message, kind)))
    return path


def camera_messages(
    topic: str = "/camera/image_raw", count: int = 4, info: bool = True
) -> list[tuple[str, float, Any]]:
    """Images at 1, 2, ... seconds; the first image comes before the first camera_info."""
    found = []
    for number, picture in enumerate(pictures(count)):
        at = 1.0 + number
        found.append((topic, at, image(picture, "rgb8", at=at)))
        if info:
            found.append((f"{topic.rpartition('/')[0]}/camera_info", at + 0.01, camera_info(WIDTH, HEIGHT, at=at)))
    return found
