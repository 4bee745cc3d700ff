"""Files and folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from densegeo.files import atomic_folder, atomic_write, put_folder


def test_the_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result.npz"
    with atomic_write(target) as partial:
        assert (partial.parent, partial.suffix) == (target.parent, ".npz")
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")

    def interrupted() -> None:
        with atomic_write(target) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_takes_its_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "1"
    with atomic_folder(target) as partial:
        (partial / "inside").mkdir()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["inside"]
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(OSError, match="not empty"), atomic_folder(target) as partial:
        (partial / "other").mkdir()
    assert [path.name for path in target.iterdir()] == ["inside"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "deep" / "1") as partial:
            (partial / "half").touch()
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_put_leaves_the_old_one(tmp_path: Path) -> None:
    target, aside = tmp_path / "bundle", tmp_path / "aside"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(OSError, match="missing"):
        put_folder(tmp_path / "missing", target, aside)
    assert [path.name for path in target.iterdir()] == ["old"]
    new = tmp_path / "new"
    new.mkdir()
    put_folder(new, target, aside)
    assert list(target.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]
