"""The numpy safetensors reader against the reference writer, and against broken files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from densegeo.errors import BundleError
from densegeo.runtime.tensorfile import read_tensors


def write(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((2, 3, 5)).astype(np.float32),
        "half": rng.standard_normal((7,)).astype(np.float16),
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "flag": np.array([True, False]),
    }
    safetensors.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    read = read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    header = {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    path = write(tmp_path / "x.safetensors", header, np.array([0x3F80, 0xC000], dtype="<u2").tobytes())
    np.testing.assert_array_equal(read_tensors(path)["x"], np.array([1.0, -2.0], dtype=np.float32))


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, b"1234"),  # truncated
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, b"12345678"),  # shape and bytes differ
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, b"12345678"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, b"12345678"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, b"1"),
        ({"dtype": "F32", "shape": "x"}, b""),
    ],
)
def test_malformed_entries(tmp_path: Path, entry: object, data: bytes) -> None:
    with pytest.raises(BundleError, match=r"x\.safetensors"):
        read_tensors(write(tmp_path / "x.safetensors", {"x": entry}, data))


@pytest.mark.parametrize("raw", [b"", b"abc", b"\xff" * 8, b"\xff" * 20, (4).to_bytes(8, "little") + b"{}{}"])
def test_malformed_files(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(BundleError, match=r"x\.safetensors"):
        read_tensors(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Cannot read"):
        read_tensors(tmp_path / "none.safetensors")
