"""Public evaluation sets on disk, read in the layouts that Marigold's and DSINE's evaluations use.

Depth: the tars of Marigold's evaluation data, or folders they were unpacked to, with the file lists of its repository
(github.com/prs-eth/Marigold, data_split/). Ranges, crops and encodings are those of its dataset classes (src/dataset/)
and configurations (config/dataset_depth/); FE2E's evaluation (github.com/AMAP-ML/FE2E, infer/dataset/) has the same.
Normals: DSINE's dsine_eval folders with its lists (github.com/baegwangbin/DSINE, data/datasets/*/split/), or Marigold's
lists, which name float arrays in place of pictures.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from densegeo.errors import DatasetError
from densegeo.outputs import FRAMES, Frame
from densegeo.size import Size

Float = NDArray[np.float32]
Mask = NDArray[np.bool_]
Window = tuple[slice, slice]  # rows, columns


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture and what is known about it; the truth may have another size than the picture.

    rgb: uint8 (H, W, 3). depth: (h, w) metres, used where depth_valid. normals: (h, w, 3), OpenCV frame, used where
    normals_valid. Either may be None.
    """

    name: str
    rgb: NDArray[np.uint8]
    depth: Float | None = None
    depth_valid: Mask | None = None
    normals: Float | None = None
    normals_valid: Mask | None = None


@dataclass(frozen=True)
class Split:
    """Samples to evaluate on; `samples()` starts anew each time. note: what a reader of the numbers must know."""

    name: str
    depth_range: tuple[float, float]  # metres; aligned depths are clipped to it
    count: int
    samples: Callable[[], Iterator[Sample]]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Truth:
    """As stored: depth (h, w) metres with a mask of its own or none; or normals (h, w, 3), OpenCV, with a mask."""

    depth: Float | None = None
    mask: Mask | None = None
    normals: Float | None = None


# (the truth's file names, their contents, the picture's (height, width)) -> Truth
Reader = Callable[[Sequence[str], Sequence[bytes], tuple[int, int]], Truth]


@dataclass(frozen=True)
class Dataset:
    """One row of the table.

    count: images in the published list. lists: names its list may have, in the data's folder. published: where the list
    is from. archive: Marigold's name of the tar. paths: a line's words -> picture and truth files, or None to leave the
    line out; IndexError when words are missing. crop: (height, width) -> what is kept of picture and truth. window: the
    kept part's (height, width) -> where pixels count.
    """

    name: str
    count: int
    lists: tuple[str, ...]
    published: str
    paths: Callable[[list[str]], tuple[str, ...] | None]
    read: Reader
    archive: str | None = None
    depth_range: tuple[float, float] = (0.0, np.inf)  # metres; valid depths lie strictly between
    crop: Callable[[Size], Window] | None = None
    window: Callable[[Size], Window] | None = None


def _words(count: int) -> Callable[[list[str]], tuple[str, ...]]:
    return lambda words: tuple(words[index] for index in range(count))


def _kitti_paths(words: list[str]) -> tuple[str, ...] | None:
    """Frames that have no ground truth are listed with the word None in its place."""
    return None if words[1] == "None" else (words[0], words[1])


def _normal_pair(words: list[str]) -> tuple[str, ...]:
    """Marigold's lists name both files; DSINE's only X_img.EXT, which goes with X_normal.png."""
    if len(words) > 1:
        return words[0], words[1]
    stem, marker, _ = words[0].rpartition("_img.")
    if not marker:
        raise IndexError
    return words[0], f"{stem}_normal.png"


def _png_depth(units: float) -> Reader:
    """16-bit PNG; value / units = metres."""

    def read(names: Sequence[str], contents: Sequence[bytes], size: tuple[int, int]) -> Truth:
        return Truth(depth=np.asarray(Image.open(io.BytesIO(contents[0]))).astype(np.float32) / np.float32(units))

    return read


def _raw_depth(names: Sequence[str], contents: Sequence[bytes], size: tuple[int, int]) -> Truth:
    """Little-endian float32 metres of the picture's size without a header, whatever the name; infinite = unknown."""
    depth = np.frombuffer(contents[0], dtype="<f4")
    if depth.size != size[0] * size[1]:
        raise ValueError(f"{len(contents[0])} bytes, and {4 * size[0] * size[1]} were expected for the picture's size")
    return Truth(depth=depth.reshape(size))


def _masked_depth(names: Sequence[str], contents: Sequence[bytes], size: tuple[int, int]) -> Truth:
    """Two .npy: metres (H, W) or (H, W, 1), and a mask that alone says which are valid."""
    depth, mask = (np.squeeze(np.load(io.BytesIO(content))) for content in contents)
    return Truth(depth=depth.astype(np.float32), mask=mask.astype(bool))


