"""The memory of input files' digests: right or not used at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from densegeo.export import digests


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read from now on; all count as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_NS", -(1 << 62))
    files: list[Path] = []
    original = digests.sha256_file

    def noting(path: Path, progress: digests.Progress) -> str:
        files.append(path)
        return original(path, progress)

    monkeypatch.setattr(digests, "sha256_file", noting)
    return files


def right(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once(tmp_path: Path, read: list[Path]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    (tmp_path / "link").symlink_to(path)
    counts: list[int] = []
    assert digests.sha256(path, counts.append) == right(b"one")
    assert digests.sha256(tmp_path / "link", counts.append) == right(b"one")
    assert read == [path]
    assert counts == [3, 3]


def test_a_changed_file_is_read_again(tmp_path: Path, read: list[Path]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digests.sha256(path)
    before = path.stat()
    path.write_bytes(b"two")  # the same size
    assert digests.sha256(path) == right(b"two")
    path.write_bytes(b"six")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    assert digests.sha256(path) == right(b"six")
    other = tmp_path / "other"
    other.write_bytes(b"ten")
    os.replace(other, path)
    assert digests.sha256(path) == right(b"ten")
    assert len(read) == 4


def test_a_file_of_just_now_is_not_remembered(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next change could fall into the same tick of the file system's clock."""
    monkeypatch.setattr(digests, "SETTLED_NS", 3600 * 10**9)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digests.sha256(path)
    digests.sha256(path)
    assert read == [path, path]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    original = digests.sha256_file

    def slow(path: Path, progress: digests.Progress) -> str:
        actual = original(path, progress)
        path.write_bytes(b"changed")
        return actual

    monkeypatch.setattr(digests, "sha256_file", slow)
    assert digests.sha256(path) == right(b"one")
    monkeypatch.setattr(digests, "sha256_file", original)
    assert digests.sha256(path) == right(b"changed")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b'{"\xff": 1}', b"[]", b'{"/file": 3}', b'{"/file": {"facts": ["x"]}}']
)
def test_a_damaged_memory_is_ignored(content: bytes, tmp_path: Path, read: list[Path]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    memory = digests.cache_directory() / digests.FILE
    memory.write_bytes(content)
    assert digests.sha256(path) == right(b"one")
    assert digests.sha256(path) == right(b"one")  # and repaired
    assert read == [path]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert digests.sha256(path) == right(b"one")
    assert digests.sha256(path) == right(b"one")
    assert read == [path, path]


def test_the_memory_does_not_grow_without_end(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 2)
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(path.name.encode())
        digests.sha256(path)
    read.clear()
    for path in (paths[2], paths[1], paths[0]):
        assert digests.sha256(path) == right(path.name.encode())
    assert read == [paths[0]]
