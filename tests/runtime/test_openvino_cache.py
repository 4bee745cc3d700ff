"""What OpenVINO compiled is taken again for the same files, and for nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from densegeo.errors import BackendError
from densegeo.runtime import Estimator
from densegeo.runtime.backends import openvino_cache
from densegeo.runtime.kept import keep, keep_within, kept_at, read_kept

if find_spec("openvino") is None:  # looked up: importing it here would send its usage report
    pytest.skip("openvino is not installed", allow_module_level=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in which everything is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(openvino_cache, "WORTH_S", 0.0)
    return tmp_path / "cache" / "densegeo" / openvino_cache.FOLDER


def predicted(bundle: Path, picture: np.ndarray) -> np.ndarray:
    with Estimator(bundle, "openvino", check_digests=False) as estimator:
        geometry = estimator(picture)
    return np.dstack([geometry.prediction, geometry.normals])


def test_nothing_is_compiled_again(
    cache: Path, bundle: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino.preprocess

    compiled = predicted(bundle, picture)
    assert len(list(cache.iterdir())) == 3  # a stage each

    def read(*given: object) -> None:
        raise AssertionError("a graph was read")

    monkeypatch.setattr(openvino.preprocess, "PrePostProcessor", read)
    np.testing.assert_array_equal(predicted(bundle, picture), compiled)
    for path in cache.iterdir():
        path.unlink()
    with pytest.raises(BackendError, match="a graph was read"):
        predicted(bundle, picture)


def overwritten(content: bytes) -> bytes:
    """As OpenVINO would take it: a weight is another."""
    place = len(content) * 2 // 3
    return content[:place] + bytes(255 - byte for byte in content[place : place + 8]) + content[place + 8 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: bytes(4096), lambda content: content[:1000], overwritten],
    ids=["empty", "zeros", "cut", "overwritten"],
)
def test_a_damaged_file_is_made_again(
    damage: Callable[[bytes], bytes], cache: Path, bundle: Path, picture: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = predicted(bundle, picture)
    for path in cache.iterdir():
        path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.INFO, "densegeo"):
        np.testing.assert_array_equal(predicted(bundle, picture), compiled)
        assert caplog.text.count("is damaged and is made again") == 3
        caplog.clear()
        np.testing.assert_array_equal(predicted(bundle, picture), compiled)
    assert "damaged" not in caplog.text


def test_other_graphs_other_threads_and_files_of_others(
    cache: Path, new_bundle: Callable[..., Path], picture: np.ndarray
) -> None:
    bundle = new_bundle()
    compiled = predicted(bundle, picture)
    with Estimator(bundle, "openvino", check_digests=False, threads=1):
        assert len(list(cache.iterdir())) == 6
    path = bundle / "denoiser_64x48.onnx"
    model = onnx.load(path)
    (half,) = (tensor for tensor in model.graph.initializer if tensor.name == "half")
    half.CopyFrom(numpy_helper.from_array(np.float32(0.25), half.name))
    onnx.save(model, path)
    changed = predicted(bundle, picture)
    assert not np.array_equal(changed, compiled)
    for path in cache.iterdir():
        path.chmod(0o666)  # others may have written them
    np.testing.assert_array_equal(predicted(bundle, picture), changed)
    assert sum(path.stat().st_mode & 0o022 == 0 for path in cache.iterdir()) == 3, "made again"


def test_what_others_may_have_written_is_said_once_and_kept_anew(
    cache: Path, bundle: Path, picture: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """In a cache that is open to everybody, and with a umask that would make every file so."""
    before = os.umask(0)
    try:
        predicted(bundle, picture)
        for path in (cache, *cache.iterdir()):
            path.chmod(0o777)
        predicted(bundle, picture)
        assert [record.levelname for record in caplog.records if "chmod -R o-w" in record.message] == ["WARNING"]
        caplog.clear()
        written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
        with caplog.at_level(logging.INFO, "densegeo"):
            predicted(bundle, picture)
        assert "made again" not in caplog.text
        assert {path: path.stat().st_mode & 0o777 for path in written} == dict.fromkeys(written, 0o600)
    finally:
        os.umask(before)


def test_large_bundles_are_not_kept(
    cache: Path, bundle: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_cache, "LARGEST", 10)
    predicted(bundle, picture)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, bundle: Path, picture: np.ndarray, cache: Path) -> None:
    expected = predicted(bundle, picture)
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").write_text("a file")
    np.testing.assert_array_equal(predicted(bundle, picture), expected)


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = [kept_at("kind", str(number)) for number in range(4)]
    for number, path in enumerate(paths):
        assert path is not None
        keep(path, bytes(100))
        os.utime(path, (number, number))
    keep_within(tmp_path / "densegeo" / "kind", 300)
    assert [read_kept(path) is None for path in paths] == [True, True, False, False]