def _normal_map(names: Sequence[str], contents: Sequence[bytes], size: tuple[int, int]) -> Truth:
    """.png: 8-bit, v / 255 * 2 - 1 in DSINE's axes, black = none. .npy: floats in Marigold's axes, zero = none."""
    stored: NDArray[Any]
    frame: Frame
    if PurePosixPath(names[0]).suffix == ".npy":
        stored, frame = np.load(io.BytesIO(contents[0])), "marigold"
        has_normal = np.linalg.norm(stored, axis=-1) > 1e-6
    else:
        colours = np.asarray(Image.open(io.BytesIO(contents[0])).convert("RGB"))
        stored, frame, has_normal = colours.astype(np.float32) / 127.5 - 1, "dsine", colours.any(axis=-1)
    if stored.ndim != 3 or stored.shape[-1] != 3:
        raise ValueError(f"shape {stored.shape}, and (H, W, 3) was expected")
    to_opencv = np.array(FRAMES[frame], dtype=np.float32)  # its inverse is its transpose
    return Truth(normals=stored.astype(np.float32) @ to_opencv, mask=has_normal)


def kitti_crop(size: Size) -> Window:
    """The KITTI benchmark's 1216x352: bottom rows, middle columns."""
    top, left = size.height - 352, (size.width - 1216) // 2
    if top < 0 or left < 0:
        raise ValueError(f"{size} pixels, and at least 1216x352 were expected")
    return slice(top, size.height), slice(left, left + 1216)


def kitti_window(size: Size) -> Window:
    """Eigen's window as fractions of the cropped picture (not Garg's, which starts lower)."""
    rows = slice(int(0.3324324 * size.height), int(0.91351351 * size.height))
    return rows, slice(int(0.0359477 * size.width), int(0.96405229 * size.width))


def nyu_window(size: Size) -> Window:
    """Eigen's window, in pixels of the 640x480 pictures."""
    return slice(45, 471), slice(41, 601)


def _size_of(array: NDArray[Any]) -> Size:
    """Of a picture (H, W) or (H, W, C)."""
    height, width = array.shape[:2]
    return Size(width, height)


_MARIGOLD = "github.com/prs-eth/Marigold, data_split/"
_DSINE = "github.com/baegwangbin/DSINE, data/datasets/"
_ROWS = (
    Dataset(
        name="nyuv2",
        count=654,
        lists=("filename_list_test.txt",),
        published=_MARIGOLD + "nyu_depth/labeled/",
        archive="nyu_labeled_extracted.tar",
        paths=_words(2),  # the third is a filled depth map, which evaluation does not use
        read=_png_depth(1000),
        depth_range=(1e-3, 10.0),
        window=nyu_window,
    ),
    Dataset(
        name="kitti",
        count=652,
        lists=("eigen_test_files_with_gt.txt",),
        published=_MARIGOLD + "kitti_depth/",
        archive="kitti_eigen_split_test.tar",
        paths=_kitti_paths,
        read=_png_depth(256),
        depth_range=(1e-5, 80.0),
        crop=kitti_crop,
        window=kitti_window,
    ),
    Dataset(
        name="eth3d",
        count=454,
        lists=("eth3d_filename_list.txt",),
        published=_MARIGOLD + "eth3d_depth/",
        archive="eth3d.tar",
        paths=_words(2),
        read=_raw_depth,
        depth_range=(1e-5, np.inf),
    ),
    Dataset(
        name="scannet",
        count=800,
        lists=("scannet_val_sampled_list_800_1.txt",),
        published=_MARIGOLD + "scannet_depth/",
        archive="scannet_val_sampled_800_1.tar",
        paths=_words(2),
        read=_png_depth(1000),
        depth_range=(1e-3, 10.0),
    ),
    Dataset(
        name="diode",
        count=771,
        lists=("diode_val_all_filename_list.txt",),
        published=_MARIGOLD + "diode_depth/",
        archive="diode_val.tar",
        paths=_words(3),
        read=_masked_depth,
        depth_range=(0.6, 350.0),
    ),
    Dataset(
        name="nyuv2-normals",
        count=654,
        lists=("test.txt", "nyuv2_test.txt"),
        published=f"{_DSINE}nyuv2/split/ (or {_MARIGOLD}nyu_normals/)",
        paths=_normal_pair,
        read=_normal_map,
    ),
    Dataset(
        name="scannet-normals",
        count=300,
        lists=("test.txt", "scannet_test.txt"),
        published=f"{_DSINE}scannet/split/ (or {_MARIGOLD}scannet_normals/)",
        paths=_normal_pair,
        read=_normal_map,
    ),
)
DATASETS: Mapping[str, Dataset] = {row.name: row for row in _ROWS}


