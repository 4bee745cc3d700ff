"""What `infer --ray` decides before a cluster is asked: options, shares, shards, and URLs of storage."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from PIL import Image
from typer.testing import CliRunner

from densegeo import remote
from densegeo.cli import app
from densegeo.errors import ImageError, ResourceError
from densegeo.fleet import ray_inference
from densegeo.fleet.ray_inference import results_of
from densegeo.fleet.shards import CONTAINERS, Shards
from densegeo.inputs import Input, find_inputs, is_stream

MAKER = {"bundle": {"sha256": "b"}, "options": {"fit": "stretch"}, "formats": ["npz"]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--actors", "2"), "goes with --ray"),
        (("--into", "parquet"), "goes with --ray"),
        (("--ray", " "), "say local, auto, or the address of a cluster"),
        (("--ray", "127.0.0.1:1"), "There is no Ray cluster at 127.0.0.1:1"),
        (("--ray", "local", "--into", "zip"), "There is no 'zip'; choose tree, parquet, webdataset"),
        (("--ray", "local", "--into", "parquet", "--overwrite"), "choose another folder"),
        (("--ray", "local", "--actor-cpus", "10000"), "No actor with 10000 CPUs fits on a node"),
        (("--ray", "local", "--frames"), "is about films and cameras, which run without --ray"),
        (("--ray", "local", "--max-frames", "3"), "is about films and cameras, which run without --ray"),
        (("--ray", "local", "rtsp://camera/stream"), "run films and cameras without it"),
    ],
)
def test_wrong_options(toy_bundle: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    command = ["infer", str(toy_bundle), str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), *options]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_waiting_for_results_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ray_inference, "SAY_S", 0.05)
    cluster = SimpleNamespace(available_resources=lambda: {"CPU": 0.0, "memory": 1e9})
    with ray_inference._saying(cluster, {"num_cpus": 2}) as came:
        came()
        deadline = time.monotonic() + 20
        while not caplog.messages:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "Free in the cluster: 0 CPU; an actor takes 2 CPU." in caplog.messages[0]
    assert not [thread for thread in threading.enumerate() if thread.name == "densegeo-waiting"]


def sample(name: str, **changed: Any) -> dict[str, bytes]:
    source = {"path": f"/photos/{name}.png", "bytes": 1, "modified_ns": 1, "sha256": "0", **MAKER} | changed
    return {"geometry.json": json.dumps({"source": source}).encode(), "geometry.npz": name.encode()}


@pytest.mark.parametrize("into", CONTAINERS)
def test_shards_tell_what_they_hold(into: str, tmp_path: Path) -> None:
    pictures = [tmp_path / f"{name}.png" for name in ("one", "two.v2", "three")]
    items = []
    for picture in pictures:
        picture.write_bytes(b"pixels")
        items.append(Input(str(picture), f"scene/{picture.stem}"))
    items.append(Input(str(pictures[1]), "scene/two%2Ev2"))  # another name, that of a key
    out, facts = tmp_path / "out", pictures[0].stat()
    maker = {"path": str(pictures[0]), "bytes": 6, "modified_ns": facts.st_mtime_ns}
    shards = results_of(out, MAKER, into)
    assert isinstance(shards, Shards)
    assert [shards.state(item) for item in items] == ["absent"] * 4
    two = {"path": str(pictures[1]), "bytes": 6, "modified_ns": pictures[1].stat().st_mtime_ns}
    samples = {
        items[0].name: sample("one", **maker),
        items[1].name: sample("two.v2", **two, options={"fit": "pad"}),
    }
    name = shards.write(items, samples)
    again = results_of(out, MAKER, into)
    assert [again.state(item) for item in items] == ["whole", "foreign", "absent", "absent"]
    assert again.existing(items[0]) == [name]
    assert sorted(path.name for path in out.iterdir()) == [name]
    shards.write(items, samples)  # another try
    assert sorted(path.name for path in out.iterdir()) == [name]
    pictures[0].write_bytes(b"others")  # replaced in a shard, it would be there twice
    assert results_of(out, MAKER, into).state(items[0]) == "foreign"
    (out / name).write_bytes(b"damaged")
    with pytest.raises(ResourceError, match="no shard of results, or damaged"):
        results_of(out, MAKER, into).state(items[0])


def test_storage_and_streams_are_told_apart() -> None:
    for url in ("s3://bucket/a.png", "gs://b/c", "memory://x", "file:///tmp/a.png"):
        assert remote.is_remote(url)
        assert not is_stream(url)
    for url in ("rtsp://camera/1", "http://camera/video", "HTTPS://x/film.mp4"):
        assert not remote.is_remote(url)
        assert is_stream(url)
    for path in ("a.png", "/photos/a://b.png", "C:\\a.png"):
        assert not remote.is_remote(path)


def test_images_are_found_in_storage() -> None:
    storage = fsspec.filesystem("memory")
    for name in ("/photos/s1/a.png", "/photos/s1/a.jpg", "/photos/s2/b.jpeg", "/photos/notes.txt", "/photos/walk.mp4"):
        storage.pipe_file(name, b"x")
    actual = find_inputs(["memory://photos"], Path("out"))
    assert [(item.path, item.name, item.film) for item in actual.inputs] == [
        ("memory:///photos/s1/a.jpg", "s1/a.jpg", False),
        ("memory:///photos/s1/a.png", "s1/a.png", False),
        ("memory:///photos/s2/b.jpeg", "s2/b", False),
    ]
    assert actual.skipped.total() == 2
    (single,) = find_inputs(["memory://photos/s2/b.jpeg"], Path("out")).inputs
    assert (single.path, single.name) == ("memory:///photos/s2/b.jpeg", "b")
    (listed,) = find_inputs([], Path("out"), ["memory://photos/gone.png"]).inputs
    assert listed.name == "gone"  # its reading fails by itself
    for url in ("memory://nothing", "nosuch://bucket/a"):
        with pytest.raises(ImageError, match=r"matches no image|cannot be opened"):
            find_inputs([url], Path("out"))


def test_infer_reads_them_without_ray_too(toy_bundle: Path, tmp_path: Path) -> None:
    """Done again only where the object's content changed."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for index in range(2):
        Image.new("RGB", (64, 48), (90 + index, 120, 150)).save(photos / f"{index}.png")

    def infer(*more: str) -> dict[str, Any]:
        command = ["infer", str(toy_bundle), f"file://{photos}", "-o", str(out), "-f", "npz", "--json", "-q", *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        summary: dict[str, Any] = json.loads(done.output)
        return summary

    assert infer()["done"] == 2
    source = json.loads((out / "0_geometry.json").read_text())["source"]
    assert source["path"] == f"file://{photos}/0.png"
    assert (source["bytes"], len(source["sha256"])) == ((photos / "0.png").stat().st_size, 64)
    os.utime(photos / "0.png", (1, 1))  # the same content
    Image.new("RGB", (64, 48), (10, 220, 50)).save(photos / "1.png")
    again = infer("--skip-existing")
    assert (again["done"], again["skipped"]) == (1, {"done before": 1})
