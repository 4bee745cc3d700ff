"""Evaluation sets written in their public layouts, with a few pixels: read whole, and refused when broken."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from densegeo.benchmarks.layouts import DATASETS, Sample, kitti_crop, kitti_window, nyu_window, open_split
from densegeo.errors import DatasetError
from densegeo.size import Size
from tests.support.datasets import LAYOUTS, OPENCV, picture, write


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
    assert nyu_window(Size(640, 480)) == (slice(45, 471), slice(41, 601))


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
    assert kitti_crop(Size(1216, 352)) == (slice(0, 352), slice(0, 1216))
    assert kitti_crop(Size(1219, 353)) == (slice(1, 353), slice(1, 1217))
    assert kitti_window(Size(1216, 352)) == (slice(117, 321), slice(43, 1172))
    with pytest.raises(ValueError, match="at least 1216x352"):
        kitti_crop(Size(1216, 351))


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
        (actual,) = open_split(DATASETS[name], data, file_list).samples()
        (expected,) = open_split(DATASETS[name], root, file_list).samples()
        np.testing.assert_array_equal(actual.rgb, expected.rgb)
        np.testing.assert_array_equal(actual.depth, expected.depth)
        np.testing.assert_array_equal(actual.depth_valid, expected.depth_valid)


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
