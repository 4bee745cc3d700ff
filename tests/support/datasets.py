"""Evaluation sets of one image in their public layouts, with a few known pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Layout = Callable[[Path], list[str]]


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:height, :width]
    Image.fromarray(np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)).save(path)


def depth_png(path: Path, stored: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stored.astype(np.uint16)).save(path)


def nyuv2(root: Path) -> list[str]:
    stored = np.zeros((480, 640))
    stored[44:46, 40:42] = 2500  # around the first corner of the window
    stored[470:472, 600:602] = 9999
    stored[100, 100:102] = 10000, 65535  # not below 10 m
    stored[200, 200] = 1  # not above 1 mm
    picture(root / "test/kitchen_0004/rgb_0001.png", 640, 480)
    depth_png(root / "test/kitchen_0004/depth_0001.png", stored)
    return ["test/kitchen_0004/rgb_0001.png test/kitchen_0004/depth_0001.png test/kitchen_0004/filled_0001.png"]


def kitti(root: Path) -> list[str]:
    stored = np.zeros((375, 1242))
    stored[:, :] = 256 * 20
    stored[200, 600] = 256 * 80  # not below 80 m
    rgb = "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000069.png"
    truth = "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png"
    picture(root / rgb, 1242, 375)
    depth_png(root / truth, stored)
    return [f"{rgb} {truth} 721.5377", f"{rgb} None 721.5377"]


def eth3d(root: Path) -> list[str]:
    rgb, truth = "rgb/office/images/dslr_images/DSC_0219.JPG", "depth/office_dslr_depth/DSC_0219.JPG"
    picture(root / rgb, 4, 3)
    (root / truth).parent.mkdir(parents=True)
    depth = np.arange(12, dtype="<f4")
    depth[5] = np.inf
    (root / truth).write_bytes(depth.tobytes())
    return [f"{rgb} {truth}"]


def scannet(root: Path) -> list[str]:
    picture(root / "scene0406_02/color/000300.jpg", 8, 6)
    depth_png(root / "scene0406_02/depth/000300.png", np.array([[0, 1, 2], [1500, 9999, 10000]]))
    return ["scene0406_02/color/000300.jpg scene0406_02/depth/000300.png"]


def diode(root: Path) -> list[str]:
    stem = "indoors/scene_00021/scan_00189/00021_00189_indoors_200_010"
    picture(root / f"{stem}.png", 3, 2)
    np.save(root / f"{stem}_depth.npy", np.array([[1, 0.5, 400], [2, 0, 3]], dtype=np.float32)[..., None])
    np.save(root / f"{stem}_depth_mask.npy", np.array([[1, 1, 1], [0, 1, 1]], dtype=np.float32))
    return [f"{stem}.png {stem}_depth.npy {stem}_depth_mask.npy"]


# Left, up and towards the camera in DSINE's axes; nothing.
COLOURS = np.array([[[255, 128, 128], [128, 255, 128], [128, 128, 255], [0, 0, 0]]], dtype=np.uint8)
OPENCV = np.array([[[-1, 0, 0], [0, -1, 0], [0, 0, -1]]], dtype=np.float32)


def dsine(root: Path) -> list[str]:
    picture(root / "test/000000_img.png", 4, 1)
    Image.fromarray(COLOURS).save(root / "test/000000_normal.png")
    return ["test/000000_img.png"]


def marigold_normals(root: Path) -> list[str]:
    """Right, up, towards the viewer."""
    picture(root / "scene0001_01/001170_img.png", 4, 1)
    array = np.array([[[-1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]], dtype=np.float32)
    np.save(root / "scene0001_01/001170_normal.npy", array)
    return ["scene0001_01/001170_img.png scene0001_01/001170_normal.npy"]


LAYOUTS: dict[str, Layout] = {
    "nyuv2": nyuv2,
    "kitti": kitti,
    "eth3d": eth3d,
    "scannet": scannet,
    "diode": diode,
    "nyuv2-normals": dsine,
    "scannet-normals": marigold_normals,
}


def write(name: str, root: Path) -> Path:
    """The dataset in `root`; returns its list, which lies outside."""
    lines = LAYOUTS[name](root)
    file_list = root.parent / f"{name}.txt"
    file_list.write_text("\n".join(lines))  # the published lists end without a newline too
    return file_list


def slow_angle(a: list[float], b: list[float]) -> float:
    """Degrees between two vectors, by atan2 of the cross and the dot product."""
    cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    return math.degrees(math.atan2(math.hypot(*cross), sum(x * y for x, y in zip(a, b, strict=True))))
