"""Which images `densegeo infer` takes, and how their results are called."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pytest

from densegeo.errors import ImageError
from densegeo.extras import install_hint
from densegeo.formats import IMAGE_SUFFIXES
from densegeo.inputs import find_inputs, read_list, unique_names
from densegeo.records import JOURNAL
from densegeo.runtime import Estimator
from tests.support.command_line import run
from tests.support.infer import put, put_photos, snapshot, summary

pytestmark = pytest.mark.integration


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return put_photos(tmp_path / "photos")


def test_every_format_is_read_in_a_folder_and_alone(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    folder = tmp_path / "formats"
    for suffix in IMAGE_SUFFIXES:
        name = folder / f"image_{suffix[1:]}{suffix}"
        put(name) if suffix != ".jpc" else name.write_bytes((folder / "image_j2k.j2k").read_bytes())
    assert run("infer", toy_bundle, folder, "-o", tmp_path / "one", "-f", "json", "--json") == 0
    assert summary(capsys)["done"] == len(IMAGE_SUFFIXES)
    assert run("infer", toy_bundle, *sorted(folder.iterdir()), "-o", tmp_path / "two", "-f", "json", "--json") == 0
    assert summary(capsys)["done"] == len(IMAGE_SUFFIXES)
    assert sorted(snapshot(tmp_path / "one")) == sorted(snapshot(tmp_path / "two"))


def test_heic_without_its_extra(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    path = put(tmp_path / "in" / "a.heic")
    put(tmp_path / "in" / "b.png")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    actual = find_inputs([str(tmp_path / "in")], tmp_path / "out")
    assert [item.name for item in actual.inputs] == ["b"]
    assert actual.skipped == {f".heic ({install_hint('heic')} to read them)": 1}
    with Estimator(toy_bundle) as estimator, pytest.raises(ImageError, match=re.escape(install_hint("heic"))):
        estimator(path)


def test_earlier_results_films_and_the_output_are_no_inputs(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    with Estimator("fe2e-tiny") as estimator:
        geometry = estimator(tmp_path / "a.png")
    geometry.save(tmp_path / "old", ["png", "grey8"], stem="a")  # no geometry.json beside them
    put(tmp_path / "b_normals.png")  # a user's own
    put(tmp_path / "out" / "c.png")
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    actual = find_inputs([str(tmp_path)], tmp_path / "out")
    assert [item.name for item in actual.inputs] == ["a", "b_normals"]
    assert actual.skipped == {
        "earlier results": 3,
        "output folder": 1,
        "films (name them one by one)": 1,
        "folders seen before, through a link": 1,
    }
    named = find_inputs([str(tmp_path / "old" / "a_normals.png"), str(tmp_path / "a.png")], tmp_path / "out")
    assert [item.name for item in named.inputs] == ["a"]
    with pytest.raises(ImageError, match="1 earlier results"):
        find_inputs([str(tmp_path / "old" / "a_normals.png")], tmp_path / "out")


def test_lists_and_standard_input(
    toy_bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text(f"{photos}/a.png\n\n{photos}/deep/a.png\r\n")
    assert run("infer", toy_bundle, "--list", tmp_path / "list.txt", "-o", tmp_path / "one", "-f", "json") == 0
    assert sorted(snapshot(tmp_path / "one")) == ["a_geometry.json", "deep/a_geometry.json", JOURNAL]
    odd = put(photos / "line\nbreak.png")
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{odd}\0{photos}/b.jpg\0".encode())))
    assert run("infer", toy_bundle, "-", "-o", tmp_path / "two", "-f", "json", "--json") == 0
    assert summary(capsys)["done"] == 2
    gone = os.fsencode(photos) + b"/gone\xfe.jpg\n"  # removed since, and no UTF-8
    (tmp_path / "older.txt").write_bytes(gone + os.fsencode(photos / "a.png"))
    assert run("infer", toy_bundle, "--list", tmp_path / "older.txt", "-o", tmp_path / "3", "-f", "json", "--json") == 1
    told = summary(capsys)
    assert told["done"] == 1
    assert [failure["source"] for failure in told["failed"]] == [f"{photos}/gone\\udcfe.jpg"]
    with pytest.raises(ImageError, match="cannot be read"):
        read_list(str(tmp_path / "none.txt"))


def test_find_inputs(photos: Path, tmp_path: Path) -> None:
    def names(*arguments: object) -> list[str]:
        return [item.name for item in find_inputs([str(argument) for argument in arguments], tmp_path / "out").inputs]

    assert names(photos) == ["a", "b", "deep/a", "deep/c", "other/deep/a"]
    assert names(photos / "*.png", photos / "a.png") == ["a"]
    assert names(photos / "**" / "*.png") == ["a", "deep/a"]
    assert names(photos / "deep", photos / "other") == ["deep/a", "deep/c", "other/deep/a"]
    assert names(photos / "notes.txt") == ["notes"]  # named outright: the image reader judges it
    odd = photos / "x[1].png"
    (photos / "a.png").rename(odd)
    assert names(odd) == ["x[1]"]
    with pytest.raises(ImageError, match="nothing"):
        names(photos, "nothing-*")


def test_unique_names() -> None:
    paths = ["one/a.png", "two/a.png", "two/A.jpg", "two/b.png", "two/c.jpg", "two/C.JPG"]
    names = unique_names([(path, path) for path in paths])
    assert names == ["one/a", "two/a.png", "two/A.jpg", "two/b", "two/c.jpg", "two/C.JPG_2"]
