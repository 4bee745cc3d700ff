"""Evaluation sets written in their public layouts, with a few pixels: read whole, and refused when broken."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densegeo.benchmarks.layouts import DATASETS, Sample, kitti_crop, kitti_window, nyu_window, open_split
from densegeo.errors import DatasetError

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


def read(name: str, tmp_path: Path) -> Sample:
    root = tmp_path / "data"
    split = open_split(DATASETS[name], root, write(name, root))
    assert split.count == 1
    assert split.note == f"1 images; the published split has {DATASETS[name].count}"
    (sample,) = split.samples()
    assert len(list(split.samples())) == 1  # again from the start
    return sample


def depth_of(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    assert sample.depth is not None
    assert sample.depth_valid is not None
    assert sample.depth.dtype == np.float32
    return sample.depth, sample.depth_valid


def test_every_dataset_has_a_test() -> None:
    assert set(LAYOUTS) == set(DATASETS)


def test_nyuv2(tmp_path: Path) -> None:
    depth, valid = depth_of(read("nyuv2", tmp_path))
    assert {tuple(place) for place in np.argwhere(valid).tolist()} == {(45, 41), (470, 600)}
    assert depth[45, 41] == np.float32(2.5)
    assert nyu_window(480, 640) == (slice(45, 471), slice(41, 601))


def test_kitti(tmp_path: Path) -> None:
    sample = read("kitti", tmp_path)
    depth, valid = depth_of(sample)
    assert sample.rgb.shape == (352, 1216, 3)
    assert sample.rgb[0, 0].tolist() == [23, 13, 36]  # row 375 - 352, column (1242 - 1216) / 2
    assert depth.shape == (352, 1216)
    rows, columns = np.flatnonzero(valid.any(axis=1)), np.flatnonzero(valid.any(axis=0))
    # 0.3324324 * 352 = 117.02, 0.91351351 * 352 = 321.6; 0.0359477 * 1216 = 43.7, 0.96405229 * 1216 = 1172.3
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (117, 320, 43, 1171)
    assert not valid[200 - 23, 600 - 13]
    assert valid.sum() == 204 * 1129 - 1
    assert depth[150, 100] == 20


def test_kitti_windows_at_their_edges() -> None:
    assert kitti_crop(352, 1216) == (slice(0, 352), slice(0, 1216))
    assert kitti_crop(353, 1219) == (slice(1, 353), slice(1, 1217))
    assert kitti_window(352, 1216) == (slice(117, 321), slice(43, 1172))
    with pytest.raises(ValueError, match="at least 1216x352"):
        kitti_crop(351, 1216)


def test_eth3d(tmp_path: Path) -> None:
    depth, valid = depth_of(read("eth3d", tmp_path))
    assert depth.shape == (3, 4)
    assert depth[2, 3] == 11
    assert np.flatnonzero(~valid).tolist() == [0, 5]  # zero and infinite


def test_scannet(tmp_path: Path) -> None:
    sample = read("scannet", tmp_path)
    depth, valid = depth_of(sample)
    assert sample.rgb.shape == (6, 8, 3)  # the truth may be smaller
    np.testing.assert_allclose(depth, [[0, 0.001, 0.002], [1.5, 9.999, 10]])
    assert valid.tolist() == [[False, False, True], [True, True, False]]


def test_diode(tmp_path: Path) -> None:
    depth, valid = depth_of(read("diode", tmp_path))
    assert depth.shape == (2, 3)
    # The mask decides, not the range; a depth of zero has no logarithm and stays out.
    assert valid.tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize(("name", "exact"), [("nyuv2-normals", 0.008), ("scannet-normals", 0)])
def test_normals(name: str, exact: float, tmp_path: Path) -> None:
    sample = read(name, tmp_path)
    assert sample.depth is None
    assert sample.normals is not None
    assert sample.normals_valid is not None
    assert sample.normals_valid.tolist() == [[True, True, True, False]]
    np.testing.assert_allclose(sample.normals[:, :3], OPENCV, atol=exact)


@pytest.mark.parametrize("name", ["nyuv2", "scannet", "diode"])
def test_a_tar_is_read_like_the_folder(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    file_list = write(name, root)
    archive = DATASETS[name].archive
    assert archive is not None
    base = tmp_path / "base"
    base.mkdir()
    with tarfile.open(base / archive, "w") as tar:
        tar.add(root, arcname=".")  # names start with "./", as in Marigold's
    for data in (base / archive, base):
        (found,) = open_split(DATASETS[name], data, file_list).samples()
        (wanted,) = open_split(DATASETS[name], root, file_list).samples()
        np.testing.assert_array_equal(found.rgb, wanted.rgb)
        np.testing.assert_array_equal(found.depth, wanted.depth)
        np.testing.assert_array_equal(found.depth_valid, wanted.depth_valid)


def test_the_published_list_lies_with_the_data(tmp_path: Path) -> None:
    root = tmp_path / "data"
    file_list = write("scannet", root)
    dataset = DATASETS["scannet"]
    expected = root / "scannet_val_sampled_list_800_1.txt"
    with pytest.raises(DatasetError) as caught:
        open_split(dataset, root)
    assert str(expected) in str(caught.value)
    assert "prs-eth/Marigold" in str(caught.value)
    file_list.rename(expected)
    with pytest.raises(DatasetError, match="has 1 images, and 800 were expected"):
        open_split(dataset, root)
    split = open_split(replace(dataset, count=1), root)
    assert (split.count, split.note) == (1, "")


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    root = tmp_path / "data"
    file_list = write("scannet", root)
    file_list.write_text(file_list.read_text() + "\nmissing.jpg missing.png\n")
    split = open_split(DATASETS["scannet"], root, file_list, limit=1)
    assert [sample.name for sample in split.samples()] == ["scene0406_02/color/000300.jpg"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_files_are_counted_and_the_first_is_named(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    file_list = write(name, root)
    picture_file, *_ = file_list.read_text().split()
    (root / picture_file).unlink()
    with pytest.raises(DatasetError) as caught:
        open_split(DATASETS[name], root, file_list)
    files = 3 if name == "diode" else 2
    assert f"1 of the {files} {name} files" in str(caught.value)
    assert str(root / picture_file) in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_damaged_truth_is_named(name: str, damage: bytes | None, tmp_path: Path) -> None:
    root = tmp_path / "data"
    file_list = write(name, root)
    words = file_list.read_text().split()
    truth = words[1] if len(words) > 1 else words[0].replace("_img", "_normal")
    content = (root / truth).read_bytes()
    (root / truth).write_bytes(content[: len(content) // 2] if damage is None else damage)
    split = open_split(DATASETS[name], root, file_list)
    with pytest.raises(DatasetError, match="cannot be used") as caught:
        list(split.samples())
    assert truth in str(caught.value)


def test_a_picture_that_is_too_small_for_the_crop(tmp_path: Path) -> None:
    root = tmp_path / "data"
    file_list = write("kitti", root)
    picture(root / file_list.read_text().split()[0], 640, 480)
    with pytest.raises(DatasetError, match="at least 1216x352"):
        list(open_split(DATASETS["kitti"], root, file_list).samples())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nyuv2", "only_one.png", "names too few files"),
        ("diode", "a.png b.npy", "names too few files"),
        ("nyuv2-normals", "test/000000.png", "names too few files"),
        ("scannet", "\n\n", "names no images"),
        ("kitti", "a.png None 721.5", "names no images"),
    ],
)
def test_lists_of_another_form(name: str, text: str, message: str, tmp_path: Path) -> None:
    file_list = tmp_path / "list.txt"
    file_list.write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_split(DATASETS[name], tmp_path, file_list)


def test_data_that_are_not_there(tmp_path: Path) -> None:
    dataset = DATASETS["nyuv2"]
    with pytest.raises(DatasetError, match=r"nowhere does not exist: the files of nyuv2"):
        open_split(dataset, tmp_path / "nowhere")
    root = tmp_path / "data"
    file_list = write("nyuv2", root)
    with pytest.raises(DatasetError, match="cannot be read"):
        open_split(dataset, root, tmp_path / "no_list.txt")
    no_tar = tmp_path / "file.tar"
    no_tar.write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match="neither a folder nor a complete tar"):
        open_split(dataset, no_tar, file_list)
    with tarfile.open(no_tar, "w") as tar:
        tar.add(root, arcname=".")
    no_tar.write_bytes(no_tar.read_bytes()[:700])
    with pytest.raises(DatasetError, match=r"complete tar|were not found"):
        open_split(dataset, no_tar, file_list)