class Files(Protocol):
    """Where a dataset's files lie."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes: ...


@dataclass(frozen=True)
class _Folder:
    root: Path

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}

    def has(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        stream = self._archive.extractfile(self._members[name])
        assert stream is not None  # only regular files are members
        return stream.read()


@contextmanager
def _open(root: Path) -> Iterator[Files]:
    if root.is_dir():
        yield _Folder(root)
        return
    try:
        with tarfile.open(root) as archive:
            yield _Tar(archive)
    except (OSError, tarfile.TarError) as error:
        raise DatasetError(f"{root} is neither a folder nor a complete tar file: {error}.") from error


def open_split(dataset: Dataset, data: Path, file_list: Path | None = None, limit: int | None = None) -> Split:
    """A dataset's samples, in the order of its list, after checking that every file is there.

    data: the folder of the files, Marigold's tar of them, or the folder of that tar. file_list: another list than the
    published one (a subset, say); without it the published one lies in the folder. limit: only the first so many.
    Raises DatasetError that says what was expected where.
    """
    if not data.exists():
        raise DatasetError(f"{data} does not exist: the files of {dataset.name} were expected there.")
    folder = data if data.is_dir() else data.parent
    listed = file_list or _find_list(dataset, folder)
    entries = _entries(dataset, listed)
    if file_list is None and len(entries) != dataset.count:
        raise DatasetError(
            f"{listed} has {len(entries)} images, and {dataset.count} were expected for {dataset.name}. Copy it again "
            f"from {dataset.published}, or name a list of your own with --list."
        )
    chosen = entries[:limit]
    root = data
    if dataset.archive is not None and (data / dataset.archive).is_file():
        root = data / dataset.archive
    _check_present(dataset, root, chosen, listed)
    whole = len(chosen) == dataset.count
    return Split(
        name=dataset.name,
        depth_range=dataset.depth_range,
        count=len(chosen),
        samples=lambda: _samples(dataset, root, chosen),
        note="" if whole else f"{len(chosen)} images; the published split has {dataset.count}",
    )


def _find_list(dataset: Dataset, folder: Path) -> Path:
    for name in dataset.lists:
        if (folder / name).is_file():
            return folder / name
    raise DatasetError(
        f"The file list of {dataset.name} was expected at {folder / dataset.lists[0]}: "
        f"copy it from {dataset.published}, or name it with --list."
    )


def _entries(dataset: Dataset, file_list: Path) -> list[tuple[str, ...]]:
    try:
        lines = file_list.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"The file list {file_list} cannot be read: {error}.") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            paths = dataset.paths(line.split()) if line.strip() else None
        except IndexError:
            raise DatasetError(
                f"Line {number} of {file_list} names too few files for {dataset.name}: {line!r}. "
                f"Lists as in {dataset.published} were expected."
            ) from None
        if paths is not None:
            entries.append(paths)
    if not entries:
        raise DatasetError(f"The file list {file_list} names no images of {dataset.name}.")
    return entries


def _check_present(dataset: Dataset, root: Path, entries: list[tuple[str, ...]], listed: Path) -> None:
    names = [name for entry in entries for name in entry]
    with _open(root) as files:
        missing = [name for name in names if not files.has(name)]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(names)} {dataset.name} files that {listed} names were not found in {root}. "
            f"The first was expected at {root / missing[0]}."
        )


def _samples(dataset: Dataset, root: Path, entries: list[tuple[str, ...]]) -> Iterator[Sample]:
    with _open(root) as files:
        for picture, *truths in entries:
            try:
                yield _sample(dataset, picture, files.read(picture), truths, [files.read(name) for name in truths])
            except (OSError, ValueError, EOFError, SyntaxError) as error:  # SyntaxError: Pillow, for a broken PNG
                names = ", ".join((picture, *truths))
                raise DatasetError(f"A file of {dataset.name} in {root} cannot be used ({names}): {error}.") from error


def _sample(dataset: Dataset, picture: str, encoded: bytes, names: list[str], contents: list[bytes]) -> Sample:
    rgb = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    truth = dataset.read(names, contents, rgb.shape[:2])
    if truth.normals is not None:
        return Sample(picture, rgb, normals=truth.normals, normals_valid=truth.mask)
    depth, mask = truth.depth, truth.mask
    if depth is None or depth.ndim != 2 or (mask is not None and mask.shape != depth.shape):
        raise ValueError("depth and mask of one size (H, W) were expected")
    if dataset.crop is not None:
        rgb, depth = (array[dataset.crop(_size_of(array))] for array in (rgb, depth))
    if mask is None:
        low, high = dataset.depth_range
        mask = (depth > low) & (depth < high)
    counts = np.zeros(depth.shape, dtype=bool)
    counts[dataset.window(_size_of(depth)) if dataset.window else ...] = True
    return Sample(picture, rgb, depth=depth, depth_valid=mask & counts & np.isfinite(depth) & (depth > 0))
